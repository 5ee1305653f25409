"""What stands on the encoder: the tied masked-word head, the next-sentence head, and the BertFor... models.

Letters as in model.py; C choices. Every model is the encoder (`bert`), then `outputs`: a head and, if there are labels,
a loss. `outputs` takes whatever encoder's results, so that a fast one can stand in for `bert`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minibert.activations import Activation
from minibert.base import BertPreTrainedModel
from minibert.config import BertConfig
from minibert.inputs import IGNORED, check_ids, check_targets, input_shape
from minibert.model import BertModel
from minibert.outputs import BaseModelOutput, LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput


class NextSentence(IntEnum):
    """The labels of next-sentence prediction. Mind that "yes" is 0."""

    IS_NEXT = 0  # the second segment follows the first
    NOT_NEXT = 1  # it comes from elsewhere


class BertPredictionHeadTransform(nn.Module):
    """From the encoder's space to that of the word embeddings. (..., D) -> (..., D)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = Activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    """Scores of every word: how alike the transformed state and each word's embedding are. (..., D) -> (..., V)."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        # The tie: the projection is the word embeddings themselves. (meta: the layer holds no memory of its own.)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, device="meta")
        self.decoder.weight = word_embeddings.weight  # (V, D), one parameter with two names
        self.decoder.bias = self.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))  # (..., D) -> (..., V)


class BertOnlyMLMHead(nn.Module):
    """Holds the head of masked words under the name that checkpoints have. (..., D) -> (..., V)."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.predictions(hidden_states)


class BertOnlyNSPHead(nn.Module):
    """Holds the head of the next sentence under the name that checkpoints have. (B, D) -> (B, 2)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.seq_relationship(pooled)  # (B, D) -> (B, 2)


class BertPreTrainingHeads(nn.Module):
    """Both heads. (..., D) and (B, D) -> (..., V) and (B, 2)."""

    def __init__(self, config: BertConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.predictions = BertLMPredictionHead(config, word_embeddings)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(hidden_states), self.seq_relationship(pooled)


def classification_loss(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Mean cross-entropy over the labels that are not `ignored`; 0 where there is none (torch's mean would be NaN).

    logits (..., classes); labels (...) of any shape with as many elements. Returns a number, ().
    """
    labels = labels.reshape(-1).long()
    loss = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, ignore_index=ignored)
    return torch.where((labels != ignored).any(), loss, 0.0)


class BertWithHead(BertPreTrainedModel):
    """A head with one tensor of logits and one of labels. A task fills three holes: the head, its labels, its loss."""

    def _check_labels(self, labels: Tensor | None, B: int, T: int) -> None:
        """Raise ValueError unless labels are None or what the task allows."""
        raise NotImplementedError

    def _logits(self, encoded: BaseModelOutput) -> Tensor:
        raise NotImplementedError

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return classification_loss(logits, labels)

    def outputs(
        self, encoded: BaseModelOutput, labels: Tensor | None = None, logits: Tensor | None = None
    ) -> LogitsOutput:
        """The head on an encoder's results, with the loss if there are labels. logits: if they are computed already."""
        logits = self._logits(encoded) if logits is None else logits
        loss = None if labels is None else self._loss(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LogitsOutput | tuple[Any, ...]:
        """Inputs as for BertModel; the class says what labels are, what logits are and when ValueError is raised."""
        self._check_labels(labels, *input_shape(input_ids, inputs_embeds))
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        return self.finish(self.outputs(encoded, labels), return_dict)


class BertForMaskedLM(BertWithHead):
    """Fill in masked words (section 3.1, task 1). labels (B, T), a word's id or -100; logits (B, T, V)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config, self.bert.embeddings.word_embeddings)
        self.post_init()

    def _check_labels(self, labels: Tensor | None, B: int, T: int) -> None:
        check_ids("labels", labels, [(B, T)], self.config.vocab_size, IGNORED)

    def _logits(self, encoded: BaseModelOutput) -> Tensor:
        return self.cls(encoded.last_hidden_state)  # (B, T, D) -> (B, T, V)


class BertForNextSentencePrediction(BertWithHead):
    """Does the second segment follow the first (section 3.1, task 2)? labels (B,), a NextSentence; logits (B, 2).

    Logit 0 says yes: see NextSentence.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()

    def _check_labels(self, labels: Tensor | None, B: int, T: int) -> None:
        check_ids("labels", labels, [(B,), (B, 1)], 2, IGNORED)

    def _logits(self, encoded: BaseModelOutput) -> Tensor:
        return self.cls(encoded.pooler_output)  # (B, D) -> (B, 2)


class BertForPreTraining(BertPreTrainedModel):
    """Both pretraining tasks at once (section 3.1): masked words and next sentence."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config, self.bert.embeddings.word_embeddings)
        self.post_init()

    def outputs(
        self,
        encoded: BaseModelOutput,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        words: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Both heads on an encoder's results; the loss is the sum of those whose labels are given.

        words: the scores of words (B, T, V), where they are computed already.
        """
        if words is None:
            words, next_sentence = self.cls(encoded.last_hidden_state, encoded.pooler_output)  # (B, T, V), (B, 2)
        else:
            next_sentence = self.cls.seq_relationship(encoded.pooler_output)
        mlm_loss = None if labels is None else classification_loss(words, labels)
        nsp_loss = None if next_sentence_label is None else classification_loss(next_sentence, next_sentence_label)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        loss = sum(losses[1:], losses[0]) if losses else None
        states, maps = encoded.hidden_states, encoded.attentions
        return PreTrainingOutput(loss, words, next_sentence, states, maps, mlm_loss, nsp_loss)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> PreTrainingOutput | tuple[Any, ...]:
        """Inputs as for BertModel; labels (B, T), a word's id or -100; next_sentence_label (B,), a NextSentence.

        `loss` is the sum of the losses whose labels are given, the parts are `mlm_loss` and `nsp_loss`.
        """
        B, T = input_shape(input_ids, inputs_embeds)
        check_ids("labels", labels, [(B, T)], self.config.vocab_size, IGNORED)
        check_ids("next_sentence_label", next_sentence_label, [(B,), (B, 1)], 2, IGNORED)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        return self.finish(self.outputs(encoded, labels, next_sentence_label), return_dict)


class BertClassifier(BertWithHead):
    """A linear layer on the encoder, with dropout in front: what the fine-tuned classifiers below share."""

    new_heads = ("classifier.", "bert.pooler.")  # may start untrained on a pretrained encoder

    def __init__(self, config: BertConfig, num_labels: int, add_pooling_layer: bool):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer)
        own_rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if own_rate is None else own_rate)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.post_init()

    def _logits(self, encoded: BaseModelOutput) -> Tensor:
        return self.classifier(self.dropout(encoded.pooler_output))  # (B, D) -> (B, num_labels)


class BertForSequenceClassification(BertClassifier):
    """One label, several, or a number for each text or pair of texts (section 4.1). logits (B, num_labels).

    labels: class ids (B,); or for several labels at once 0.0 to 1.0 (B, num_labels); or for regression numbers (B,) or
    (B, num_labels). `config.problem_type` says which; if None, transformers' rule decides: one label means regression,
    whole numbers mean classes, else several labels.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=True)

    def _problem(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def _check_labels(self, labels: Tensor | None, B: int, T: int) -> None:
        if not isinstance(labels, Tensor) or self._problem(labels) == "single_label_classification":
            check_ids("labels", labels, [(B,), (B, 1)], self.config.num_labels, IGNORED)
        else:
            check_targets("labels", labels, B, self.config.num_labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self._problem(labels)
        if problem != "single_label_classification":
            labels = labels.to(logits.dtype)
        if problem == "regression":
            return functional.mse_loss(logits.squeeze(1), labels.view(-1) if logits.shape[1] == 1 else labels)
        if problem == "multi_label_classification":
            return functional.binary_cross_entropy_with_logits(logits, labels)
        return classification_loss(logits, labels)


class BertForTokenClassification(BertClassifier):
    """A label for each token, as for named entities (section 5.3).

    labels (B, T), a class id or -100; logits (B, T, num_labels).
    """

    new_heads = ("classifier.",)

    def __init__(self, config: BertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=False)

    def _check_labels(self, labels: Tensor | None, B: int, T: int) -> None:
        check_ids("labels", labels, [(B, T)], self.config.num_labels, IGNORED)

    def _logits(self, encoded: BaseModelOutput) -> Tensor:
        return self.classifier(self.dropout(encoded.last_hidden_state))  # (B, T, D) -> (B, T, num_labels)


class BertForMultipleChoice(BertClassifier):
    """Which of C continuations fits (section 4.4)? Every input has one more dimension: (B, C, T).

    labels (B,), the number of the right choice; logits (B, C). Hidden states and attentions are of B * C rows.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config, 1, add_pooling_layer=True)

    def outputs(self, encoded: BaseModelOutput, labels: Tensor | None = None, choices: int = 1) -> LogitsOutput:
        """The head on the results for B * C rows, of which `choices` (C) belong together."""
        logits = self._logits(encoded).view(-1, choices)  # (B * C, 1) -> (B, C)
        loss = None if labels is None else self._loss(logits, labels)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> LogitsOutput | tuple[Any, ...]:
        """See the class. Raises ValueError as BertModel does."""
        B, C, _ = input_shape(input_ids, inputs_embeds, ndim=3)
        check_ids("labels", labels, [(B,)], C, IGNORED)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        rows = [None if x is None else x.flatten(0, 1) for x in inputs]  # (B, C, ...) -> (B * C, ...)
        encoded = self.bert(*rows, output_attentions, output_hidden_states, return_dict=True)
        return self.finish(self.outputs(encoded, labels, C), return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Where in the text does the answer start and end (section 4.2)?"""

    new_heads = ("qa_outputs.",)

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels={config.num_labels}: question answering has 2, the answer's start and end")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def outputs(
        self,
        encoded: BaseModelOutput,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """The head on an encoder's results; a position of T or more does not count."""
        start, end = self.qa_outputs(encoded.last_hidden_state).unbind(-1)  # (B, T, 2) -> 2 times (B, T)
        start, end = start.contiguous(), end.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            start_loss = classification_loss(start, start_positions.clamp(0, T), ignored=T)
            loss = (start_loss + classification_loss(end, end_positions.clamp(0, T), ignored=T)) / 2
        return QuestionAnsweringOutput(loss, start, end, encoded.hidden_states, encoded.attentions)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """Inputs as for BertModel. Returns start_logits and end_logits (B, T).

        start_positions and end_positions (B,): tokens' numbers; T or more means that the answer was cut off and does
        not count. `loss`, if both are given, is the mean of the two losses.
        """
        B, _ = input_shape(input_ids, inputs_embeds)
        for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
            check_ids(name, positions, [(B,), (B, 1)], 2**31)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        return self.finish(self.outputs(encoded, start_positions, end_positions), return_dict)

"""The tied masked-language-model head, the next-sentence head, and the BertFor... models."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.activations import Activation
from minibert.base import BertPreTrainedModel
from minibert.config import BertConfig
from minibert.inputs import IGNORED, check_ids, check_targets, input_shape
from minibert.model import BertModel
from minibert.outputs import LogitsOutput, PreTrainingOutput, QuestionAnsweringOutput


class NextSentence(IntEnum):
    """The labels of next-sentence prediction. Mind that "yes" is 0."""

    IS_NEXT = 0  # the second segment follows the first
    NOT_NEXT = 1  # it comes from elsewhere


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = Activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class BertLMPredictionHead(nn.Module):
    """Scores of every word: a transform, then the word embeddings themselves as projection, with a bias of its own."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        # On the meta device, which holds no memory: the model puts the tied parameters in (tie_weights)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, device="meta")
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden_states))  # (..., D) -> (..., V)


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.predictions(hidden_states)


class BertOnlyNSPHead(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.seq_relationship(pooled)  # (B, D) -> (B, 2)


class BertPreTrainingHeads(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(hidden_states), self.seq_relationship(pooled)


def classification_loss(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Mean cross-entropy over the labels that are not `ignored`; 0 where there is none (torch's mean would be NaN).

    logits (..., classes); labels (...) of any shape with as many elements.
    """
    labels = labels.reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, ignore_index=ignored)
    return torch.where((labels != ignored).any(), loss, 0.0)


class MaskedLanguageModel(BertPreTrainedModel):
    """A model whose vocabulary projection is the word embeddings: what the two models with an MLM head share."""

    tied_weights: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        embeddings, head = super().resize_token_embeddings(new_num_tokens), self.cls.predictions
        bias = head.bias.detach()[:new_num_tokens]
        head.bias = nn.Parameter(F.pad(bias, (0, new_num_tokens - len(bias))), head.bias.requires_grad)
        head.decoder.out_features = new_num_tokens
        self.tie_weights()
        return embeddings


class BertForPreTraining(MaskedLanguageModel):
    """Both pretraining tasks (section 3.1): masked words and next sentence."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self._init_all_weights()

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
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        words, next_sentence = self.cls(encoded.last_hidden_state, encoded.pooler_output)
        mlm_loss = None if labels is None else classification_loss(words, labels)
        nsp_loss = None if next_sentence_label is None else classification_loss(next_sentence, next_sentence_label)
        loss = nsp_loss if mlm_loss is None else mlm_loss if nsp_loss is None else mlm_loss + nsp_loss
        states, maps = encoded.hidden_states, encoded.attentions
        return self.finish(PreTrainingOutput(loss, words, next_sentence, states, maps, mlm_loss, nsp_loss), return_dict)


class BertForMaskedLM(MaskedLanguageModel):
    """Fill in masked words (section 3.1, task 1)."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self._init_all_weights()

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
        """Inputs as for BertModel; labels (B, T), a word's id or -100. Returns logits (B, T, V)."""
        check_ids("labels", labels, [tuple(input_shape(input_ids, inputs_embeds))], self.config.vocab_size, IGNORED)
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        logits = self.cls(encoded.last_hidden_state)
        loss = None if labels is None else classification_loss(logits, labels)
        return self.finish(LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions), return_dict)


class BertForNextSentencePrediction(BertPreTrainedModel):
    """Does the second segment follow the first (section 3.1, task 2)? Logit 0 says yes: see NextSentence."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self._init_all_weights()

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
        """Inputs as for BertModel; labels (B,), a NextSentence. Returns logits (B, 2)."""
        B, _ = input_shape(input_ids, inputs_embeds)
        check_ids("labels", labels, [(B,), (B, 1)], 2, IGNORED)
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        logits = self.cls(encoded.pooler_output)
        loss = None if labels is None else classification_loss(logits, labels)
        return self.finish(LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions), return_dict)


class Classifier(BertPreTrainedModel):
    """A linear layer on the encoder, with dropout in front: what the fine-tuned classifiers below share."""

    new_heads = ("classifier.", "bert.pooler.")

    def __init__(self, config: BertConfig, num_labels: int, add_pooling_layer: bool):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer)
        own_rate = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if own_rate is None else own_rate)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self._init_all_weights()


class BertForSequenceClassification(Classifier):
    """One label, several, or a number for each text or pair of texts (section 4.1)."""

    def __init__(self, config: BertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=True)

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
        """Inputs as for BertModel. Returns logits (B, num_labels).

        labels: class ids (B,); or for several labels at once 0.0 to 1.0 (B, num_labels); or for regression numbers (B,)
        or (B, num_labels). `config.problem_type` says which; if None, transformers' rule decides: one label means
        regression, whole numbers mean classes, else several labels.
        """
        B, _ = input_shape(input_ids, inputs_embeds)
        problem = self._problem_type(labels)
        if problem == "single_label_classification":
            check_ids("labels", labels, [(B,), (B, 1)], self.config.num_labels, IGNORED)
        elif problem is not None:
            check_targets("labels", labels, B, self.config.num_labels)
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None
        if problem == "regression":
            loss = F.mse_loss(logits.squeeze(1), labels.view(-1) if logits.shape[1] == 1 else labels)
        elif problem == "single_label_classification":
            loss = classification_loss(logits, labels)
        elif problem == "multi_label_classification":
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        return self.finish(LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions), return_dict)

    def _problem_type(self, labels: Tensor | None) -> str | None:
        if labels is None or self.config.problem_type is not None:
            return self.config.problem_type if labels is not None else None
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


class BertForTokenClassification(Classifier):
    """A label for each token, as for named entities (section 5.3)."""

    new_heads = ("classifier.",)

    def __init__(self, config: BertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=False)

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
        """Inputs as for BertModel; labels (B, T), a class id or -100. Returns logits (B, T, num_labels)."""
        check_ids("labels", labels, [tuple(input_shape(input_ids, inputs_embeds))], self.config.num_labels, IGNORED)
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else classification_loss(logits, labels)
        return self.finish(LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions), return_dict)


class BertForMultipleChoice(Classifier):
    """Which of C continuations fits (section 4.4)? Every input has one more dimension: (B, C, T)."""

    def __init__(self, config: BertConfig):
        super().__init__(config, 1, add_pooling_layer=True)

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
        """labels (B,), the number of the right choice. Returns logits (B, C); hidden states are of B * C rows."""
        B, C, _ = input_shape(input_ids, inputs_embeds, ndim=3)
        check_ids("labels", labels, [(B,)], C, IGNORED)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        rows = [None if x is None else x.flatten(0, 1) for x in inputs]  # (B, C, ...) -> (B * C, ...)
        encoded = self.bert(*rows, output_attentions, output_hidden_states, True)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(-1, C)  # (B * C, 1) -> (B, C)
        loss = None if labels is None else classification_loss(logits, labels)
        return self.finish(LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions), return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Where in the text does the answer start and end (section 4.2)?"""

    new_heads = ("qa_outputs.",)

    def __init__(self, config: BertConfig):
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels={config.num_labels}: question answering has 2, the answer's start and end")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._init_all_weights()

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
        """start_positions and end_positions (B,): tokens' numbers; T or more means that the answer was cut off and
        does not count. Returns start_logits and end_logits (B, T); `loss`, if both are given, is their mean."""
        B, T = input_shape(input_ids, inputs_embeds)
        for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
            check_ids(name, positions, [(B,), (B, 1)], 2**31)
        encoded = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds,
                            output_attentions, output_hidden_states, True)  # fmt: skip
        start, end = self.qa_outputs(encoded.last_hidden_state).split(1, dim=-1)  # (B, T, 2) -> 2 times (B, T, 1)
        start, end = start.squeeze(-1).contiguous(), end.squeeze(-1).contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = classification_loss(start, start_positions.clamp(0, T), ignored=T)
            loss = (start_loss + classification_loss(end, end_positions.clamp(0, T), ignored=T)) / 2
        output = QuestionAnsweringOutput(loss, start, end, encoded.hidden_states, encoded.attentions)
        return self.finish(output, return_dict)

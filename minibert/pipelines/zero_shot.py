"""Labels that no training has seen: is the text a premise from which "This example is about sports." follows?

Yin, Hay, Roth, "Benchmarking Zero-shot Text Classification" (2019), as transformers has it: a classifier of pairs,
fine-tuned for natural language inference, whose label for entailment scores each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minibert.checks import check_text, shown
from minibert.heads import BertForSequenceClassification
from minibert.pipelines.base import Pipeline
from minibert.pipelines.items import place
from minibert.text.tokenizer import BertTokenizer

TEMPLATE = "This example is {}."


class ZeroShotClassificationPipeline(Pipeline):
    """Which of some labels, given with the call, fits each text.

    >>> classify = pipeline("zero-shot-classification", "directory-or-name")
    >>> classify("The match ended in a draw.", candidate_labels=["sports", "politics"])
    {'sequence': 'The match ended in a draw.', 'labels': ['sports', 'politics'], 'scores': [0.97, 0.03]}
    """

    task = "zero-shot-classification"
    model_class = BertForSequenceClassification

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        candidate_labels: str | Sequence[str] | None = None,
        hypothesis_template: str = TEMPLATE,
        multi_label: bool = False,
        **options: Any,
    ):
        super().__init__(model, tokenizer, **options)
        self.candidate_labels = None if candidate_labels is None else _labels(candidate_labels)
        self.hypothesis_template, self.multi_label = hypothesis_template, multi_label

    @property
    def entailment_id(self) -> int:
        """The number of the model's label for entailment; -1 where it has none."""
        labels = self.model.config.label2id
        return next((number for label, number in labels.items() if label.lower().startswith("entail")), -1)

    def __call__(
        self,
        inputs: Any = None,
        candidate_labels: str | Sequence[str] | None = None,
        hypothesis_template: str | None = None,
        multi_label: bool | None = None,
        *,
        sequences: Any = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> Any:
        """For one text a dict of the text as "sequence", the "labels" and their "scores", best first; for several a
        list of these.

        candidate_labels is a list, or one str with commas. Each is set into hypothesis_template at {}. The scores are
        the shares of the labels, or with multi_label (and for a single label) how much more each is entailed than
        contradicted. A text that is too long is cut, its hypothesis never. sequences is another name of inputs.

        Raises TypeError for input that is no text, ValueError for no text or label, or a template without {}.
        """
        self._refuse_in_call(unknown)
        if (inputs is None) == (sequences is None):
            raise TypeError("give the texts once, as inputs or as sequences")
        inputs = sequences if inputs is None else inputs
        labels = self.candidate_labels if candidate_labels is None else _labels(candidate_labels)
        if self.entailment_id < 0:
            raise ValueError(
                "zero-shot-classification needs a model fine-tuned for natural language inference, with a label that "
                f"begins with 'entail'; its labels are {', '.join(self.model.config.label2id)}"
            )
        if labels is None:
            raise ValueError("candidate_labels must be given, here or when the pipeline is made")
        template = self.hypothesis_template if hypothesis_template is None else hypothesis_template
        if check_text(template, "hypothesis_template").format(labels[0]) == template:
            raise ValueError(f"hypothesis_template must have {{}} for the label, got {template!r}")
        if isinstance(inputs, (str, list, tuple)) and not inputs:
            raise ValueError("inputs is empty: give at least one text")
        return self._answer(
            inputs,
            labels=labels,
            hypotheses=[template.format(label) for label in labels],
            multi_label=self.multi_label if multi_label is None else multi_label,
            batch_size=batch_size,
        )

    def _results(
        self,
        texts: list[str],
        first: int | None,
        *,
        labels: list[str],
        hypotheses: list[str],
        multi_label: bool,
        batch_size: int | None,
    ) -> list[dict[str, Any]]:
        for i, text in enumerate(texts):
            if not text:
                raise ValueError(f"{place(i, first)} is empty")
        pairs = [(text, hypothesis) for text in texts for hypothesis in hypotheses]
        rows = self._encode(pairs, first, {"truncation": "only_first"})
        logits = self._run(rows, lambda runner, batch, _: runner(**batch).logits.float().cpu(), batch_size)
        scores = torch.stack(logits).view(len(texts), len(labels), -1)  # (texts, labels, classes)
        if multi_label or len(labels) == 1:
            contradiction = -1 if self.entailment_id == 0 else 0
            scores = scores[..., [contradiction, self.entailment_id]].softmax(-1)[..., 1]
        else:
            scores = scores[..., self.entailment_id].softmax(-1)
        results = []
        for text, row in zip(texts, scores.tolist(), strict=True):
            order = sorted(range(len(labels)), key=row.__getitem__, reverse=True)
            results.append({"sequence": text, "labels": [labels[i] for i in order], "scores": [row[i] for i in order]})
        return results


def _labels(given: str | Sequence[str]) -> list[str]:
    labels = [label.strip() for label in given.split(",") if label.strip()] if isinstance(given, str) else given
    if not isinstance(labels, (list, tuple)):
        raise TypeError(f"candidate_labels must be a list of str or one with commas, got {shown(given)}")
    if not labels:
        raise ValueError("candidate_labels is empty: give at least one label")
    return [check_text(label, f"candidate_labels[{i}]") for i, label in enumerate(labels)]

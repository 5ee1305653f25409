"""What there is to fine-tune for: what all tasks share, and labels for texts and for words.

Question answering and sentence pairs have files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from minibert.finetuning.conll import Sentence, read_sentences
from minibert.finetuning.examples import MULTI_LABEL, REGRESSION, Columns, Text, check_texts, label_names, read_texts
from minibert.finetuning.files import Layout
from minibert.finetuning.schemes import NO_ENTITIES, check_scheme, entity_scores, find_scheme, is_outside
from minibert.finetuning.scores import class_scores, multi_label_scores, number_scores
from minibert.heads import IGNORED, BertForSequenceClassification, BertForTokenClassification
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

_ROWS_AT = 64  # rows in a batch of validation


@dataclass(frozen=True)
class Rows:
    """Encoded examples: token ids and types of each, and its target (an id, a number, a list of them, or a list of one
    id a token). `examples` are those read; `words` says, for tagging, which word each token stands for.
    """

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    targets: list[Any]
    examples: Sequence[Any]
    words: list[tuple[int, list[int | None]]] = field(default_factory=list)
    cut: int = 0  # examples that were too long

    def __len__(self) -> int:
        return len(self.input_ids)


class Task:
    """One kind of fine-tuning. `best` is the score by which the best epoch is chosen; higher is better."""

    model_class: ClassVar[type[nn.Module]]
    problem_type: str | None = None
    best: str

    def check(self, path: Path) -> None:
        """Raises ValueError where it shows at once that a file cannot be read: a column is missing, say."""

    def read(self, path: str | os.PathLike[str]) -> list[Any]:
        """The examples of a file. Raises ValueError with FILE:LINE."""
        raise NotImplementedError

    def labels(self, examples: Sequence[Any]) -> list[str] | None:
        """The names of the labels in the training data, None where there are none."""
        return None

    def describe(self) -> str | None:
        """What the user should know of how examples were understood, in a line."""
        return None

    def group(self, example: Any) -> Hashable:
        """Examples of the same group must not be parted into training and validation data."""
        raise NotImplementedError

    def encode(self, examples: Sequence[Any], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int) -> Rows:
        """Rows of at most max_length tokens; `ids` numbers the labels."""
        raise NotImplementedError

    def loss(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows, numbers: list[int]) -> Tensor:
        """The mean loss of the rows of these numbers: a scalar."""
        inputs = batch_of(model, tokenizer, rows, numbers)
        return model(**inputs, labels=self._targets(rows, numbers, inputs["input_ids"].shape[1]).to(model.device)).loss

    def _targets(self, rows: Rows, numbers: list[int], longest: int) -> Tensor:
        """The labels as the model takes them, for a batch of `longest` tokens."""
        return torch.tensor([rows.targets[i] for i in numbers])

    def validate(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> dict[str, float]:
        """The scores on validation rows, of a model in eval mode."""
        raise NotImplementedError

    def save(self, model: nn.Module, tokenizer: BertTokenizer, directory: Path) -> None:
        """Write the model with all it takes to use it. The weights come last: with them it is whole."""
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)


class Classification(Task):
    """A label for each text or pair of texts; by problem_type also several labels, or a number."""

    model_class = BertForSequenceClassification

    def __init__(
        self,
        problem_type: str = "single_label_classification",
        columns: Columns | None = None,
        layout: Layout | None = None,
    ):
        self.problem_type, self.columns, self.layout = problem_type, columns, layout
        self.best = {REGRESSION: "r2", MULTI_LABEL: "macro_f1"}.get(problem_type, "accuracy")

    def check(self, path: Path) -> None:
        check_texts(path, self.columns, self.layout)

    def read(self, path: str | os.PathLike[str]) -> list[Text]:
        return read_texts(path, self.problem_type, self.columns, self.layout)

    def labels(self, examples: Sequence[Text]) -> list[str] | None:
        """The names of the labels, None for numbers. ValueError where there is nothing to tell apart."""
        file = examples[0].place.rpartition(":")[0]
        if self.problem_type == REGRESSION:
            if len({each.label for each in examples}) == 1:
                raise ValueError(f"{file}: the label is {examples[0].label} everywhere, nothing to learn")
            return None
        several = self.problem_type == MULTI_LABEL
        try:
            names = label_names(name for each in examples for name in (each.label if several else [each.label]))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if len(names) < (1 if several else 2):
            raise ValueError(f"{file}: {len(names)} different labels ({', '.join(names)}), nothing to tell apart")
        if several and (joined := next((name for name in names if _is_joined(name, names)), None)) is not None:
            raise ValueError(f"{file}: the label {joined!r} seems to be several: separate names by semicolons")
        return names

    def group(self, example: Text) -> Hashable:
        return example.text, example.text_pair

    def encode(self, examples: Sequence[Text], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int) -> Rows:
        targets = [self._target(each, ids) for each in examples]
        texts = [each.text if each.text_pair is None else (each.text, each.text_pair) for each in examples]
        encoded = tokenizer(texts, truncation=False, return_token_type_ids=True)
        long = [i for i, row in enumerate(encoded["input_ids"]) if len(row) > max_length]
        if long:
            shorter = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length,
                                return_token_type_ids=True)  # fmt: skip
            for name in ("input_ids", "token_type_ids"):
                for i, row in zip(long, shorter[name], strict=True):
                    encoded[name][i] = row
        return Rows(encoded["input_ids"], encoded["token_type_ids"], targets, examples, cut=len(long))

    def _target(self, example: Text, ids: dict[str, int]) -> int | float | list[float]:
        if self.problem_type == REGRESSION:
            return example.label
        several = self.problem_type == MULTI_LABEL
        numbers = [_known(name, ids, example.place) for name in (example.label if several else [example.label])]
        return [float(i in numbers) for i in range(len(ids))] if several else numbers[0]

    def validate(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> dict[str, float]:
        found, true = np.stack(predict(model, tokenizer, rows)), np.array(rows.targets)  # (N, labels); (N,) or both
        if self.problem_type == REGRESSION:
            return number_scores(found[:, 0], true)
        if self.problem_type == MULTI_LABEL:
            return multi_label_scores(found > 0, true > 0)
        return class_scores(found.argmax(1), true)


class Tagging(Task):
    """A label for each word, learnt at its first token (section 5.3). Longer sentences are cut between words.

    scheme: how labels make up entities, one of `schemes.CHOICES`; None: as the labels look.
    """

    model_class = BertForTokenClassification
    best = "f1"

    def __init__(self, word_column: int | None = None, label_column: int | None = None, scheme: str | None = None):
        self.word_column, self.label_column = word_column, label_column
        self.asked, self.scheme = scheme, scheme or "IOB"

    def read(self, path: str | os.PathLike[str]) -> list[Sentence]:
        return read_sentences(path, self.word_column, self.label_column)

    def labels(self, examples: Sequence[Sentence]) -> list[str]:
        file = examples[0].places[0].rpartition(":")[0]
        try:
            names = label_names(label for sentence in examples for label in sentence.labels)
            if len(names) < 2:
                raise ValueError(f"every word has the label {names[0]}, nothing to tell apart")
            self.scheme = self.asked or find_scheme(names)
            check_scheme(self.scheme, names)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        self.best = "accuracy" if self.scheme == NO_ENTITIES else "f1"
        return names

    def describe(self) -> str:
        return f"scored as {'words' if self.scheme == NO_ENTITIES else f'entities in {self.scheme}'}: {self.best}"

    def group(self, example: Sentence) -> Hashable:
        return example.words

    def encode(
        self, examples: Sequence[Sentence], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int
    ) -> Rows:
        targets = [
            [_known(label, ids, place) for label, place in zip(each.labels, each.places, strict=True)]
            for each in examples
        ]
        encoded = tokenizer([list(each.words) for each in examples], truncation=False, add_special_tokens=False,
                            is_split_into_words=True)  # fmt: skip
        rows = Rows([], [], [], examples)
        for i, tokens in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(i)
            firsts = [word if k == 0 or words[k - 1] != word else None for k, word in enumerate(words)]
            for start, end in _pieces(words, max_length - 2):
                row = [tokenizer.cls_token_id, *tokens[start:end], tokenizer.sep_token_id]
                kept = [None, *firsts[start:end], None]
                rows.input_ids.append(row)
                rows.token_type_ids.append([0] * len(row))
                rows.targets.append([IGNORED if word is None else targets[i][word] for word in kept])
                rows.words.append((i, kept))
        return rows

    def _targets(self, rows: Rows, numbers: list[int], longest: int) -> Tensor:
        return torch.tensor([[*rows.targets[i], *[IGNORED] * (longest - len(rows.targets[i]))] for i in numbers])

    def validate(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> dict[str, float]:
        return self.scores(predict(model, tokenizer, rows), rows, model.config.id2label)

    def scores(self, logits: list[np.ndarray], rows: Rows, names: dict[int, str]) -> dict[str, float]:
        """logits: (T, labels) of each row. Words that no token stands for count as outside of entities."""
        nothing = next((name for name in names.values() if is_outside(name)), names[0])
        predicted = [[nothing] * len(each.words) for each in rows.examples]
        for values, (sentence, words) in zip(logits, rows.words, strict=True):
            for value, word in zip(values.argmax(-1).tolist(), words, strict=True):
                if word is not None:
                    predicted[sentence][word] = names[value]
        true = [each.labels for each in rows.examples]
        if self.scheme != NO_ENTITIES:
            return entity_scores(predicted, true, self.scheme)
        ids = {name: i for i, name in names.items()}
        return class_scores(
            *(np.array([ids[label] for labels in side for label in labels]) for side in (predicted, true))
        )


def batch_of(model: nn.Module, tokenizer: BertTokenizer, rows: Rows, numbers: Sequence[int]) -> BatchEncoding:
    """The model's inputs, (B, T) each, padded on the right."""
    columns = {name: [getattr(rows, name)[i] for i in numbers] for name in ("input_ids", "token_type_ids")}
    return tokenizer.pad(columns, return_tensors="pt", padding_side="right").to(model.device)


@torch.inference_mode()
def predict(model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> list[np.ndarray]:
    """The logits of each row: (labels,), or of its own tokens, (T, labels)."""
    logits: list[np.ndarray] = [np.empty(0)] * len(rows)
    for numbers in by_length(rows.input_ids):
        values = model(**batch_of(model, tokenizer, rows, numbers)).logits.float().cpu().numpy()
        for number, value in zip(numbers, values, strict=True):
            logits[number] = value[: len(rows.input_ids[number])] if value.ndim == 2 else value
    return logits


def by_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of rows in batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + _ROWS_AT] for start in range(0, len(order), _ROWS_AT)]


def _is_joined(name: str, names: Collection[str]) -> bool:
    """Whether a label is made up of others, with something else than a semicolon between them."""
    return any(len(parts := name.split(mark)) > 1 and all(part.strip() in names for part in parts) for mark in ",|/")


def _known(label: str, ids: dict[str, int], place: str) -> int:
    if label not in ids:
        raise ValueError(f"{place}: the label {label!r} is not among those of the training data: {', '.join(ids)}")
    return ids[label]


def _pieces(words: list[int | None], room: int) -> list[tuple[int, int]]:
    """Cut a sentence's tokens into parts of at most `room`, between words where a word is not longer than that."""
    spans, start = [], 0
    while len(words) - start > room:
        end = start + room
        while end > start and words[end] == words[end - 1]:
            end -= 1
        end = end if end > start else start + room
        spans.append((start, end))
        start = end
    return [*spans, (start, len(words))]

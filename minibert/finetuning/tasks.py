"""What there is to fine-tune for: reading, encoding and scoring, for texts with a label and for words with labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import nn

from minibert.finetuning.examples import Sentence, Text, label_names, read_sentences, read_texts
from minibert.finetuning.scores import class_scores, entity_scores, multi_label_scores, number_scores
from minibert.heads import IGNORED, BertForSequenceClassification, BertForTokenClassification
from minibert.text.tokenizer import BertTokenizer


@dataclass(frozen=True)
class Rows:
    """Encoded examples: token ids and types of each, and its target (an id, a number, a list of them, or a list of one
    id a token). `examples` are those read; `words` says, for tagging, which word each token stands for."""

    input_ids: list[list[int]]
    token_type_ids: list[list[int]]
    targets: list[Any]
    examples: Sequence[Any]
    words: list[tuple[int, list[int | None]]] = field(default_factory=list)
    cut: int = 0  # examples that were too long

    def __len__(self) -> int:
        return len(self.input_ids)


class Task(Protocol):
    """`best` is the score by which the best epoch is chosen; higher is better."""

    model_class: type[nn.Module]
    problem_type: str | None
    best: str

    def read(self, path: str | os.PathLike[str]) -> list[Any]: ...
    def labels(self, examples: Sequence[Any]) -> list[str] | None: ...
    def encode(
        self, examples: Sequence[Any], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int
    ) -> Rows: ...
    def scores(self, logits: list[np.ndarray], rows: Rows, names: dict[int, str]) -> dict[str, float]: ...


class Classification:
    """A label for each text or pair of texts; by problem_type also several labels, or a number."""

    model_class = BertForSequenceClassification

    def __init__(self, problem_type: str = "single_label_classification"):
        self.problem_type = problem_type
        self.best = {"regression": "r2", "multi_label_classification": "macro_f1"}.get(problem_type, "accuracy")

    def read(self, path: str | os.PathLike[str]) -> list[Text]:
        return read_texts(path, self.problem_type)

    def labels(self, examples: Sequence[Text]) -> list[str] | None:
        """The names of the labels, None for numbers. ValueError where there is nothing to tell apart."""
        if self.problem_type == "regression":
            return None
        several = self.problem_type == "multi_label_classification"
        names = label_names(name for each in examples for name in (each.label if several else [each.label]))
        if len(names) < (1 if several else 2):
            file = examples[0].place.rpartition(":")[0]
            raise ValueError(f"{file}: {len(names)} different labels ({', '.join(names)}), nothing to tell apart")
        return names

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
        if self.problem_type == "regression":
            return example.label
        several = self.problem_type == "multi_label_classification"
        numbers = [_known(name, ids, example.place) for name in (example.label if several else [example.label])]
        return [float(i in numbers) for i in range(len(ids))] if several else numbers[0]

    def scores(self, logits: list[np.ndarray], rows: Rows, names: dict[int, str]) -> dict[str, float]:
        found, true = np.stack(logits), np.array(rows.targets)  # (N, labels), (N,) or (N, labels)
        if self.problem_type == "regression":
            return number_scores(found[:, 0], true)
        if self.problem_type == "multi_label_classification":
            return multi_label_scores(found > 0, true > 0)
        return class_scores(found.argmax(1), true)


class Tagging:
    """A label for each word, learnt at its first token (section 5.3). Longer sentences are cut between words."""

    model_class = BertForTokenClassification
    problem_type = None
    best = "f1"

    def read(self, path: str | os.PathLike[str]) -> list[Sentence]:
        return read_sentences(path)

    def labels(self, examples: Sequence[Sentence]) -> list[str]:
        names = label_names(label for sentence in examples for label in sentence.labels)
        if len(names) < 2:
            file = examples[0].places[0].rpartition(":")[0]
            raise ValueError(f"{file}: every word has the label {names[0]}, nothing to tell apart")
        if not any(name.startswith(("B-", "I-")) for name in names):  # parts of speech, say
            self.best = "accuracy"
        return names

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

    def scores(self, logits: list[np.ndarray], rows: Rows, names: dict[int, str]) -> dict[str, float]:
        """Words that no token stands for count as outside of entities."""
        nothing = "O" if "O" in names.values() else names[0]
        predicted = [[nothing] * len(each.words) for each in rows.examples]
        for values, (sentence, words) in zip(logits, rows.words, strict=True):
            for value, word in zip(values.argmax(-1).tolist(), words, strict=True):
                if word is not None:
                    predicted[sentence][word] = names[value]
        return entity_scores(predicted, [each.labels for each in rows.examples])


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

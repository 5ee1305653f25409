"""Sentence vectors from pairs of texts: near each other where texts belong together, far from all others of a batch."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.embedding.encoder import SentenceEncoder
from minibert.finetuning.examples import Columns, Pair, check_pairs, read_pairs
from minibert.finetuning.files import Layout
from minibert.finetuning.scores import ranking_scores
from minibert.finetuning.tasks import Rows, Task, by_length
from minibert.model import BertModel
from minibert.text.tokenizer import BertTokenizer

SCALE = 20.0  # of cosines, sentence-transformers' default
_AT_ONCE = 1000  # texts that are compared with all candidates


def ranking_loss(anchors: Tensor, candidates: Tensor, excluded: Tensor | None = None, scale: float = SCALE) -> Tensor:
    """Cross-entropy of finding each text's own partner among all candidates, by cosine times `scale`.

    Henderson et al. 2017, section 4; sentence-transformers' MultipleNegativesRankingLoss.

    Args:
        anchors: (B, D).
        candidates: (C, D), C >= B: the partners in the order of the anchors, then further negatives.
        excluded: (B, C) boolean, candidates that do not count as wrong answers.
    """
    scores = scale * F.normalize(anchors, dim=-1) @ F.normalize(candidates, dim=-1).T  # (B, C)
    if excluded is not None:
        scores = scores.masked_fill(excluded, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(anchors), device=scores.device))


class SentencePairs(Task):
    """Vectors of texts, learnt from pairs that belong together. Equal texts are no negatives of each other."""

    model_class = BertModel
    best = "mrr"
    encoder: SentenceEncoder  # what is trained; set before rows are encoded

    def __init__(self, columns: Columns | None = None, layout: Layout | None = None):
        self.columns, self.layout = columns, layout
        self.negatives = 0

    def check(self, path: Path) -> None:
        check_pairs(path, self.columns, self.layout)

    def read(self, path: str | os.PathLike[str]) -> list[Pair]:
        return read_pairs(path, self.columns, self.layout)

    def labels(self, examples: Sequence[Pair]) -> None:
        if len({each.text_pair for each in examples}) < 2:
            file = examples[0].place.rpartition(":")[0]
            raise ValueError(f"{file}: one and the same second text everywhere, nothing to tell it from")
        self.negatives = sum(each.negative is not None for each in examples)

    def describe(self) -> str:
        given = f", and {self.negatives:,} given ones" if self.negatives else ""
        return f"negatives are the other pairs of a batch{given}"

    def group(self, example: Pair) -> Hashable:
        return example.text

    def encode(self, examples: Sequence[Pair], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int) -> Rows:
        """Token ids of the first texts; targets: ids of the partner, and of the negative if there is one."""
        prompt = self.encoder.options().prompt
        texts = [text for each in examples for text in (each.text, each.text_pair, each.negative) if text is not None]
        unique = list(dict.fromkeys(texts))
        encoded = tokenizer([prompt + text for text in unique], truncation=False)["input_ids"]
        short = [row if len(row) <= max_length else [*row[: max_length - 1], row[-1]] for row in encoded]
        known = dict(zip(unique, short, strict=True))
        longer = {text for text, row in zip(unique, encoded, strict=True) if len(row) > max_length}
        rows = Rows(
            [], [], [], examples, cut=sum(not longer.isdisjoint((e.text, e.text_pair, e.negative)) for e in examples)
        )
        for each in examples:
            rows.input_ids.append(known[each.text])
            rows.token_type_ids.append([0] * len(known[each.text]))
            rows.targets.append([known[text] for text in (each.text_pair, each.negative) if text is not None])
        return rows

    def loss(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows, numbers: list[int]) -> Tensor:
        anchors = [rows.input_ids[i] for i in numbers]
        candidates = [rows.targets[i][0] for i in numbers] + [
            rows.targets[i][1] for i in numbers if len(rows.targets[i]) > 1
        ]
        excluded = torch.tensor(_excluded(anchors, candidates), device=model.device)
        return ranking_loss(
            self._vectors(model, tokenizer, anchors), self._vectors(model, tokenizer, candidates), excluded
        )

    def _vectors(self, model: nn.Module, tokenizer: BertTokenizer, rows: Sequence[list[int]]) -> Tensor:
        """(B, D)."""
        batch = tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt", padding_side="right").to(model.device)
        states, mask = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state, batch["attention_mask"]
        return self.encoder.after(self.encoder.pooling(states, mask))

    @torch.inference_mode()
    def _all_vectors(self, model: nn.Module, tokenizer: BertTokenizer, rows: Sequence[list[int]]) -> np.ndarray:
        """(N, D), of length 1."""
        found: list[np.ndarray] = [np.empty(0)] * len(rows)
        for numbers in by_length(rows):
            vectors = F.normalize(self._vectors(model, tokenizer, [rows[i] for i in numbers]), dim=-1)
            for number, vector in zip(numbers, vectors.float().cpu().numpy(), strict=True):
                found[number] = vector
        return np.stack(found)

    def validate(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> dict[str, float]:
        """How well each text finds its partner among all second texts (and given negatives)."""
        anchors = [tuple(row) for row in rows.input_ids]
        partners: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for anchor, targets in zip(anchors, rows.targets, strict=True):
            partners.setdefault(anchor, set()).add(tuple(targets[0]))
        candidates = list(dict.fromkeys(tuple(target) for targets in rows.targets for target in targets))
        columns = {candidate: i for i, candidate in enumerate(candidates)}
        ours = self._all_vectors(model, tokenizer, rows.input_ids)
        theirs = self._all_vectors(model, tokenizer, [list(each) for each in candidates])
        totals: dict[str, float] = {}
        for start in range(0, len(anchors), _AT_ONCE):
            some = anchors[start : start + _AT_ONCE]
            similarity = ours[start : start + _AT_ONCE] @ theirs.T  # (N, C)
            right = np.zeros(similarity.shape, dtype=bool)
            for i, anchor in enumerate(some):
                right[i, [columns[partner] for partner in partners[anchor]]] = True
                if anchor in columns and not right[i, columns[anchor]]:
                    similarity[i, columns[anchor]] = -np.inf  # the text itself
            for name, value in ranking_scores(similarity, right).items():
                totals[name] = totals.get(name, 0.0) + value * len(some) / len(anchors)
        return totals

    def save(self, model: nn.Module, tokenizer: BertTokenizer, directory: Path) -> None:
        self.encoder.save_pretrained(directory)


def _excluded(anchors: Sequence[list[int]], candidates: Sequence[list[int]]) -> list[list[bool]]:
    """Which candidates are no wrong answers: what equals the text or its partner, and partners of an equal text."""
    return [
        [
            j != i and (candidate in (anchor, candidates[i]) or (j < len(anchors) and anchors[j] == anchor))
            for j, candidate in enumerate(candidates)
        ]
        for i, anchor in enumerate(anchors)
    ]

"""From planned pairs to tensors: [CLS] a [SEP] b [SEP], padded or packed, with the masks of 80/10/10 (appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minibert.heads import IGNORED
from minibert.pretraining.corpus import Corpus
from minibert.pretraining.order import Plan
from minibert.pretraining.pairs import PairRules, lengths_of, random_of


@dataclass
class Batch:
    """Tensors of one step. (R, T): input_ids, token_type_ids, position_ids, and `pair`, the number from 1 of the pair
    that a token belongs to within its row, 0 for padding.

    cls_positions and next_sentence_label (B,), for B pairs; masked_positions and masked_labels (P,), for the tokens to
    predict. Positions count in the flattened (R * T) batch. P hardly varies: what is left over has position 0, label
    -100. Tokens attend to the tokens of their pair alone.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    pair: Tensor
    cls_positions: Tensor
    next_sentence_label: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.pair > 0).sum())

    @property
    def masked(self) -> int:
        """Tokens to predict."""
        return int((self.masked_labels != IGNORED).sum())

    @property
    def pairs(self) -> int:
        """Pairs whose order is to be predicted."""
        return int((self.next_sentence_label != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class BatchMaker:
    """Reads, pads or packs, and masks planned pairs. Widths are multiples of `pad_to`, or max_length if packed.

    With `once`, pairs that are there to fill up a batch have no labels, so that an epoch counts every pair once.
    """

    def __init__(
        self, corpus: Corpus, rules: PairRules, *, packed: bool = False, pad_to: int = 1, once: bool = False
    ) -> None:
        self.corpus, self.rules, self.packed, self.pad_to, self.once = corpus, rules, packed, pad_to, once
        tokenizer = corpus.tokenizer
        self.pad, self.cls, self.sep, self.mask = (
            getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask")
        )
        pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
        self.ordinary = np.setdiff1d(sorted(pieces), tokenizer.all_special_ids)  # ids that may replace a token
        self.continues = np.zeros(corpus.vocab_size, bool)
        self.continues[[index for index, piece in pieces.items() if piece.startswith("##")]] = True

    def __getitem__(self, plan: Plan) -> Batch:
        pairs, lengths = plan.pairs, lengths_of(plan.pairs)
        width = self.rules.max_length
        if not self.packed:
            width = min(-(-int(lengths.max()) // self.pad_to) * self.pad_to, width)
        ids = np.full((plan.rows, width), self.pad, np.int64)
        types, places, pair = np.zeros((3, plan.rows, width), np.int64)
        maskable = np.zeros(ids.shape, bool)
        noise = np.zeros((3, plan.rows, width))
        for number, (length, found) in enumerate(zip(lengths.tolist(), pairs, strict=True), start=1):
            row, column, a, b = (int(found[name]) for name in ("row", "column", "a_length", "b_length"))
            here = (row, slice(column, column + length))
            first, second = self.corpus.tokens(found["a"], a), self.corpus.tokens(found["b"], b)
            ids[here] = np.concatenate([[self.cls], first, [self.sep], second, [self.sep]])
            types[row, column + a + 2 : column + length] = 1
            places[here] = np.arange(length)
            pair[here] = number
            maskable[here] = True
            maskable[row, [column, column + a + 1, column + length - 1]] = False
            # Drawn for the greatest length: a pair does not depend on how it is padded
            rng = random_of(self.rules.seed, plan.epoch, plan.block, 1 + int(found["number"]))
            noise[(slice(None), *here)] = rng.random((3, self.rules.max_length))[:, :length]
        chosen = self._choose(ids, pair, maskable, noise[0])
        masked = np.where(chosen & (noise[1] < 0.8), self.mask, ids)
        other = self.ordinary[(noise[2] * len(self.ordinary)).astype(np.int64)]
        found = np.flatnonzero(chosen)
        expected = max(len(found), int(np.ceil(ids.size * self.rules.masked)))
        positions = np.zeros(-(-expected // 64) * 64, np.int64)
        labels = np.full(len(positions), IGNORED, np.int64)
        positions[: len(found)], labels[: len(found)] = found, ids.flat[found]
        next_labels = pairs["not_next"].astype(np.int64)
        if self.once and pairs["repeated"].any():
            next_labels[pairs["repeated"] == 1] = IGNORED
            labels[: len(found)][pairs["repeated"][pair.flat[found] - 1] == 1] = IGNORED
        arrays = {
            "input_ids": np.where(chosen & (noise[1] >= 0.9), other, masked),
            "token_type_ids": types,
            "position_ids": places,
            "pair": pair,
            "cls_positions": pairs["row"].astype(np.int64) * width + pairs["column"],
            "next_sentence_label": next_labels,
            "masked_positions": positions,
            "masked_labels": labels,
        }
        return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()}, packed=self.packed)

    def _choose(self, ids: np.ndarray, pair: np.ndarray, maskable: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Which tokens to predict: of every pair those with the lowest scores, (R, T) of bool."""
        places = np.flatnonzero(maskable)
        if self.rules.whole_words:
            starts = maskable & ~self.continues[ids]
            starts[:, 1:] |= maskable[:, 1:] & ~maskable[:, :-1]  # truncation may have cut a word's first pieces off
            word = np.cumsum(starts.flat[places]) - 1
            score = score.flat[places[starts.flat[places]]][word]
        else:
            word, score = np.arange(len(places)), score.flat[places]
        order = np.lexsort((word, score, pair.flat[places]))
        sizes = np.bincount(pair.flat[places])[1:]  # every pair has at least two ordinary tokens
        budgets = np.maximum(1, np.rint(sizes * self.rules.masked)).astype(np.int64)
        if self.rules.whole_words:
            taken = _whole_words(word[order], sizes, budgets)
        else:
            taken = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes) < np.repeat(budgets, sizes)
        chosen = np.zeros(ids.shape, bool)
        chosen.flat[places[order[taken]]] = True
        return chosen


def _whole_words(word: np.ndarray, sizes: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Of tokens in the order of choice, those to take: words that still fit into their pair's budget."""
    starts = np.flatnonzero(np.diff(word, prepend=-1))
    lengths = np.diff(starts, append=len(word)).tolist()
    taken, ends, left, pair = np.zeros(len(word), bool), np.cumsum(sizes), int(budgets[0]), 0
    for start, length in zip(starts.tolist(), lengths, strict=True):
        if start >= ends[pair]:
            pair += 1
            left = int(budgets[pair])
        if length <= left:
            taken[start : start + length] = True
            left -= length
    return taken

"""The endless stream of batches: which pairs, in which order, in which rows. A batch is planned before it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minibert.pretraining.corpus import Corpus
from minibert.pretraining.pairs import PairRules, lengths_of, plan_pairs, random_of

DOCUMENTS_A_BLOCK = 8192  # planned and shuffled together; documents change their block every epoch


@dataclass(frozen=True)
class Position:
    """Where a run stands in the endless stream of batches."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Plan:
    """A batch, or a part of one, that is not made yet: its pairs, and the position at which the stream goes on."""

    pairs: np.ndarray
    rows: int
    epoch: int
    block: int
    after: Position

    def part(self, index: int, parts: int) -> Plan:
        """One of `parts` equal parts, row for row; together they are the whole."""
        rows = self.rows // parts
        pairs = self.pairs[self.pairs["row"] // rows == index].copy()
        pairs["row"] -= index * rows
        return replace(self, pairs=pairs, rows=rows)


def plan_batches(
    corpus: Corpus,
    rules: PairRules,
    rows: int,
    *,
    packed: bool = False,
    start: Position | None = None,
    epochs: int | None = None,
) -> Iterator[Plan]:
    """The stream of batches from `start` on, of `rows` rows each: endless, or up to the end of `epochs` epochs.

    A row holds one pair, and a batch pairs of similar length; or, if `packed`, a row holds as many pairs as fit. Every
    epoch has new pairs in a new order. The last batch of a block is filled up with rows from the block's beginning,
    whose pairs are marked as `repeated`.
    """
    start = start or Position()
    epoch, block, first = start.epoch, start.block, start.batch
    documents = len(corpus.documents) - 1
    blocks = -(-documents // DOCUMENTS_A_BLOCK)
    while epochs is None or epoch < epochs:
        order = random_of(rules.seed, epoch, blocks).permutation(documents)
        while block < blocks:
            rng = random_of(rules.seed, epoch, block)
            chosen = np.sort(order[block * DOCUMENTS_A_BLOCK : (block + 1) * DOCUMENTS_A_BLOCK])
            pairs = plan_pairs(corpus, chosen, rules, rng)
            pairs["number"] = np.arange(len(pairs))
            arranged = (_pack if packed else _group)(pairs, rows, rules.max_length, rng)
            for index in range(first, len(arranged)):
                last = index + 1 == len(arranged)
                after = Position(epoch, block + 1, 0) if last else Position(epoch, block, index + 1)
                yield Plan(arranged[index], rows, epoch, block, after)
            block, first = block + 1, 0
        epoch, block = epoch + 1, 0


def _group(pairs: np.ndarray, rows: int, max_length: int, rng: np.random.Generator) -> np.ndarray:
    """(batches, rows) of PAIR: shuffled, but with similar lengths in a batch."""
    count = -(-len(pairs) // rows)
    fresh = len(pairs)
    pairs = np.resize(pairs[rng.permutation(fresh)], count * rows)
    pairs["repeated"][fresh:] = 1
    batches = pairs[np.argsort(lengths_of(pairs), kind="stable")].reshape(count, rows)
    batches["row"] = np.arange(rows)
    return batches[rng.permutation(count)]


def _pack(pairs: np.ndarray, rows: int, max_length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Arrays of PAIR, one a batch: every pair goes into the fullest row that has room for it, the longest first."""
    pairs = pairs[rng.permutation(len(pairs))]
    pairs = pairs[np.argsort(-lengths_of(pairs), kind="stable")]
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by the room they have left
    count, row_of, column_of = 0, [], []
    for length in lengths_of(pairs).tolist():
        room = next((room for room in range(length, max_length) if open_rows[room]), max_length)
        if room < max_length:
            row = open_rows[room].pop()
        else:
            row, count = count, count + 1
        row_of.append(row)
        column_of.append(max_length - room)
        open_rows[room - length].append(row)
    pairs["column"] = column_of
    shuffled = rng.permutation(count)[row_of]
    pairs = pairs[np.argsort(shuffled, kind="stable")]
    shuffled = np.sort(shuffled)
    batches = -(-count // rows)
    missing = batches * rows - count  # taken from the first rows, again and again in a tiny corpus
    again = [np.flatnonzero(shuffled == row % count) for row in range(missing)]
    fresh = len(pairs)
    pairs = np.concatenate([pairs, *(pairs[places] for places in again)])
    pairs["repeated"][fresh:] = 1
    row_of = np.concatenate([shuffled, *(np.full(len(places), count + i) for i, places in enumerate(again))])
    pairs["row"] = row_of % rows
    return np.split(pairs, np.searchsorted(row_of, np.arange(1, batches) * rows))

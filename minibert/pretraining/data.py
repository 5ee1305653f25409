"""From a tokenized corpus to pretraining batches: sentence pairs, truncation, masks (section 3.1 and appendix A.2).

Everything random is drawn from a counter-based generator (Philox) whose counter says what is drawn: the pairs of a
block of documents from (seed, epoch, block), the masks of a pair from (seed, epoch, block, pair). A batch is therefore
the same whichever process makes it, and any batch can be made without those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibert.heads import IGNORED
from minibert.pretraining.corpus import SPECIAL_TOKENS, Corpus

DOCUMENTS_A_BLOCK = 8192  # planned and shuffled together; documents change their block every epoch

# A planned example. a, b: where the segments start in the corpus; number: its place in its block; row, column: its
# place in the batch. cut: tokens lost by truncation.
_INTEGERS = [("a_length", "i4"), ("b_length", "i4"), ("cut", "i4"), ("number", "i4"), ("row", "i4"), ("column", "i4")]
PAIR = np.dtype([("a", "i8"), ("b", "i8"), *_INTEGERS, ("not_next", "i1"), ("short", "i1")])


@dataclass(frozen=True)
class PairRules:
    """How examples are made; the defaults are those of the paper.

    max_length counts [CLS] and both [SEP]. `masked` is the share of tokens to predict: 80% of them become [MASK], 10%
    another token, 10% stay. whole_words chooses whole words, as many as fit into the same number of pieces; the
    80/10/10 is drawn for each piece, as in Google's code.
    """

    max_length: int = 128
    short_probability: float = 0.1
    random_next_probability: float = 0.5
    masked: float = 0.15
    whole_words: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 5:
            raise ValueError(f"max_length is {self.max_length}, but [CLS] a [SEP] b [SEP] needs at least 5")
        for name in ("short_probability", "random_next_probability", "masked"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be from 0 to 1")


@dataclass(frozen=True)
class Position:
    """Where a run stands in the endless stream of batches."""

    epoch: int = 0
    block: int = 0
    batch: int = 0


def _random(seed: int, *counter: int) -> np.random.Generator:
    words = (*counter, 0, 0, 0)[:3]
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, *words]))


# --- pairs --------------------------------------------------------------------------------------------------------


def plan_pairs(corpus: Corpus, documents: np.ndarray, rules: PairRules, rng: np.random.Generator) -> np.ndarray:
    """All examples of some documents, as an array of PAIR: where both segments start, and their lengths.

    As Google's create_pretraining_data does, a document is read from front to back: sentences are taken until
    they fill an example, a random number of them (at least one) is segment A; B is the rest, or as many tokens from a
    random place of another random document, and then the rest is left for the next example. Two differences, to get
    the shares that the paper states: the length is drawn for each example instead of once a document (a third of the
    examples would be short), and a single sentence left at the end makes no pair (it could only be a random one).

    All documents advance together, one example a round.
    """
    sentences, limits = corpus.sentences, corpus.documents
    room = rules.max_length - 3
    at, end, own = limits[documents].astype(np.int64), limits[documents + 1].astype(np.int64), documents
    rounds = []
    while len(at):
        u = rng.random((6, len(at)))
        short = u[0] < rules.short_probability
        target = np.where(short, 2 + (u[1] * (room - 1)).astype(np.int64), room)
        stop = np.searchsorted(sentences, sentences[at] + target)
        stop = np.minimum(np.maximum(stop, at + 2), end)
        count = stop - at
        not_next = u[2] < rules.random_next_probability
        a_stop = at + 1 + (u[3] * (count - 1)).astype(np.int64)
        a, a_length = sentences[at], sentences[a_stop] - sentences[at]
        b, b_length = sentences[a_stop], sentences[stop] - sentences[a_stop]
        wanted = np.maximum(1, np.minimum(target - a_length, b_length))  # lengths must not give random pairs away
        other_b, other_length = _random_segments(corpus, own, wanted, u[4], u[5])
        b, b_length = np.where(not_next, other_b, b), np.where(not_next, other_length, b_length)

        used = count > 1
        pairs = np.zeros(int(used.sum()), PAIR)
        values = {"a": a, "b": b, "a_length": a_length, "b_length": b_length, "not_next": not_next, "short": short}
        for name, value in values.items():
            pairs[name] = value[used]
        rounds.append(pairs)

        at = np.where(not_next, a_stop, stop)
        going = at < end
        at, end, own = at[going], end[going], own[going]
    pairs = np.concatenate(rounds)
    _truncate(pairs, room, rng)
    return pairs


def _random_segments(
    corpus: Corpus, own: np.ndarray, wanted: np.ndarray, u_document: np.ndarray, u_sentence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of about `wanted` tokens from a random sentence on, each of a random document but its own."""
    sentences, limits = corpus.sentences, corpus.documents
    other = (u_document * (len(limits) - 2)).astype(np.int64)
    other += other >= own
    first, end = limits[other], limits[other + 1]
    start = first + (u_sentence * (end - first)).astype(np.int64)
    stop = np.minimum(np.searchsorted(sentences, sentences[start] + wanted), end)
    return sentences[start], sentences[stop] - sentences[start]


def _truncate(pairs: np.ndarray, room: int, rng: np.random.Generator) -> None:
    """Shorten pairs to `room` tokens in place: token by token off the longer segment (B when equal), at either end."""
    a, b = pairs["a_length"].copy(), pairs["b_length"].copy()
    over = np.maximum(a + b - room, 0)
    # First the longer comes down to the shorter, then both in turn: a closed form of that loop
    level = np.minimum(over, np.abs(a - b))
    rest = over - level
    cut_b = np.where(b >= a, level, 0) + (rest + 1) // 2
    cut_a = np.where(b >= a, 0, level) + rest // 2
    for segment, cut in (("a", cut_a), ("b", cut_b)):
        pairs[segment] += rng.binomial(cut, 0.5)
        pairs[f"{segment}_length"] -= cut
    pairs["cut"] = over


# --- order --------------------------------------------------------------------------------------------------------


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
    corpus: Corpus, rules: PairRules, rows: int, *, packed: bool = False, start: Position | None = None
) -> Iterator[Plan]:
    """The endless stream of batches from `start` on, of `rows` rows each.

    A row holds one pair, and a batch pairs of similar length; or, if `packed`, a row holds as many pairs as fit. Every
    epoch has new pairs in a new order. The last batch of a block is filled up with rows from the block's beginning.
    """
    start = start or Position()
    epoch, block, first = start.epoch, start.block, start.batch
    documents = len(corpus.documents) - 1
    blocks = -(-documents // DOCUMENTS_A_BLOCK)
    while True:
        order = _random(rules.seed, epoch, blocks).permutation(documents)
        while block < blocks:
            rng = _random(rules.seed, epoch, block)
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


def lengths_of(pairs: np.ndarray) -> np.ndarray:
    """Tokens of each pair with [CLS] and both [SEP]."""
    return pairs["a_length"] + pairs["b_length"] + 3


def _group(pairs: np.ndarray, rows: int, max_length: int, rng: np.random.Generator) -> np.ndarray:
    """(batches, rows) of PAIR: shuffled, but with similar lengths in a batch."""
    count = -(-len(pairs) // rows)
    pairs = np.resize(pairs[rng.permutation(len(pairs))], count * rows)
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
    pairs = np.concatenate([pairs, *(pairs[places] for places in again)])
    row_of = np.concatenate([shuffled, *(np.full(len(places), count + i) for i, places in enumerate(again))])
    pairs["row"] = row_of % rows
    return np.split(pairs, np.searchsorted(row_of, np.arange(1, batches) * rows))


# --- batches ------------------------------------------------------------------------------------------------------


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
    def labels(self) -> Tensor:
        """(R, T): the masked labels in their places, -100 elsewhere, as `BertForPreTraining` takes them."""
        labels = torch.full_like(self.input_ids, IGNORED).flatten()
        labels[self.masked_positions] = self.masked_labels  # left-over positions are a [CLS], which has no label
        return labels.view_as(self.input_ids)

    @property
    def attention_mask(self) -> Tensor:
        """(R, T) of 0 and 1; of a packed batch (R, T, T), True where a token may attend to another."""
        return self.pair[:, :, None] == self.pair[:, None, :] if self.packed else (self.pair > 0).long()

    def model_inputs(self) -> dict[str, Tensor]:
        """The arguments of `BertForPreTraining` and of its like elsewhere.

        Raises ValueError for a packed batch, in which a row has several [CLS].
        """
        if self.packed:
            raise ValueError("a packed batch has several pairs in a row, a model's own forward takes one")
        names = ("input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> Batch:
        move: Callable[[Any], Any] = lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x  # noqa: E731
        return Batch(**{name: move(value) for name, value in vars(self).items()})


class BatchMaker:
    """Reads, pads or packs, and masks planned pairs. Widths are multiples of `pad_to`, or max_length if packed."""

    def __init__(self, corpus: Corpus, rules: PairRules, *, packed: bool = False, pad_to: int = 1) -> None:
        self.corpus, self.rules, self.packed, self.pad_to = corpus, rules, packed, pad_to
        pieces = corpus.vocab_file.read_text(encoding="utf-8").splitlines()
        self.pad, _, self.cls, self.sep, self.mask = special = [pieces.index(token) for token in SPECIAL_TOKENS]
        self.ordinary = np.setdiff1d(np.arange(len(pieces)), special)  # ids that may replace a token
        self.continues = np.array([piece.startswith("##") for piece in pieces])

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
            rng = _random(self.rules.seed, plan.epoch, plan.block, 1 + int(found["number"]))
            noise[(slice(None), *here)] = rng.random((3, self.rules.max_length))[:, :length]
        chosen = self._choose(ids, pair, maskable, noise[0])
        masked = np.where(chosen & (noise[1] < 0.8), self.mask, ids)
        other = self.ordinary[(noise[2] * len(self.ordinary)).astype(np.int64)]
        found = np.flatnonzero(chosen)
        expected = max(len(found), int(np.ceil(ids.size * self.rules.masked)))
        positions = np.zeros(-(-expected // 64) * 64, np.int64)
        labels = np.full(len(positions), IGNORED, np.int64)
        positions[: len(found)], labels[: len(found)] = found, ids.flat[found]
        arrays = {
            "input_ids": np.where(chosen & (noise[1] >= 0.9), other, masked),
            "token_type_ids": types,
            "position_ids": places,
            "pair": pair,
            "cls_positions": pairs["row"].astype(np.int64) * width + pairs["column"],
            "next_sentence_label": pairs["not_next"].astype(np.int64),
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


# --- report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataReport:
    """What the examples really are, counted over `pairs` of them; all others are shares from 0 to 1.

    random, short and truncated are shares of the pairs; cut is the share of tokens lost by truncation; padding of all
    places in a batch; chosen and unknown of the ordinary tokens; masked, replaced and kept of the chosen tokens.
    """

    pairs: int
    random: float
    short: float
    truncated: float
    cut: float
    padding: float
    chosen: float
    masked: float
    replaced: float
    kept: float

    def __str__(self) -> str:
        return (
            f"of {self.pairs:,} pairs {self.random:.1%} random, {self.short:.1%} short, {self.truncated:.1%} truncated "
            f"(losing {self.cut:.1%} of all tokens); {self.chosen:.2%} of tokens chosen: {self.masked:.1%} [MASK], "
            f"{self.replaced:.1%} another, {self.kept:.1%} kept; {self.padding:.2%} padding"
        )


def report(corpus: Corpus, rules: PairRules, rows: int, *, packed: bool = False, batches: int = 200) -> DataReport:
    """Make the first batches of a run and count what is in them."""
    maker, counts = BatchMaker(corpus, rules, packed=packed), dict.fromkeys(DataReport.__dataclass_fields__, 0)
    places = tokens = 0
    for plan, _ in zip(plan_batches(corpus, rules, rows, packed=packed), range(batches), strict=False):
        batch = maker[plan]
        found = batch.input_ids.flatten()[batch.masked_positions]
        real, masked = batch.masked_labels != IGNORED, found == maker.mask
        more = {
            "pairs": len(plan.pairs),
            "random": int(plan.pairs["not_next"].sum()),
            "short": int(plan.pairs["short"].sum()),
            "truncated": int((plan.pairs["cut"] > 0).sum()),
            "cut": int(plan.pairs["cut"].sum()),
            "padding": batch.pair.numel() - batch.tokens,
            "chosen": batch.masked,
            "masked": int((real & masked).sum()),
            "kept": int((real & (found == batch.masked_labels)).sum()),
        }
        counts = {name: count + more.get(name, 0) for name, count in counts.items()}
        places, tokens = places + batch.pair.numel(), tokens + batch.tokens - 3 * len(plan.pairs)
    pairs, chosen = counts["pairs"], counts["chosen"]
    counts["replaced"] = chosen - counts["masked"] - counts["kept"]
    of = {"pairs": 1, "random": pairs, "short": pairs, "truncated": pairs, "cut": tokens + counts["cut"]}
    of |= {"padding": places, "chosen": tokens, "masked": chosen, "replaced": chosen, "kept": chosen}
    return DataReport(**{name: count / of[name] if of[name] > 1 else count for name, count in counts.items()})

"""From a tokenized corpus to pretraining batches: sentence pairs, truncation, masks (section 3.1 and appendix A.2).

Everything random is drawn from a counter-based generator (Philox) whose counter says what is drawn: the pairs of a
block of documents from (seed, epoch, block), the masks of an example from (seed, epoch, block, example). A batch is
therefore the same whichever process makes it, and any batch can be made without those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minibert.training.corpus import SPECIAL_TOKENS, Corpus

IGNORED = -100  # the label of a token that takes no part in the loss
DOCUMENTS_A_BLOCK = 8192  # planned and shuffled together; documents are shuffled between blocks every epoch

PAD_TO = 64  # widths are multiples of this, so that torch.compile meets few shapes
PAIR = np.dtype(
    [("a", "i8"), ("b", "i8"), ("a_length", "i4"), ("b_length", "i4"), ("not_next", "i1"), ("number", "i4")]
)


@dataclass(frozen=True)
class PairRules:
    """How examples are made; the defaults are those of the paper.

    max_length counts [CLS] and both [SEP]. mask_tokens, of the chosen tokens: 80% become [MASK], 10% another token,
    10% stay. whole_words chooses words instead of pieces, until the same number of pieces is reached.
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
    random place of another random document, and then the rest is left for the next example. Differences: the
    length is drawn for each example instead of once a document, so that 10% of the examples are short and not a third; a
    single sentence left at the end makes a pair only when the coin says "random", so that both kinds stay equally frequent.

    All documents advance together, one example a round.
    """
    sentences, limits = corpus.sentences, corpus.documents
    room = rules.max_length - 3
    at, end, own = limits[documents].astype(np.int64), limits[documents + 1].astype(np.int64), documents
    rounds = []
    while len(at):
        u = rng.random((6, len(at)))
        target = np.where(u[0] < rules.short_probability, 2 + (u[1] * (room - 1)).astype(np.int64), room)
        stop = np.searchsorted(sentences, sentences[at] + target)
        stop = np.minimum(np.maximum(stop, at + 2), end)
        count = stop - at
        not_next = u[2] < rules.random_next_probability
        a_stop = at + 1 + (u[3] * (count - 1)).astype(np.int64)
        a, a_length = sentences[at], sentences[a_stop] - sentences[at]
        b, b_length = sentences[a_stop], sentences[stop] - sentences[a_stop]
        wanted = np.where(count > 1, np.minimum(target - a_length, b_length), target - a_length)
        other_b, other_length = _random_segments(corpus, own, np.maximum(wanted, 1), u[4], u[5])
        b, b_length = np.where(not_next, other_b, b), np.where(not_next, other_length, b_length)

        used = (count > 1) | not_next
        pairs = np.zeros(int(used.sum()), PAIR)
        values = {"a": a, "b": b, "a_length": a_length, "b_length": b_length, "not_next": not_next}
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


# --- order --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One batch, not made yet: its pairs, and the position at which the stream goes on after it."""

    pairs: np.ndarray
    epoch: int
    block: int
    after: Position


def plan_batches(corpus: Corpus, rules: PairRules, batch_size: int, start: Position = Position()) -> Iterator[Plan]:
    """The endless stream of batches from `start` on, `batch_size` pairs of similar length each.

    Every epoch has new pairs, in a new order. The last batch of a block is filled up with pairs from its beginning.
    """
    epoch, block, first = start.epoch, start.block, start.batch
    documents = len(corpus.documents) - 1
    blocks = -(-documents // DOCUMENTS_A_BLOCK)
    while True:
        order = _random(rules.seed, epoch, blocks).permutation(documents)
        while block < blocks:
            rng = _random(rules.seed, epoch, block)
            chosen = order[block * DOCUMENTS_A_BLOCK : (block + 1) * DOCUMENTS_A_BLOCK]
            pairs = plan_pairs(corpus, np.sort(chosen), rules, rng)
            pairs["number"] = np.arange(len(pairs))
            batches = _group(pairs, batch_size, rng)
            for index in range(first, len(batches)):
                last = index + 1 == len(batches)
                after = Position(epoch, block, index + 1) if not last else Position(epoch, block + 1, 0)
                yield Plan(batches[index], epoch, block, after)
            block, first = block + 1, 0
        epoch, block = epoch + 1, 0


def _group(pairs: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """(batches, batch_size) of PAIR: shuffled, but with similar lengths in a batch."""
    count = -(-len(pairs) // batch_size)
    pairs = np.resize(pairs[rng.permutation(len(pairs))], count * batch_size)
    lengths = pairs["a_length"] + pairs["b_length"]
    batches = pairs[np.argsort(lengths, kind="stable")].reshape(count, batch_size)
    return batches[rng.permutation(count)]


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """input_ids, token_type_ids and attention_mask (B, T); next_sentence_label (B,).

    The chosen tokens are listed: masked_positions (P,) in the flattened (B * T) batch, and masked_labels (P,), the ids
    that were there. P depends on B and T alone: what is left over has position 0 and label -100.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    next_sentence_label: Tensor
    masked_positions: Tensor
    masked_labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def labels(self) -> Tensor:
        """(B, T): the masked labels in their places, -100 elsewhere, as the model's forward takes them."""
        labels = torch.full((self.input_ids.numel(),), IGNORED)
        real = self.masked_labels != IGNORED
        labels[self.masked_positions[real]] = self.masked_labels[real]
        return labels.view_as(self.input_ids)


@dataclass
class BatchMaker:
    """Reads, pads and masks planned pairs. Plain data, so that worker processes can have one each."""

    corpus: Corpus
    rules: PairRules
    special: dict[str, int] = field(init=False)
    ordinary: np.ndarray = field(init=False)  # ids that may replace a token
    continues: np.ndarray = field(init=False)  # (V,) whether a piece goes on a word (##)

    def __post_init__(self) -> None:
        pieces = self.corpus.vocab_file.read_text(encoding="utf-8").splitlines()
        self.special = {token: pieces.index(token) for token in SPECIAL_TOKENS}
        self.ordinary = np.setdiff1d(np.arange(len(pieces)), list(self.special.values()))
        self.continues = np.array([piece.startswith("##") for piece in pieces])

    def __call__(self, plan: Plan) -> Batch:
        pairs, rows = plan.pairs, len(plan.pairs)
        lengths = pairs["a_length"] + pairs["b_length"] + 3
        width = min(-(-int(lengths.max()) // PAD_TO) * PAD_TO, self.rules.max_length)
        ids = np.full((rows, width), self.special["[PAD]"], np.int64)
        for row, pair in zip(ids, pairs.tolist(), strict=True):
            a, b, a_length, b_length, *_ = pair
            row[1 : 1 + a_length] = self.corpus.tokens(a, a_length)
            row[2 + a_length : 2 + a_length + b_length] = self.corpus.tokens(b, b_length)
        place = np.arange(ids.shape[1])
        row, second = np.arange(rows), pairs["a_length"] + 1
        ids[:, 0] = self.special["[CLS]"]
        ids[row, second] = ids[row, lengths - 1] = self.special["[SEP]"]
        real = place < lengths[:, None]
        maskable = real & (place > 0) & (place != second[:, None]) & (place != lengths[:, None] - 1)
        masked, positions, labels = self._mask(ids, maskable, plan)
        arrays = {
            "input_ids": masked,
            "token_type_ids": real & (place > second[:, None]),
            "attention_mask": real,
            "next_sentence_label": pairs["not_next"],
            "masked_positions": positions,
            "masked_labels": labels,
        }
        return Batch(**{name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})

    def _mask(self, ids: np.ndarray, maskable: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, length = ids.shape
        u = np.empty((3, rows, length))
        for row, number in enumerate(plan.pairs["number"].tolist()):
            # Drawn for the greatest length, so that an example does not depend on its neighbours' padding
            rng = _random(self.rules.seed + (1 << 64), plan.epoch, plan.block, number)
            u[:, row] = rng.random((3, self.rules.max_length))[:, :length]
        budget = number_masked(maskable.sum(1), self.rules.masked)
        chosen = self._choose(ids, np.where(maskable, u[0], 2.0), budget)
        found = np.flatnonzero(chosen)
        positions = np.zeros(rows * int(number_masked(length - 3, self.rules.masked)), np.int64)
        labels = np.full(len(positions), IGNORED)
        positions[: len(found)], labels[: len(found)] = found, ids.flat[found]
        other = self.ordinary[(u[2] * len(self.ordinary)).astype(np.int64)]
        ids = np.where(chosen & (u[1] < 0.8), self.special["[MASK]"], ids)
        return np.where(chosen & (u[1] >= 0.9), other, ids), positions, labels

    def _choose(self, ids: np.ndarray, score: np.ndarray, budget: np.ndarray) -> np.ndarray:
        if self.rules.whole_words:
            raise NotImplementedError
        ranks = np.empty(ids.shape, np.int64)
        np.put_along_axis(ranks, np.argsort(score, axis=1), np.arange(ids.shape[1])[None], axis=1)
        return ranks < budget[:, None]


def number_masked(tokens: np.ndarray, share: float) -> np.ndarray:
    """How many of `tokens` ordinary tokens are chosen in each example: at least one."""
    return np.maximum(1, np.rint(tokens * share)).astype(np.int64)

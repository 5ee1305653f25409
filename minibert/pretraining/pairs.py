"""From a tokenized corpus to sentence pairs: which segments, how long, cut where (section 3.1 and appendix A.2).

Everything random is drawn from a counter-based generator (Philox) whose counter says what is drawn: the pairs of a
block of documents from (seed, epoch, block), the masks of a pair from (seed, epoch, block, pair). A batch is therefore
the same whichever process makes it, and any batch can be made without those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minibert.pretraining.corpus import Corpus
from minibert.training.run import check_seed

# A planned example. a, b: where the segments start in the corpus; number: its place in its block; row, column: its
# place in the batch. cut: tokens lost by truncation. repeated: it only fills up the last batch of a block.
_INTEGERS = [("a_length", "i4"), ("b_length", "i4"), ("cut", "i4"), ("number", "i4"), ("row", "i4"), ("column", "i4")]
PAIR = np.dtype([("a", "i8"), ("b", "i8"), *_INTEGERS, ("not_next", "i1"), ("short", "i1"), ("repeated", "i1")])


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
        if type(self.max_length) is not int or self.max_length < 5:
            raise ValueError(f"max_length is {self.max_length}, but [CLS] a [SEP] b [SEP] needs at least 5")
        check_seed(self.seed)
        for name in ("short_probability", "random_next_probability", "masked"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be from 0 to 1")


def random_of(seed: int, *counter: int) -> np.random.Generator:
    """A generator whose numbers depend on the seed and on what is drawn, which up to three numbers say."""
    words = (*counter, 0, 0, 0)[:3]
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, *words]))


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


def lengths_of(pairs: np.ndarray) -> np.ndarray:
    """Tokens of each pair with [CLS] and both [SEP]."""
    return pairs["a_length"] + pairs["b_length"] + 3

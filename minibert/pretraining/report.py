"""What the examples of a run really are, counted."""

from __future__ import annotations

from dataclasses import dataclass

from minibert.heads import IGNORED
from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import Corpus
from minibert.pretraining.order import plan_batches
from minibert.pretraining.pairs import PairRules


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

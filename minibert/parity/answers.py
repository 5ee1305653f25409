"""What a model answers - a word, a label, a span, the nearest text - and whether an error can change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.parity.inputs import Case


@dataclass
class Answers:
    """Of one output, over all inputs: how many there are, how many are the same, and the margin.

    largest_error: between the two sides' scores. smallest_gap: between the reference's first and second choice. An
    answer whose error is below half of its gap cannot flip, which is a proof and no sample; `at_risk` names the others.
    """

    count: int = 0
    same: int = 0
    largest_error: float = 0.0
    smallest_gap: float = float("inf")
    at_risk: list[str] = field(default_factory=list)
    flipped: list[str] = field(default_factory=list)

    def add(self, case: str, actual: Tensor, expected: Tensor) -> None:
        """Scores (N, choices) of N questions on both sides."""
        if actual.shape != expected.shape:
            self.count, self.flipped = self.count + len(expected), [*self.flipped, f"{case}: another shape"]
            return
        if not expected.numel() or expected.shape[1] < 2:  # a span of one token
            return
        actual, expected = actual.double(), expected.double()
        possible = expected.isfinite()
        difference = torch.where(possible, actual - expected, 0.0).abs()
        error = torch.where(difference.isnan(), torch.inf, difference).amax(1)
        top = expected.topk(2).values
        gap = top[:, 0] - top[:, 1]
        same = actual.argmax(1) == expected.argmax(1)
        risky = (error > 0) & ~(error < gap / 2)
        self.count += len(same)
        self.same += int(same.sum())
        self.largest_error = max(self.largest_error, float(error.max()))
        self.smallest_gap = min(self.smallest_gap, float(gap.min()))
        self.at_risk += [f"{case}, {i}" for i in risky.nonzero().flatten().tolist()]
        self.flipped += [f"{case}, {i}" for i in (~same).nonzero().flatten().tolist()]

    @property
    def cannot_flip(self) -> bool:
        return not (self.at_risk or self.flipped)

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count, "same": self.same, "largest_error": self.largest_error,
            "half_smallest_gap": self.smallest_gap / 2, "cannot_flip": self.cannot_flip,
            "at_risk": self.at_risk[:20], "at_risk_count": len(self.at_risk), "flipped": self.flipped[:20],
        }  # fmt: skip


def asked_in(cases: Sequence[Case]) -> list[Case]:
    """The cases whose answers count: texts, if there are any, for random ids have no answer."""
    return [case for case in cases if case.is_text] or list(cases)


def scores(
    name: str, value: Tensor, case: Case, words: int | None = None, several_labels: bool = False
) -> Tensor | None:
    """The output `name` as (N, choices), a row a question; None for one that answers none.

    Words, of which there are `words`, are asked for where a text has a mask, and at every token that is no padding of
    what is no text; labels at every token that is no padding; next sentences of a text that has two.
    """
    if "logits" not in name or value.ndim < 2:
        return None
    real = case.real
    if name in ("start_logits", "end_logits"):
        return value if real is None or real.shape != value.shape else value.masked_fill(~real, -torch.inf)
    if value.ndim == 2 and real is not None and len(real) == len(value) and not case.is_text:
        value = value[real[:, 0]]  # no answer of a text that begins with padding
    if value.ndim == 3:
        asked = real
        if case.is_text and value.shape[-1] == words:
            asked = torch.zeros(value.shape[:2], dtype=torch.bool) if case.asked is None else case.asked
        value = value[asked] if asked is not None and asked.shape == value.shape[:2] else value.flatten(0, 1)
    elif name == "seq_relationship_logits" and case.is_text:
        value = value[case.inputs["token_type_ids"].any(1)]
    elif several_labels:
        value = torch.stack([torch.zeros_like(value), value], -1).flatten(0, 1)
    return value if value.shape[-1] > 1 else None


def pooled(states: Tensor, case: Case) -> Tensor:
    """The mean over real tokens, of length 1: (B, D)."""
    real = case.real
    weights = torch.ones(states.shape[:2]) if real is None else real
    return F.normalize((states.double() * weights[..., None]).sum(1), dim=1)


def nearest(vectors: list[Tensor]) -> Tensor:
    """Likeness of each text to every other one, (N, N): an encoder's answer is which is the nearest."""
    stacked = torch.cat(vectors)
    return (stacked @ stacked.T).fill_diagonal_(-torch.inf)

"""How far apart two tensors are: bits, largest and typical error, units in the last place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_KEPT = 65536  # absolute errors of a tensor that the percentile is taken from, evenly spread
# How much larger than the reference's an error to float64 may be: the multipliers of torch's own `same`
_MULTIPLIER, _HALF_MULTIPLIER = 2.0, 3.0


@dataclass
class Tally:
    """Differences of one output or step, over all inputs that are added.

    bits: equal to the last bit. max, p99, rms: of the absolute differences. scale: the root mean square of what is
    expected. ulp: `rms` in units in the last place of `dtype` at `scale`. broken: NaN, Inf or a shape on one side only.
    error, reference_error: root mean square error of either side against float64, None where there is no truth.
    """

    dtype: torch.dtype
    bits: bool = True
    max: float = 0.0
    broken: str | None = None
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("d", "x", "e", "r"), 0.0))
    _counts: dict[str, int] = field(default_factory=lambda: {"d": 0, "t": 0})
    _sample: list[Tensor] = field(default_factory=list)

    def add(self, actual: Tensor, expected: Tensor, truth: Tensor | None = None) -> None:
        """One more pair of tensors, with the float64 result if there is one."""
        if actual.shape != expected.shape:
            self._break(f"shape {tuple(actual.shape)} against {tuple(expected.shape)}")
            return
        a, b = actual.detach().double().flatten(), expected.detach().double().flatten()
        if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
            self.bits = False
        finite = a.isfinite() & b.isfinite()
        if not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
            self._break("NaN or Inf on one side only")
        a, b = a[finite], b[finite]
        difference = (a - b).abs()
        if not len(difference):
            return
        self.max = max(self.max, float(difference.max()))
        self._sums["d"] += float(difference.square().sum())
        self._sums["x"] += float(b.square().sum())
        self._counts["d"] += len(difference)
        self._sample.append(difference[:: max(1, len(difference) // _KEPT)])
        if truth is not None and truth.shape == actual.shape:
            exact = truth.detach().double().flatten()[finite]
            self._sums["e"] += float((a - exact).square().sum())
            self._sums["r"] += float((b - exact).square().sum())
            self._counts["t"] += len(difference)

    def _break(self, why: str) -> None:
        self.bits, self.max, self.broken = False, math.inf, self.broken or why

    def _root(self, name: str) -> float:
        return math.sqrt(self._sums[name] / max(1, self._counts["d" if name in "dx" else "t"]))

    @property
    def rms(self) -> float:
        return math.inf if self.broken else self._root("d")

    @property
    def scale(self) -> float:
        return self._root("x")

    @property
    def unit(self) -> float:
        """One unit in the last place of a number as large as `scale`."""
        return torch.finfo(self.dtype).eps * 2.0 ** math.floor(math.log2(self.scale)) if self.scale else 0.0

    @property
    def ulp(self) -> float:
        return 0.0 if not self.rms else self.rms / self.unit if self.unit else math.inf

    @property
    def p99(self) -> float:
        return float(torch.cat(self._sample).quantile(0.99)) if self._sample else 0.0

    @property
    def error(self) -> float | None:
        return self._root("e") if self._counts["t"] else None

    @property
    def reference_error(self) -> float | None:
        return self._root("r") if self._counts["t"] else None

    def is_exact(self, both_ways: bool = False) -> bool:
        """Whether the error to float64 is at most 2 times the reference's own (3 in half precision).

        Half a unit in the last place is no error: it is how far apart numbers are. `both_ways`: the reference may
        not be much further away either; so it must be where the only truth is this side's own float64 result, which
        would share its faults.
        """
        if self.broken or self.error is None:
            return self.bits and not self.broken
        multiplier = _HALF_MULTIPLIER if self.dtype.itemsize < 4 else _MULTIPLIER
        floor = self.unit / 2
        multiplier *= 1 + 4 / math.sqrt(self._counts["t"])  # of few numbers, a root mean square is a matter of luck
        is_near = self.error <= multiplier * max(self.reference_error, floor)
        return is_near and (not both_ways or self.reference_error <= 10 * max(self.error, 2 * floor))

    def to_dict(self) -> dict[str, Any]:
        signal = 20 * math.log10(self.scale / self.rms) if 0 < self.rms < math.inf and self.scale else None
        return {
            "bits": self.bits, "max": self.max, "p99": self.p99, "rms": self.rms, "ulp": self.ulp, "sqnr_db": signal,
            "max_hex": self.max.hex(), "broken": self.broken, "error": self.error,
            "reference_error": self.reference_error,
        }  # fmt: skip

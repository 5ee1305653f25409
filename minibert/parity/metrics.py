"""How far apart two tensors are: bits, largest and typical error, units in the last place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
_KEPT = 65536  # absolute errors of a tensor that the percentile is taken from, evenly spread
# How much larger than the reference's an error to float64 may be: the multipliers of torch's own `same`
_MULTIPLIER, _HALF_MULTIPLIER = 2.0, 3.0


class Tally:
    """Differences of one output or step, over all inputs that are added.

    bits: equal to the last bit. max, p99, rms: of the absolute differences. scale: the root mean square of what is
    expected. ulp: `rms` in units in the last place of `dtype` at `scale`. broken: NaN, Inf or a shape on one side only.
    error, reference_error: root mean square error of either side against float64, None where there is no truth.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.bits, self.max = dtype, True, 0.0
        self.broken: str | None = None
        self._count = self._measured = 0  # numbers, and those of which the truth is known
        self._squares = torch.zeros(4, dtype=torch.float64)  # of differences, of what is expected, of both errors
        self._sample = [torch.zeros(0, dtype=torch.float64)]

    def add(self, actual: Tensor, expected: Tensor, truth: Tensor | None = None) -> None:
        """One more pair of tensors, with the float64 result if there is one."""
        if actual.shape != expected.shape:
            self._break(f"shape {tuple(actual.shape)} against {tuple(expected.shape)}")
            return
        a, b = (x.detach().double().flatten() for x in (actual, expected))
        same, finite = (a == b) | (a.isnan() & b.isnan()), a.isfinite() & b.isfinite()
        self.bits = self.bits and bool(same.all())
        if not bool((same | finite).all()):
            self._break("NaN or Inf on one side only")
        a, b = a[finite], b[finite]
        difference = (a - b).abs()
        self._count += len(a)
        self._squares[:2] += torch.stack([difference.square().sum(), b.square().sum()])
        self._sample.append(difference[:: max(1, len(a) // _KEPT)])
        self.max = max(self.max, float(difference.amax())) if len(a) else self.max
        if truth is not None and truth.shape == actual.shape:
            exact = truth.detach().double().flatten()[finite]
            self._measured += len(a)
            self._squares[2:] += torch.stack([(a - exact).square().sum(), (b - exact).square().sum()])

    def _break(self, why: str) -> None:
        self.bits, self.max, self.broken = False, math.inf, self.broken or why

    @property
    def rms(self) -> float:
        return math.inf if self.broken else math.sqrt(self._squares[0] / max(1, self._count))

    @property
    def scale(self) -> float:
        return math.sqrt(self._squares[1] / max(1, self._count))

    @property
    def relative(self) -> float:
        """`rms` in parts of `scale`."""
        return self.rms / (self.scale or 1.0)

    @property
    def unit(self) -> float:
        """One unit in the last place of a number as large as `scale`."""
        return torch.finfo(self.dtype).eps * 2.0 ** math.floor(math.log2(self.scale)) if self.scale else 0.0

    @property
    def ulp(self) -> float:
        return 0.0 if not self.rms else self.rms / self.unit if self.unit else math.inf

    @property
    def p99(self) -> float:
        sample = torch.cat(self._sample)
        return float(sample.quantile(0.99)) if len(sample) else 0.0

    @property
    def error(self) -> float | None:
        return math.sqrt(self._squares[2] / self._measured) if self._measured else None

    @property
    def reference_error(self) -> float | None:
        return math.sqrt(self._squares[3] / self._measured) if self._measured else None

    def is_exact(self, both_ways: bool = False) -> bool:
        """Whether the error to float64 is at most 2 times the reference's own (3 in half precision).

        Half a unit in the last place is no error: it is how far apart numbers are. `both_ways`: the reference may
        not be much further away either; so it must be where the only truth is this side's own float64 result, which
        would share its faults.
        """
        error, reference_error = self.error, self.reference_error
        if self.broken or error is None or reference_error is None:
            return self.bits
        floor = self.unit / 2
        multiplier = _HALF_MULTIPLIER if self.dtype.itemsize < 4 else _MULTIPLIER
        multiplier *= 1 + 4 / math.sqrt(self._measured)  # of few numbers, a root mean square is a matter of luck
        is_near = error <= multiplier * max(reference_error, floor)
        return is_near and (not both_ways or reference_error <= 10 * max(error, 2 * floor))

    def to_dict(self) -> dict[str, Any]:
        names = ("bits", "max", "p99", "rms", "ulp", "broken", "error", "reference_error")
        return {name: getattr(self, name) for name in names}


def relative(actual: Tensor, expected: Tensor) -> float:
    """Root mean square difference in parts of what is expected; infinite for a shape or NaN on one side only."""
    tally = Tally(torch.float64)
    tally.add(actual, expected)
    return tally.relative


def named(result: Any) -> Outputs:
    """The results of a call that are numbers, but for the loss, by name; by position ("0", "1") without names."""
    if not hasattr(result, "items"):
        result = {str(i): x for i, x in enumerate(result if isinstance(result, tuple | list) else [result])}
    tensors = {key: torch.as_tensor(x).cpu() for key, x in result.items() if hasattr(x, "shape") and key != "loss"}
    return {key: value for key, value in tensors.items() if value.is_floating_point()}

"""What `optimize` chooses on this machine, measured on it: a plan with receipts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import Linear
from minibert.fast.onednn import PlainLinear, PrepackedLinear

_ROWS = 256  # tokens in a probe: enough to be bound by arithmetic, little enough to take milliseconds
_GAIN = 1.1  # a second copy of the weights must be faster by this much
_LOSS = 1.5  # an explicitly requested dtype is refused when slower than float32 by this much

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class Plan:
    """dtype: what products are computed in, "int8" too. linear: the kernel. receipts: what was decided, and why."""

    dtype: str
    linear: type[Linear]
    receipts: tuple[str, ...]

    @property
    def activations(self) -> torch.dtype:
        """What is stored between products."""
        return torch.float32 if self.dtype == "int8" else getattr(torch, self.dtype)

    def explain(self) -> str:
        return "\n".join(self.receipts)

    def __str__(self) -> str:
        return f"{self.dtype}, {self.linear.__name__}, {torch.get_num_threads()} threads"


def gflops(linear: Linear, x: Tensor, flops: float, repeats: int = 7) -> float:
    """10^9 operations a second, the best of a few calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        linear(x)
        times.append(time.perf_counter() - start)
    return flops / min(times) / 1e9


def probe(linear: type[Linear], dtype: torch.dtype, D: int, F: int) -> float:
    """Speed of one kernel on random numbers in the shape of a feed-forward layer, in GFLOP/s."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(F, D, generator=generator).to(dtype)
    x = torch.randn(_ROWS, D, generator=generator).to(dtype)
    return gflops(linear(weight, torch.zeros(F, dtype=dtype)), x, 2 * _ROWS * D * F)


def cpu_plan(model: BertPreTrainedModel, dtype: str | None) -> Plan:
    """Decide dtype and kernel. dtype: a name in NAMES, "int8", "auto", or None for the model's own.

    Raises ValueError, with the measured reason, for a dtype that this CPU only emulates slowly.
    """
    own, config = NAMES[model.dtype], model.config
    sizes = (config.hidden_size, config.intermediate_size)
    receipts = [_threads()]
    if (own if dtype is None else dtype) == "float64":
        return Plan("float64", PlainLinear, (*receipts, "float64: torch's own kernels, padding left out"))
    plain = probe(PlainLinear, torch.float32, *sizes)
    packed = probe(PrepackedLinear, torch.float32, *sizes) if torch.backends.mkldnn.is_available() else 0.0
    linear = PrepackedLinear if packed > _GAIN * plain else PlainLinear
    fp32 = max(plain, packed)
    receipts.append(f"float32: {packed:.0f} GFLOP/s on prepacked weights (oneDNN), {plain:.0f} as torch does it")
    wanted = own if dtype is None else dtype
    if wanted in ("float32",):
        return Plan("float32", linear, (*receipts, f"chosen: float32 on {linear.__name__}, {_why(dtype, own)}"))
    half = torch.float16 if wanted == "float16" else torch.bfloat16
    speed, obstacle = _half_speed(half, sizes)
    receipts.append(f"{NAMES[half]}: {obstacle or f'{speed:.0f} GFLOP/s'}")
    if wanted == "auto":
        faster = speed > _GAIN * fp32
        chosen = Plan("bfloat16", PrepackedLinear, ()) if faster else Plan("float32", linear, ())
        return Plan(chosen.dtype, chosen.linear, (*receipts, f"chosen: {chosen.dtype}, the fastest of the two"))
    if speed * _LOSS < fp32:
        reason = obstacle or f"{speed:.0f} GFLOP/s, but float32 reaches {fp32:.0f}"
        raise ValueError(f"dtype={wanted}: this CPU is slow at it ({reason}); use dtype='auto' or float32")
    return Plan(wanted, PrepackedLinear, (*receipts, f"chosen: {wanted} on PrepackedLinear, {_why(dtype, own)}"))


def _why(dtype: str | None, own: str) -> str:
    return f"the model's own dtype ({own})" if dtype is None else "as asked"


def _half_speed(dtype: torch.dtype, sizes: tuple[int, int]) -> tuple[float, str]:
    """GFLOP/s of a 16-bit dtype, or 0 and the reason. Asked of oneDNN first: an emulated product can take minutes."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    if not torch.backends.mkldnn.is_available():
        return 0.0, "torch is built without oneDNN"
    if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")():
        return 0.0, f"oneDNN has no {name} kernels for this CPU"
    return probe(PrepackedLinear, dtype, *sizes), ""


def _threads() -> str:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if threads <= cores else ": more than there are, torch.set_num_threads(fewer) will be faster"
    return f"threads: {threads} on {cores} cores{advice}"

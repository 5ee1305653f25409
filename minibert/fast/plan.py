"""What `optimize` chooses on this machine, measured on it: a plan with receipts."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import Kernels, Linear
from minibert.fast.onednn import PlainLinear, PrepackedLinear
from minibert.fast.quantize import Bfloat16Linear, Int8AfterGelu, Int8Linear

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

_ROWS = 256  # tokens at once: enough to be bound by arithmetic, few enough to stay in the cache
_ROUNDS = 7
_GAIN = 1.1  # a second copy of the weights must be faster by this much
_LOSS = 4  # a dtype is refused when slower than float32 by this much, again and again: emulation is far slower still
_TRIES = 3
_EMULATED = 20  # and is not even tried in full size when slower by this much in a small one: it could take minutes

Contenders = dict[str, tuple[type[Linear], torch.dtype]]


@dataclass(frozen=True)
class Plan:
    """dtype: what products are computed in, "int8" too. receipts: what was decided, and on what evidence."""

    dtype: str
    kernels: Kernels
    receipts: tuple[str, ...]

    def explain(self) -> str:
        return "\n".join(self.receipts)

    def __str__(self) -> str:
        return f"{self.dtype} on {self.kernels.linear.__name__}, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class Speeds:
    """GFLOP/s of one thread by name, "plain" being float32 as torch does it; for what is left out, the obstacle."""

    measured: dict[str, float]
    obstacles: dict[str, str]

    def of(self, name: str) -> float:
        return self.measured.get(name, 0.0)

    @property
    def float32(self) -> float:
        return max(self.of("plain"), self.of("float32"))

    def gains(self, name: str) -> bool:
        """Is this clearly faster than float32?"""
        return self.of(name) > _GAIN * self.float32

    def receipts(self) -> list[str]:
        lines = [f"{name}: {speed:.0f} GFLOP/s a thread" for name, speed in self.measured.items()]
        return lines + [f"{name}: {obstacle}" for name, obstacle in self.obstacles.items()]


def race(contenders: Contenders, D: int, F: int, rows: int) -> dict[str, float]:
    """Speed of each kernel on random numbers in the shape of a feed-forward layer: GFLOP/s, the best of a few rounds.

    In turn, so that whatever else the machine does meets all of them alike, and on one thread: threads that wait for
    each other on a busy machine make kernels of many steps look emulated.
    """
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(F, D, generator=generator), torch.randn(rows, D, generator=generator)
    runs = {name: (linear(weight.to(dtype), torch.zeros(F, dtype=dtype)), x.to(dtype))
            for name, (linear, dtype) in contenders.items()}  # fmt: skip
    best, threads = dict.fromkeys(contenders, float("inf")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_ROUNDS):
            for name, (layer, inputs) in runs.items():
                start = time.perf_counter()
                layer(inputs)
                best[name] = min(best[name], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {name: 2 * rows * D * F / seconds / 1e9 for name, seconds in best.items()}


def measure(names: list[str], D: int, F: int) -> Speeds:
    """The speeds of float32 and of the named dtypes on this CPU."""
    contenders: Contenders = {"plain": (PlainLinear, torch.float32)}
    if not torch.backends.mkldnn.is_available():
        return Speeds(race(contenders, D, F, _ROWS), dict.fromkeys(names, "torch is built without oneDNN"))
    contenders["float32"] = (PrepackedLinear, torch.float32)
    has = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
        "int8": lambda: True,
    }
    obstacles = {name: "oneDNN has no kernels for this CPU" for name in names if not has[name]()}
    for name in names:
        if name not in obstacles:
            kernel = (Int8Linear, torch.float32) if name == "int8" else (PrepackedLinear, getattr(torch, name))
            contenders[name] = kernel
    small = race(contenders, 128, 128, rows=8)
    for name in names:
        if small.get(name, 0.0) * _EMULATED < small["float32"] and name not in obstacles:
            obstacles[name] = f"emulated, {small['float32'] / small[name]:.0f} times slower than float32"
            del contenders[name]
    return Speeds(race(contenders, D, F, _ROWS), obstacles)


def cpu_plan(model: BertPreTrainedModel, dtype: str | None) -> Plan:
    """Decide dtype and kernels. dtype: a name in NAMES, "int8", "auto", or None for the model's own.

    Raises ValueError, with the measured reason, for a dtype that this CPU computes slowly.
    """
    wanted = NAMES[model.dtype] if dtype is None else dtype
    why = f"the model's own dtype ({wanted})" if dtype is None else "as asked"
    if wanted == "float64":
        return Plan(wanted, _all(torch.float64, PlainLinear), (_threads(), f"chosen: float64 as torch does it, {why}"))
    others = {"auto": ["bfloat16"], "int8": ["int8", "bfloat16"], "float32": []}.get(wanted, [wanted])
    for _ in range(_TRIES):  # other work on the machine makes everything look slow at times
        speeds = measure(others, model.config.hidden_size, model.config.intermediate_size)
        if wanted in ("auto", "float32") or speeds.of(wanted) > speeds.float32:
            break
    if wanted == "auto":
        wanted, why = "bfloat16" if speeds.gains("bfloat16") else "float32", "the fastest of these"
    elif speeds.of(wanted) * _LOSS < speeds.float32 and wanted != "float32":
        reason = speeds.obstacles.get(wanted, f"{speeds.of(wanted):.0f} GFLOP/s, float32 has {speeds.float32:.0f}")
        raise ValueError(f"dtype={wanted!r}: this CPU is slow at it ({reason}); use 'auto' or 'float32'")
    kernels = _kernels(wanted, speeds)
    if kernels.careful is not kernels.linear:
        why += f"; values and heads on {kernels.careful.__name__}, attention in {NAMES[kernels.attention]}"
    chosen = f"chosen: {wanted} on {kernels.linear.__name__}, {why}"
    return Plan(wanted, kernels, (_threads(), *speeds.receipts(), chosen))


def _kernels(name: str, speeds: Speeds) -> Kernels:
    float32 = PrepackedLinear if speeds.of("float32") > _GAIN * speeds.of("plain") else PlainLinear
    if name == "int8":
        careful = Bfloat16Linear if speeds.gains("bfloat16") else float32
        attention = torch.bfloat16 if careful is Bfloat16Linear else torch.float32
        return Kernels(torch.float32, Int8Linear, Int8AfterGelu, careful, attention, rows=_ROWS)
    return _all(torch.float32, float32) if name == "float32" else _all(getattr(torch, name), PrepackedLinear)


def _all(dtype: torch.dtype, linear: type[Linear]) -> Kernels:
    return Kernels(dtype, linear, linear, linear, dtype)


def _threads() -> str:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if threads <= cores else ": more than there are, torch.set_num_threads(fewer) will be faster"
    return f"threads: {threads} on {cores} cores{advice}"

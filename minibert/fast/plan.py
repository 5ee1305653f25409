"""What `optimize` chooses on this machine, measured on it: a plan with receipts."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product

import torch
from torch import Tensor

from minibert.activations import Activation
from minibert.base import BertPreTrainedModel
from minibert.fast import compiled, compiler, panels
from minibert.fast.encoder import CpuEngine, Kernels, Linear
from minibert.fast.graph import shape_of
from minibert.fast.onednn import PlainLinear, PrepackedLinear, UnfusedLinear
from minibert.fast.optimized import OptimizedModel
from minibert.fast.panels import PanelBfloat16Linear, PanelInt8AfterGelu, PanelInt8Linear, PanelLinear
from minibert.fast.quantize import (
    Bfloat16Linear,
    FbgemmInt8AfterGelu,
    FbgemmInt8Linear,
    Int8AfterGelu,
    Int8Linear,
    weight_levels,
)
from minibert.fast.race import race, wall_clock

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}

_ROWS = 256  # tokens at once: enough to be bound by arithmetic, few enough to stay in the cache
_SHORT, _MANY = 16, 1024  # tokens of a short text, and of a full batch
_SMALLEST = (384, 1536)  # what is measured is no smaller: threads that wait for each other would tell nothing
_GAIN = 1.1  # a second copy of the weights must be faster by this much
_LOSS = 4  # a dtype is refused when slower than float32 by this much, again and again: emulation is far slower still
_TRIES = 3
_EMULATED = 20  # and is not even tried in full size when slower by this much in a small one: it could take minutes
_FBGEMM = "int8 by FBGEMM"  # the other library that torch has for products of bytes, operation by operation
# Our own kernels, where they are compiled, by dtype
_PANELS, _HALF_PANELS, _BYTES_PANELS = (f"{dtype} by panels" for dtype in ("float32", "bfloat16", "int8"))
_INT8: dict[str, type[Int8Linear]] = {"int8": Int8Linear, _FBGEMM: FbgemmInt8Linear, _BYTES_PANELS: PanelInt8Linear}
# What takes and gives float32
_FLOAT32: dict[str, type[Linear]] = {**_INT8, _PANELS: PanelLinear, _HALF_PANELS: PanelBfloat16Linear}
_AFTER_GELU: dict[type[Linear], type[Linear]] = {
    Int8Linear: Int8AfterGelu,
    FbgemmInt8Linear: FbgemmInt8AfterGelu,
    PanelInt8Linear: PanelInt8AfterGelu,
}
# oneDNN's in the place of others: where our own are not compiled, and where a graph is made of them
_WITHOUT_PANELS = {
    PanelLinear: UnfusedLinear,
    PanelBfloat16Linear: UnfusedLinear,  # in float32
    PanelInt8Linear: Int8Linear,
    PanelInt8AfterGelu: Int8AfterGelu,
}
_IN_A_GRAPH = {PlainLinear: UnfusedLinear, FbgemmInt8Linear: Int8Linear, FbgemmInt8AfterGelu: Int8AfterGelu}
# What a product may be off by, in units of its largest value
_ALLOWED = {
    "plain": 0.0,
    **dict.fromkeys(("float32", _PANELS), 1e-4),
    **dict.fromkeys(("bfloat16", _HALF_PANELS), 0.03),
    "float16": 0.01,
    **dict.fromkeys(_INT8, 0.1),
}
_lock = threading.Lock()


@dataclass(frozen=True)
class CpuPlan:
    """dtype: what products are computed in, "int8" too. compile: run a compiled pass, True: and make it if there is
    none, None: if there is one. receipts: what was decided, and on what evidence.
    """

    dtype: str
    kernels: Kernels
    receipts: tuple[str, ...]
    compile: bool | None = False

    @torch.no_grad()
    def build(self, model: BertPreTrainedModel) -> OptimizedModel:
        """The optimized model."""
        head = getattr(getattr(model, "cls", None), "predictions", None)
        engine = CpuEngine(model.base_model, head, _to_be_had(self.kernels))
        notes = f"compiled: {self._compiled(model, engine)}"
        memory = f"memory: {engine.nbytes / 2**20:.0f} MiB for the second copy of the weights"
        return OptimizedModel(model, engine, self, (memory, notes))

    def __str__(self) -> str:
        return f"{self.dtype} on {self.kernels.linear.__name__}, {torch.get_num_threads()} threads"

    def _compiled(self, model: BertPreTrainedModel, engine: CpuEngine) -> str:
        """Give the engine a compiled pass, where there is one to be had, and say so."""
        if self.compile is False:
            return "no, as asked"
        # Where other products are the fastest, operation by operation, a graph would still have oneDNN's
        kernels = engine.kernels
        if self.dtype in ("float32", "int8"):
            kernels = _exchanged(kernels, _IN_A_GRAPH)
        shape = shape_of(model.base_model, kernels)
        if isinstance(shape, str):
            return f"no, {shape}"
        if self.compile and kernels != engine.kernels:
            return f"no, {panels.load() or 'float32 by oneDNN cannot be had here'}"
        try:
            package = compiled.make(shape, self.receipts) if self.compile else compiled.find(shape)
        except compiler.CannotCompileError as why:
            return f"no, {why}"
        if package is None or kernels != engine.kernels:
            seconds, where = compiled.expected_seconds(shape), compiler.directory()
            return (
                "no, operation by operation; optimize(model, compile=True) makes it one graph, in about "
                f"{seconds} s, once for all models of this shape, and keeps it in {where}"
            )
        wrong = compiled.attach(engine, package, shape, self.dtype)
        made = f"one graph, attention in float32, made in {package.seconds:.0f} s, from {package.path}"
        return f"no, {wrong}" if wrong else made


@dataclass(frozen=True)
class Speeds:
    """GFLOP/s by name, "plain" being float32 as torch does it; for what is left out, the obstacle. unfused: the dtypes
    in which a GELU after oneDNN's product is faster than one within it. against: for kernels that are not oneDNN's, how
    many times they are as fast as its own in the same dtype, by the number of tokens.
    """

    measured: dict[str, float]
    obstacles: dict[str, str]
    unfused: frozenset[str] = frozenset()
    against: dict[str, dict[int, float]] = field(default_factory=dict)

    def of(self, dtype: str) -> float:
        """Of the fastest kernels for a dtype."""
        return max((speed for name, speed in self.measured.items() if _dtype_of(name) == dtype), default=0.0)

    @property
    def float32(self) -> float:
        return max(self.of("plain"), self.of("float32"))

    def gains(self, dtype: str) -> bool:
        """Is this clearly faster than float32?"""
        return self.of(dtype) > _GAIN * self.float32

    def fastest(self, onednn: str, other: str) -> str:
        """Which of two kernels to take: what is gained on short texts must be more than is lost on full batches."""
        if onednn in self.measured and other in self.measured:
            return other if math.prod(self.against[other].values()) > 1 else onednn
        return other if other in self.measured else onednn

    def receipts(self) -> list[str]:
        lines = [f"{name}: {speed:.0f} GFLOP/s" for name, speed in self.measured.items()]
        for name, ratios in self.against.items():
            times = ", ".join(f"{ratio:.2f} on {rows} tokens" for rows, ratio in ratios.items())
            lines.append(f"{name} against oneDNN: {times}")
        lines += [f"{name}: oneDNN's GELU is slower than a pass of its own" for name in sorted(self.unfused)]
        return lines + [f"{name}: {obstacle}" for name, obstacle in self.obstacles.items()]


def _dtype_of(name: str) -> str:
    """What kernels of a name compute in, which is also the name of oneDNN's."""
    return name.split(" by ")[0]


def measure(names: list[str], D: int, F: int, attempt: int = 0) -> Speeds:
    """The speeds of float32 and of the named dtypes on this CPU, in a feed-forward layer's first product.

    Measured once in a process for each shape and number of threads; another attempt measures again.
    """
    shape = max(D, _SMALLEST[0]), max(F, _SMALLEST[1])
    with _lock:
        return _measured(tuple(names), *shape, torch.get_num_threads(), attempt)


@cache
@torch.no_grad()
def _measured(names: tuple[str, ...], D: int, F: int, threads: int, attempt: int) -> Speeds:
    kernels: dict[str, tuple[type[Linear], torch.dtype]] = {"plain": (PlainLinear, torch.float32)}
    obstacles: dict[str, str] = {}
    for name in ("float32", *names):
        obstacle = _obstacle(name)
        if obstacle:
            obstacles[name] = obstacle
        elif name in _FLOAT32:
            kernels[name] = (_FLOAT32[name], torch.float32)
        else:
            kernels[name] = (PrepackedLinear, getattr(torch, name))
    small, wrong = _race(kernels, 128, 128, rows=8)
    for name in [name for name in kernels if name != "plain"]:
        if name in wrong:
            obstacles[name] = wrong[name]
        elif small[name] > _EMULATED * small["plain"]:
            obstacles[name] = f"emulated, {small[name] / small['plain']:.0f} times slower than float32"
        else:
            continue
        del kernels[name]
    seconds, wrong = _race(kernels, D, F, _ROWS)
    unfused = set()
    for name in [name for name in seconds if kernels[name][0] is PrepackedLinear]:
        dtype = kernels[name][1]
        # The product alone has just run; with GELU within it, it may still be slow, wrong or not to be had
        with_gelu, _ = _race({"unfused": (UnfusedLinear, dtype), name: (PrepackedLinear, dtype)}, D, F, _ROWS, "gelu")
        if with_gelu["unfused"] < with_gelu.get(name, float("inf")):
            unfused.add(name)
    against = {}
    onednn_kinds = {"float32": PrepackedLinear, "bfloat16": Bfloat16Linear, "int8": Int8Linear}
    for name in (_PANELS, _HALF_PANELS, _FBGEMM, _BYTES_PANELS):
        onednn = _dtype_of(name)
        if {name, onednn} <= seconds.keys():
            both = {onednn: onednn_kinds[onednn], name: kernels[name][0]}
            against[name] = {rows: _gain(both, D, F, rows) for rows in (_SHORT, _MANY)}
    speeds = {name: 2 * _ROWS * D * F / s / 1e9 for name, s in seconds.items()}
    return Speeds(speeds, obstacles | wrong, frozenset(unfused), against)


def _obstacle(name: str) -> str:
    """Why this build of torch or this CPU cannot compute in a dtype by oneDNN, or by other kernels, or ""."""
    if name in (_PANELS, _HALF_PANELS, _BYTES_PANELS):
        missing = panels.load()
    elif name == _FBGEMM:
        has = "fbgemm" in torch.backends.quantized.supported_engines
        missing = "" if has else "torch is built without FBGEMM"
    else:
        missing = "" if torch.backends.mkldnn.is_available() else "torch is built without oneDNN"
    if missing:
        return missing
    try:  # these operations are torch's own affair, and may change or go with any version
        if name in ("bfloat16", "float16"):
            short = {"bfloat16": "bf16", "float16": "fp16"}[name]
            if not getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")():
                return "oneDNN has no kernels for this CPU"
        if name in _INT8 and not weight_levels(_INT8[name]):
            return "this CPU's products of bytes saturate"
    except Exception as failure:
        return f"not as this version of torch has it ({type(failure).__name__}: {str(failure).splitlines()[0]:.80})"
    return ""


def _race(
    kernels: dict[str, tuple[type[Linear], torch.dtype]], D: int, F: int, rows: int, activation: str = ""
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each kernel on random numbers, and for the others what is wrong with them."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(F, D, generator=generator), torch.randn(rows, D, generator=generator)
    candidates: dict[str, Callable[[], Tensor]] = {}
    wrong = {}
    for name, (linear, dtype) in kernels.items():
        try:
            after = Activation(activation) if activation else None
            layer = linear(weight.to(dtype), torch.zeros(F, dtype=dtype), after)
        except Exception as failure:
            wrong[name] = f"not as this version of torch has it ({type(failure).__name__})"
            continue
        candidates[name] = partial(layer, x.to(dtype))
    seconds, also = race(candidates, _ALLOWED, wall_clock)
    return seconds, wrong | also


def _gain(kinds: dict[str, type[Linear]], D: int, F: int, rows: int) -> float:
    """How many times the second kind is as fast as the first in a feed-forward part, on so many tokens."""
    generator, layers = torch.Generator().manual_seed(0), {name: [] for name in kinds}
    for inputs, outputs in ((D, F), (F, D)):
        x = torch.randn(rows, inputs, generator=generator)
        weight = torch.randn(outputs, inputs, generator=generator)
        for name, kind in kinds.items():
            layers[name].append(partial(kind(weight, torch.zeros(outputs)), x))
    runs = {name: lambda both=both: torch.cat([layer() for layer in both], 1) for name, both in layers.items()}
    seconds, _ = race(runs, _ALLOWED | {next(iter(kinds)): 0.0}, wall_clock)
    first, second = kinds
    return seconds[first] / seconds.get(second, float("inf"))


def cpu_plan(model: BertPreTrainedModel, dtype: str | None, compile: bool | None = False) -> CpuPlan:
    """Decide dtype and kernels. dtype: a name in NAMES, "int8", "auto", or None for the model's own. compile: see
    CpuPlan; what was compiled before was measured then, and is not measured again.

    Raises ValueError, with the measured reason, for a dtype that this CPU computes slowly.
    """
    wanted = NAMES[model.dtype] if dtype is None else dtype
    why = f"the model's own dtype ({wanted})" if dtype is None else "as asked"
    if wanted == "float64":
        receipts = (_threads(), f"chosen: float64 as torch does it, {why}")
        return CpuPlan(wanted, _all(torch.float64, PlainLinear), receipts, compile)
    if compile is not False:
        for kernels in _compilable(wanted):
            shape = shape_of(model.base_model, kernels)
            package = None if isinstance(shape, str) else compiled.find(shape)
            # Our own kernels are loaded only where there is a pass to run them
            if package is not None and not panels.load():
                return CpuPlan(wanted, kernels, package.measured, compile)
    others = {"auto": ["bfloat16"], "int8": ["int8", _FBGEMM, "bfloat16"], "float32": []}.get(wanted, [wanted])
    without_panels = panels.make() if compile else ""
    if compile and not without_panels:
        own = {"int8": [_PANELS, _BYTES_PANELS], "bfloat16": [_HALF_PANELS], "float16": []}
        others += own.get(wanted, [_PANELS])
    for attempt in range(_TRIES):  # other work on the machine makes everything look slow at times
        speeds = measure(others, model.config.hidden_size, model.config.intermediate_size, attempt)
        if wanted in ("auto", "float32") or speeds.of(wanted) > speeds.float32:
            break
    if wanted == "auto":
        wanted, why = "bfloat16" if speeds.gains("bfloat16") else "float32", "the fastest of these"
    elif speeds.of(wanted) * _LOSS < speeds.float32 and wanted != "float32":
        reason = speeds.obstacles.get(wanted, f"{speeds.of(wanted):.0f} GFLOP/s, float32 has {speeds.float32:.0f}")
        reason += f"; our own kernels: {without_panels}" if without_panels else ""
        compiled_once = "compile=True (minibert optimize MODEL --dtype bfloat16), "
        instead = (compiled_once if wanted == "bfloat16" and not compile else "") + "'auto' or 'float32'"
        raise ValueError(f"dtype={wanted!r}: this CPU is slow at it ({reason}); use {instead}")
    kernels = _kernels(wanted, speeds, bool(compile) and not without_panels)
    if kernels.careful is not kernels.linear:
        why += f"; values and heads on {kernels.careful.__name__}, attention in {NAMES[kernels.attention]}"
    if wanted == "int8" and weight_levels(kernels.linear) < 127:
        why += "; weights of 7 bits, since this CPU adds products of bytes in 16 bits, which saturates"
    chosen = f"chosen: {wanted} on {kernels.linear.__name__}, {why}"
    missing = (f"our own kernels: {without_panels}",) if without_panels else ()
    return CpuPlan(wanted, kernels, (_threads(), *speeds.receipts(), *missing, chosen), compile)


def _kernels(name: str, speeds: Speeds, compiles: bool) -> Kernels:
    """The kernels for a dtype. compiles: of those that a graph can have, where there are any."""
    float32: type[Linear] = PlainLinear
    if speeds.of("float32") > (0.0 if compiles else _GAIN * speeds.of("plain")):
        by_panels = speeds.fastest("float32", _PANELS) == _PANELS
        float32 = PanelLinear if by_panels else _prepacked("float32", speeds)
    if name == "int8":
        bfloat16 = speeds.gains("bfloat16") and "bfloat16" not in speeds.obstacles
        other = _BYTES_PANELS if compiles and {"int8", _BYTES_PANELS} & speeds.measured.keys() else _FBGEMM
        return _int8(_INT8[speeds.fastest("int8", other)], Bfloat16Linear if bfloat16 else float32)
    if name == "float32":
        return _all(torch.float32, float32)
    if name == "bfloat16" and speeds.fastest(name, _HALF_PANELS) == _HALF_PANELS:
        return _all(torch.float32, PanelBfloat16Linear)
    return _all(getattr(torch, name), PlainLinear if name in speeds.obstacles else _prepacked(name, speeds))


def _prepacked(name: str, speeds: Speeds) -> type[Linear]:
    return UnfusedLinear if name in speeds.unfused else PrepackedLinear


def _compilable(name: str) -> list[Kernels]:
    """The kernels that a compiled pass in a dtype may have."""
    onednn = [PrepackedLinear, UnfusedLinear]
    if name == "int8":
        careful = [Bfloat16Linear, PanelLinear, *onednn]
        return [_int8(*each) for each in product((PanelInt8Linear, Int8Linear), careful)]
    if name == "auto":
        return []
    own = {"float32": [PanelLinear], "bfloat16": [PanelBfloat16Linear]}.get(name, [])
    others = [_all(getattr(torch, name), linear) for linear in onednn]
    return [_all(torch.float32, linear) for linear in own] + others


def _to_be_had(kernels: Kernels) -> Kernels:
    """The same by oneDNN where our own kernels are not compiled: a plan may be another machine's."""
    others = _exchanged(kernels, _WITHOUT_PANELS)
    return others if others != kernels and panels.load() else kernels


def _exchanged(kernels: Kernels, others: Mapping[type[Linear], type[Linear]]) -> Kernels:
    """The same with other kinds of products in the place of some."""
    kinds = {name: getattr(kernels, name) for name in ("linear", "after_gelu", "careful")}
    return replace(kernels, **{name: others.get(kind, kind) for name, kind in kinds.items()})


def _int8(linear: type[Linear], careful: type[Linear]) -> Kernels:
    attention = torch.bfloat16 if careful is Bfloat16Linear else torch.float32
    return Kernels(torch.float32, linear, _AFTER_GELU[linear], careful, attention, rows=_ROWS)


def _all(dtype: torch.dtype, linear: type[Linear]) -> Kernels:
    return Kernels(dtype, linear, linear, linear, dtype)


def _threads() -> str:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if threads <= cores else ": more than there are, torch.set_num_threads(fewer) will be faster"
    return f"threads: {threads} on {cores} cores{advice}"

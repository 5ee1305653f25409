"""Linear layers in float32, with weights in bfloat16, and in bytes, and attention, by kernels of our own, panels.cpp.

For a short text a product is as fast as its weights come from memory. oneDNN and MKL, whose kernels are made for many
rows, read them at 8 to 11 GB/s where memory gives 20 and more (12 to 16 rows, two cores of a Zen 3); and for bytes
oneDNN has no kernels below VNNI that are fast on few rows. Attention over packed texts is one operation: with torch's,
queries, keys and values are spread over a padded batch and gathered back, a dozen passes over memory.

The library lies beside the compiled passes, under a name made of all that it depends on, and is made where a pass is.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from minibert.fast.compiler import CannotCompileError, compilers, directory, fingerprint, hash_of, once, run
from minibert.fast.onednn import POST_OPS, UnfusedLinear
from minibert.fast.quantize import Int8AfterGelu, Int8Linear
from minibert.weights.files import write

SOURCE = "panels.cpp"
_SECONDS = 15  # that compiling takes on two cores, about
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fopenmp", "-shared", "-fPIC", "-w")
_lock = threading.Lock()


class PanelLinear(UnfusedLinear):
    """y = activation(x W^T + b), or x W^T + b + residual, for x (N, in) of float32, once `load` found no obstacle."""

    weights = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        super().__init__(weight, bias, activation)
        self.gelu = activation is not None and is_gelu(activation.name)
        if self.gelu:
            self.activation = None  # the kernel's work
        self.nbytes = weight.numel() * self.weights.itemsize

    def _lay_out(self, weight: Tensor, bias: Tensor) -> None:
        self.outputs = len(weight)
        self.weight, self.bias = laid_out(weight.detach().to(self.weights), bias.detach())

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.minibert_panels.linear.default(x, self.weight, self.bias, self.outputs, self.gelu)


class PanelBfloat16Linear(PanelLinear):
    """The same with weights rounded to bfloat16, half as much to read; x, products and sums stay in float32."""

    weights = torch.bfloat16


class PanelInt8Linear(Int8Linear):
    """Int8Linear by our own kernel."""

    def __init__(
        self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None, magnitudes: Tensor | None = None
    ):
        super().__init__(weight, bias, activation, magnitudes)
        self.bias = _filled_up(self.bias, self.weight)
        self.gelu = activation is not None and is_gelu(activation.name)
        if self.gelu:
            self.activation = None  # the kernel's work

    def _pack(self, rounded: Tensor) -> None:
        self.outputs = len(rounded)
        self.weight = torch.ops.minibert_panels.lay_out_bytes(rounded)
        offsets = self.centre * rounded.sum(1, dtype=torch.int32)
        self.offsets, self.scale = (_filled_up(x, self.weight) for x in (offsets, self.scale))

    def _scaled(self, steps: Tensor, scale: Tensor) -> Tensor:
        return self._linear(self._rounded(steps), scale, self.bias, self.gelu)

    def multiply_bytes(self, rounded: Tensor) -> Tensor:
        return self._linear(rounded, torch.ones(len(rounded), 1), torch.zeros(len(self.scale)), False)

    def _linear(self, rounded: Tensor, steps: Tensor, bias: Tensor, gelu: bool) -> Tensor:
        return torch.ops.minibert_panels.linear_of_bytes.default(
            rounded, steps, self.weight, self.offsets, self.scale, bias, self.outputs, gelu
        )


class PanelInt8AfterGelu(Int8AfterGelu, PanelInt8Linear):
    """Int8AfterGelu by our own kernel."""


def is_gelu(activation: str) -> bool:
    """Whether an activation, by name, is the one that `linear` can compute too."""
    return POST_OPS.get(activation) == ("gelu", "none")


def laid_out(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) and (out,) -> (P, in, W) and (P * W,): P panels of W outputs, filled up with zeros."""
    panels = torch.ops.minibert_panels.lay_out(weight)
    return panels, _filled_up(bias, panels)


def _filled_up(x: Tensor, panels: Tensor) -> Tensor:
    """(out,) -> (P * W,), zeros behind what there is."""
    missing = panels.shape[0] * panels.shape[2] - len(x)
    return functional.pad(x, (0, missing)) if missing else x


def load() -> str:
    """Make the kernel known to torch, if it is compiled: why it is not to be had, or ""."""
    with _lock:
        known = hasattr(torch.ops.minibert_panels, "linear")  # from whatever directory
        return _loaded() if known or _is_whole(_path()) else "it is not compiled"


def make() -> str:
    """The same, compiled if it is not; of several processes at once, one compiles."""
    path = _path()
    try:
        once(path.stem, "products", _SECONDS, lambda: _is_whole(path), lambda: _compile(path))
    except CannotCompileError as failure:
        return str(failure)
    return load()


def record() -> None:
    """Say what the kernel returns for tensors without numbers, as compiling a pass needs it."""

    @torch.library.register_fake("minibert_panels::linear")
    def _(x: Tensor, panels: Tensor, bias: Tensor, outputs: int, gelu: bool) -> Tensor:
        return bias.new_empty(x.shape[0], outputs)

    @torch.library.register_fake("minibert_panels::linear_of_bytes")
    def _(
        x: Tensor,
        steps: Tensor,
        panels: Tensor,
        offsets: Tensor,
        scales: Tensor,
        bias: Tensor,
        outputs: int,
        gelu: bool,
    ) -> Tensor:
        return scales.new_empty(x.shape[0], outputs)

    @torch.library.register_fake("minibert_panels::attention")
    def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, places: Tensor | None, heads: int) -> Tensor:
        return query.new_empty(query.shape)


@cache
def _loaded() -> str:
    try:
        torch.ops.load_library(_path())
        panels, biases = laid_out(torch.ones(3, 2), torch.arange(3.0))
        result = torch.ops.minibert_panels.linear(torch.ones(1, 2), panels, biases, 3, False)
    except Exception as failure:  # whatever a library may do that was made for another torch
        return f"it cannot be loaded ({type(failure).__name__}: {str(failure).splitlines()[0]:.120})"
    return "" if result.tolist() == [[2.0, 3.0, 4.0]] else "it computes wrongly"


@cache
def _name() -> str:
    return fingerprint("panels", hash_of(SOURCE, "panels.py"))


def _path() -> Path:
    return directory() / f"{_name()}.so"


def _is_whole(path: Path) -> bool:
    """Whether the library is there, and what was written: loading a broken one can end the process."""
    try:
        return path.with_suffix(".sha256").read_text("utf-8") == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _compile(path: Path) -> bool:
    chosen, home = next(filter(shutil.which, compilers())), Path(torch.__file__).parent
    places = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}", f"-L{home / 'lib'}"]
    with tempfile.TemporaryDirectory(prefix="minibert-") as work:
        library, source = Path(work, "panels.so"), Path(__file__).with_name(SOURCE)
        command = [chosen, *_FLAGS, str(source), *places, "-ltorch_cpu", "-lc10", "-o", str(library)]
        content = run(command, library)
    write(path, content)
    write(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest())
    return True

"""Compiled passes: kept on disk, made once for a shape and a CPU, shared by processes and by models of one shape.

A package holds code and no weights. It lies in `$MINIBERT_CACHE`, else `$XDG_CACHE_HOME/minibert`, else
`~/.cache/minibert`, under a name made of all that it depends on: the shape, the CPU, torch's version, this code.
Beside it lies a note of its hash, so that a broken package is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minibert.fast import panels
from minibert.fast.compiler import CannotCompileError, directory, fingerprint, hash_of, once, run
from minibert.fast.encoder import CpuEngine
from minibert.fast.graph import Shape, weights
from minibert.fast.padding import Batch, pack_rows, rounded, up_to
from minibert.weights.files import replacing, write

_RUNNERS = 2  # calls that may run at the same time
_TOKENS = 4096  # at once: beyond, what a layer works on has long left the caches
# How far a compiled pass may be from the same operations one by one, in units of the largest value
_ALLOWED = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.02, "int8": 0.2}
_NOTES = 3  # their form
_CODE = ("graph.py", "compiling.py", "onednn.py", "panels.cpp", "panels.py", "quantize.py", "../activations.py")


@dataclass(frozen=True)
class Package:
    """A package on disk. seconds: that compiling took; measured: lines on the kernels, from when it was made."""

    path: Path
    seconds: float
    measured: tuple[str, ...]


def expected_seconds(shape: Shape) -> int:
    """About what compiling takes on two cores; to be said before it is begun."""
    return 55 + 2 * shape.layers


def key(shape: Shape) -> str:
    """A name for all that a package depends on."""
    return fingerprint(_NOTES, shape.as_dict(), _code())


def find(shape: Shape) -> Package | None:
    """The package for a shape, if there is one and it is whole."""
    try:
        note = json.loads((directory() / f"{key(shape)}.json").read_text("utf-8"))
        path = directory() / note["package"]
        whole = hashlib.sha256(path.read_bytes()).hexdigest() == note["sha256"]
        return Package(path, float(note["seconds"]), tuple(note["measured"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that is broken: it will be made anew
        return None


def make(shape: Shape, measured: tuple[str, ...] = ()) -> Package:
    """The package for a shape, compiled if there is none; of several processes at once, one compiles.

    Raises CannotCompileError: no compiler, one that fails, or a directory that cannot be written to.
    """
    if obstacle := panels.make():
        raise CannotCompileError(obstacle)
    what = f"{shape.layers} layers of {shape.hidden}"
    return once(key(shape), what, expected_seconds(shape), lambda: find(shape), lambda: _compile(shape, measured))


def _compile(shape: Shape, measured: tuple[str, ...]) -> Package:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="minibert-") as work:
        package, request = Path(work, "pass.pt2"), Path(work, "shape.json")
        request.write_text(json.dumps(shape.as_dict()))
        # Temporary files of the compiler go with the directory; minibert is found where this one was found
        places = {"TORCHINDUCTOR_CACHE_DIR": str(Path(work, "inductor")), "TMPDIR": work}
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        content = run(
            [sys.executable, "-W", "ignore", "-m", "minibert.fast.compiling", str(request), str(package)],
            package,
            {**os.environ, **places, "PYTHONPATH": paths},
        )
    name, seconds = f"{key(shape)}.pt2", time.perf_counter() - began
    with replacing(directory() / name) as partial:
        partial.write_bytes(content)
    note = {"package": name, "sha256": hashlib.sha256(content).hexdigest(), "seconds": seconds, "measured": measured,
            "shape": shape.as_dict(), "torch": torch.__version__}  # fmt: skip
    write(directory() / f"{key(shape)}.json", json.dumps(note, indent=1))
    return Package(directory() / name, seconds, measured)


@cache
def _code() -> str:
    return hash_of(*_CODE)


class CompiledPass:
    """Runs a package on an engine's weights, which it shares."""

    def __init__(self, package: Package, shape: Shape, engine: CpuEngine):
        self.loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(package.path), "model", False, _RUNNERS, -1)
        self.takes_any_rows = shape.takes_any_rows
        self.weights = weights(engine)  # kept: the package itself keeps no more than where they lie
        self.loader.load_constants(self.weights, use_inactive=False, check_full_update=True, user_managed=True)

    def __call__(self, batch: Batch) -> Tensor:
        """Last states, (N, D), or (M, D) of the picked tokens."""
        lengths, picked = batch.packing.lengths, None if batch.picked is None else batch.picked.index
        groups = split(lengths)
        if len(groups) == 1:
            return self._run(batch.ids_3N, lengths, picked)
        ids = batch.ids_3N.split([sum(group) for group in groups], 1)
        last_ND = torch.cat([self._run(*part, None) for part in zip(ids, groups, strict=True)])
        return last_ND if picked is None else last_ND.index_select(0, picked)

    def _run(self, ids_3N: Tensor, lengths: list[int], picked: Tensor | None) -> Tensor:
        N = ids_3N.shape[1]
        M = N if picked is None else len(picked)
        rows, wanted = (N, max(1, M)) if self.takes_any_rows else (rounded(N), rounded(M))
        picked = torch.arange(M) if picked is None else picked
        if wanted > M:  # the last one once more; rows that are added below are tokens of no text
            picked = functional.pad(picked, (0, wanted - M), value=int(picked[-1]) if M else 0)
        starts = torch.tensor([0, *accumulate(lengths)])
        # A list of its own: tensors that the pass is the last to hold are freed within it, which lets go of Python's
        # lock; the next thread would take it and wait for a runner, for ever
        inputs = [up_to(rows, ids_3N, -1).contiguous(), starts, picked]
        return self.loader.boxed_run(list(inputs))[0][:M]


def split(lengths: list[int]) -> list[list[int]]:
    """Lengths of texts that are computed together."""
    groups: list[list[int]] = []
    tokens = _TOKENS
    for length in lengths:
        tokens += length
        if tokens > _TOKENS:
            groups.append([])
            tokens = length
        groups[-1].append(length)
    return groups


def attach(engine: CpuEngine, package: Package, shape: Shape, dtype: str) -> str:
    """Give an engine its compiled pass; returns why not, or ""."""
    if obstacle := panels.load():
        return f"its kernels are not here: {obstacle}"
    try:
        compiled = CompiledPass(package, shape, engine)
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(engine.embeddings.word_embeddings.num_embeddings, (n,), generator=generator).tolist()
                for n in (13, 3)]  # fmt: skip
        batch = pack_rows([row[: engine.embeddings.position_embeddings.num_embeddings] for row in rows])
        expected = engine.encode(batch).last_MD.float()
        error = float((compiled(batch).float() - expected).abs().max() / expected.abs().max())
    except Exception as failure:  # whatever a package that does not fit this torch may do
        return f"the package cannot be run ({type(failure).__name__}: {str(failure).splitlines()[0]:.120})"
    if not error <= _ALLOWED[dtype]:
        return f"its result is wrong by {error:.1e} of the largest value"
    engine.compiled = compiled
    return ""

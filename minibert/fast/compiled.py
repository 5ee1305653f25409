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
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibert.fast.compiler import directory, fingerprint, hash_of, once, run
from minibert.fast.encoder import CpuEngine
from minibert.fast.graph import Places, Shape, weights
from minibert.fast.padding import Batch, pack_rows, rounded, up_to
from minibert.weights.files import replacing, write

_RUNNERS = 2  # calls that may run at the same time
_SLACK = 1 << 18  # products of a token with a token that padding may add to attention without a second thought
_TOKENS = 4096  # at once: beyond, what a layer works on has long left the caches
_SCORES = 1 << 24  # of attention at once, padding included
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

    def __init__(self, package: Package, engine: CpuEngine):
        self.loader: Any = torch._C._aoti.AOTIModelPackageLoader(str(package.path), "model", False, _RUNNERS, -1)
        self.weights = weights(engine)  # kept: the package itself keeps no more than where they lie
        self.loader.load_constants(self.weights, use_inactive=False, check_full_update=True, user_managed=True)

    def __call__(self, batch: Batch) -> Tensor:
        """Last states, (N, D), or (M, D) of the picked tokens."""
        plan = batch.packing
        groups = split(plan.lengths)
        if len(groups) == 1:
            picked = None if batch.picked is None else batch.picked.index
            return self._run(batch.ids_3N, plan.lengths, picked)
        tokens = torch.arange(plan.tokens).split(plan.lengths)
        last_ND: Tensor | None = None
        for rows in groups:
            index = torch.cat([tokens[row] for row in rows])
            part = self._run(batch.ids_3N[:, index], [plan.lengths[row] for row in rows], None)
            if last_ND is None:
                last_ND = part.new_empty(plan.tokens, part.shape[1])
            last_ND.index_copy_(0, index, part)
        return last_ND if batch.picked is None else last_ND.index_select(0, batch.picked.index)

    def _run(self, ids_3N: Tensor, lengths: list[int], picked: Tensor | None) -> Tensor:
        N = ids_3N.shape[1]
        alone = len(lengths) == 1 and picked is None
        layout = _layout_of_one(N) if alone else _layout(lengths, picked)
        # What is added is one token more, of id 0, that no other sees
        inputs = [up_to(rounded(N), ids_3N, -1), *layout]
        # A copy of the list: tensors that the pass is the last to hold are freed within it, which lets go of Python's
        # lock; the next thread would take it and wait for a runner, for ever
        return self.loader.boxed_run(list(inputs))[0][: N if picked is None else len(picked)]


def _layout(lengths: list[int], picked: Tensor | None) -> tuple[Tensor, ...]:
    """All that a pass takes beside the ids: source, mask, row and column of Places, and the picked tokens.

    Rows are rounded up; those added are the first token once more.
    """
    places, N = Places.of(lengths), sum(lengths)
    picked = torch.arange(N) if picked is None else picked
    row, column = (up_to(rounded(N), x) for x in (places.row, places.column))
    return places.source, places.mask, row, column, up_to(rounded(len(picked)), picked)


@lru_cache(maxsize=64)
def _layout_of_one(tokens: int) -> tuple[Tensor, ...]:
    """The same for a single text, kept: most calls are one short text, and each tensor made is a part of their time."""
    with torch.device("cpu"):  # whatever the default is at the first such call
        return _layout([tokens], None)


def split(lengths: list[int]) -> list[list[int]]:
    """Rows that are computed together, by number: attention pads them to the longest, which must not cost much."""
    order = range(len(lengths))
    if len(lengths) > 1 and not _fits(len(lengths), max(lengths), sum(lengths), sum(n * n for n in lengths)):
        order = sorted(order, key=lengths.__getitem__, reverse=True)
    else:
        return [list(order)]
    groups: list[list[int]] = []
    tokens = squares = 0
    for row in order:
        length = lengths[row]
        tokens, squares = tokens + length, squares + length * length
        if groups and _fits(len(groups[-1]) + 1, lengths[groups[-1][0]], tokens, squares):
            groups[-1].append(row)
        else:
            groups.append([row])
            tokens, squares = length, length * length
    return groups


def _fits(rows: int, longest: int, tokens: int, squares: int) -> bool:
    padded = rows * longest * longest
    return padded <= 1.5 * squares + _SLACK and tokens <= _TOKENS and padded <= _SCORES


def attach(engine: CpuEngine, package: Package, dtype: str) -> str:
    """Give an engine its compiled pass; returns why not, or ""."""
    try:
        compiled = CompiledPass(package, engine)
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

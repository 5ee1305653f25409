"""Step by step: where two implementations differ, by how much, and whether it is rounding or a bug, at which line.

Every step of one side is also given what the other side had computed before it. What then differs is the step's own
doing; and what still differs in float64, where rounding is a billion times smaller, is no rounding.
"""

from __future__ import annotations

import copy
import sys
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from minibert import study
from minibert.parity.inputs import Case
from minibert.parity.metrics import Tally

FALL = 1e-6  # rounding falls by at least this from float32 to float64
FLOORS = {"plain": 1e-11, "noise": 1e-11, "sharp": 1e-6}  # relative errors that float64 itself may make
_SCORE = 1e6  # of "sharp" weights: above any number that stands for minus infinity by mistake
# Operations that only look at numbers another way
_VIEWS = {
    "view", "reshape", "transpose", "permute", "contiguous", "__getitem__", "split", "chunk", "unsqueeze", "squeeze",
    "expand", "flatten", "unflatten", "clone", "to", "double", "unbind", "__get__",
}  # fmt: skip


@dataclass
class Row:
    """One step on both sides: their lines of code, errors as they pile up, and the step's own, on equal inputs."""

    name: str
    line: str
    code: str
    twin_line: str
    twin_code: str
    beside: bool
    accumulated: Tally
    local: Tally

    def to_dict(self) -> dict[str, Any]:
        lines = {"line": self.line, "code": self.code, "twin_line": self.twin_line, "twin_code": self.twin_code}
        return {"step": self.name, **lines, "beside": self.beside, **self.accumulated.to_dict(),
                "local": self.local.to_dict()}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A step whose result in float64, on equal inputs, is another: relative error, the lines, what shows it."""

    step: str
    case: str
    weights: str
    error: float
    line: str
    code: str
    twin_line: str
    twin_code: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class Diagnosis:
    """bug: the first finding that no rounding explains. notes: what was seen on the way."""

    bug: Finding | None = None
    notes: list[str] = field(default_factory=list)


def in_float64(model: nn.Module, rounded_to: torch.dtype | None = None) -> nn.Module:
    """A copy on the CPU that computes in float64, in the same mode.

    Weights keep the values that their dtype gave them, or those that `rounded_to` gives them: rounding of weights is
    the dtype's choice and no error of what computes with them.
    """
    if hasattr(model, "plan") and isinstance(getattr(model, "model", None), nn.Module):  # a fast path
        from minibert.fast import optimize

        return optimize(in_float64(model.model, rounded_to))
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):  # not .double(), which may tie what was not tied
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(rounded_to or tensor.dtype).double().cpu()
    return model


@torch.no_grad()
def stressed(model: nn.Module, sharpness: float = 1.0) -> nn.Module:
    """The same code on weights that hide nothing; parameters of one name get the same change in every model.

    No bias is 0 and no scale 1, as they may be in a checkpoint and a fault may count on; and queries are multiplied by
    `sharpness`: scores may be so large that a mask must really mask.
    """
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
        parameter.add_(noise * 0.1 * max(float(parameter.square().mean().sqrt()), 0.05))
        if "self.query" in name:
            parameter.mul_(sharpness)
    return model


def visible(name: str, tensor: Tensor, case: Case) -> Tensor:
    """The part of a step that means something: no rows of padding, and no scores of masked keys."""
    real = case.real
    if real is None:
        return tensor
    B, T = real.shape
    if name.split("#")[0].endswith(".scores") and tensor.ndim == 4:
        tensor = torch.where(real[:, None, None], tensor, 0.0)
    if tensor.ndim >= 2 and tensor.shape[:2] == (B, T):
        return tensor[real]
    return tensor.transpose(1, 2)[real] if tensor.ndim == 4 and tensor.shape[::2] == (B, T) else tensor


def flat(case: Case) -> Case:
    """The case as the encoder sees it: choices are rows of the batch."""
    if all(x.ndim < 3 for x in case.inputs.values()):
        return case
    return Case(case.name, {key: x.flatten(0, 1) if x.ndim == 3 else x for key, x in case.inputs.items()})


def rows(model: nn.Module, reference: nn.Module, cases: list[Case], dtype: torch.dtype) -> list[Row]:
    """Errors of every step that both sides have, in the order of `model`; over all cases."""
    found: dict[str, Row] = {}
    for case in cases:
        theirs, own = study.trace(reference, case.inputs), study.trace(model, case.inputs)
        forced = study.trace(model, case.inputs, given={step.name: step.tensor for step in theirs if not step.beside})
        for step in own:
            if step.name not in theirs:
                continue
            twin = theirs.step(step.name)
            row = found.setdefault(step.name, Row(
                step.name, str(step.source), step.source.code, str(twin.source), twin.source.code,
                step.beside or twin.beside, Tally(dtype), Tally(dtype),
            ))  # fmt: skip
            expected = visible(step.name, twin.tensor, flat(case))
            row.accumulated.add(visible(step.name, step.tensor, flat(case)), expected)
            if step.name in forced:
                row.local.add(visible(step.name, forced[step.name], flat(case)), expected)
    return list(found.values())


def first_difference(found: list[Row]) -> Row | None:
    """The first step that a side really computes whose bits differ."""
    return next((row for row in found if not row.accumulated.bits and not row.beside), None)


def diagnose(model: nn.Module, reference: nn.Module, cases: list[Case], dtype: torch.dtype) -> Diagnosis:
    """Both sides in float64, each step on equal inputs, with the weights as they are and with stressed ones.

    Args:
        model, reference: in float64; their dropout, if on, stays on.
        dtype: what they compute in otherwise: a cast below it is a bug, one to it or above is rounding.
    """
    diagnosis = Diagnosis()
    names = [{name for name, _ in side.named_parameters()} for side in (model, reference)]
    if different := sorted(names[0] ^ names[1]):
        diagnosis.notes.append(f"parameters on one side only: {', '.join(different[:5])}")
    for kind in FLOORS if names[0] & names[1] else ["plain"]:
        sides = [model, reference]
        if kind != "plain":
            sharpness = _SCORE / _largest_score(reference, cases[0]) if kind == "sharp" else 1.0
            sides = [stressed(side, sharpness) for side in sides]
        for case in cases:
            for finding in _findings(*sides, case, kind, dtype, diagnosis.notes):
                diagnosis.bug = finding
                return diagnosis
    return diagnosis


def _largest_score(model: nn.Module, case: Case) -> float:
    scores = [step.tensor for step in study.trace(stressed(model), case.inputs) if step.name.endswith(".scores")]
    shown = [visible(".scores", score, flat(case)) for score in scores]
    found = [float(torch.where(score > -1e30, score, 0.0).abs().max()) for score in shown]
    return max(found, default=1.0) or 1.0


def _findings(
    model: nn.Module, reference: nn.Module, case: Case, kind: str, dtype: torch.dtype, notes: list[str]
) -> Iterator[Finding]:
    theirs = study.trace(reference, case.inputs)
    expected = {step.name: step.tensor for step in theirs if not step.beside}
    own = study.trace(model, case.inputs, given=expected)
    if not any(error > FLOORS[kind] for *_, error in _errors(own, theirs, expected, case)):
        return
    with _Operations() as pool:  # the same once more, with every operation
        theirs = study.trace(reference, case.inputs)
    expected = {step.name: step.tensor for step in theirs if not step.beside}
    with _Operations() as done:
        own = study.trace(model, case.inputs, given=expected)
    for name, actual, wanted, error in _errors(own, theirs, expected, case):
        if error > FLOORS[kind]:
            way, common = done.way_to(actual), {id(x) for x in expected.values() if x is not wanted}
            if _is_cast([*way, *pool.way_to(wanted, common)], error, dtype, notes):
                continue
            where = _place(name, wanted, theirs, own, way, pool)
            yield Finding(where[0], case.name, kind, error, *where[1:])


def _errors(
    own: Any, theirs: Any, expected: dict[str, Tensor], case: Case
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(name, result, what it should be, relative error) of each step in the order of `own`, then of each output."""
    outputs = _outputs(theirs.output)
    found = [(step.name, step.tensor, expected.get(step.name)) for step in own if not step.beside]
    found += [(name, value, outputs.get(name)) for name, value in _outputs(own.output).items()]
    for name, actual, wanted in found:
        if wanted is not None:
            yield name, actual, wanted, relative(*(visible(name, each, flat(case)) for each in (actual, wanted)))


def _place(
    name: str, wanted: Tensor, theirs: Any, own: Any, way: list[_Operation], pool: _Operations
) -> tuple[str, str, str, str, str, str]:
    """Where it goes wrong: a step left out on the way; else the first operation whose result the other never has."""
    order = {step.name: number for number, step in enumerate(own)}
    shared = {id(step.tensor): step.name for step in theirs if step.name in order and step.tensor is not wanted}
    twin = theirs.step(name) if name in theirs else theirs.steps[-1]
    source, why = own.step(name).source if name in own else own.steps[-1].source, "another result on equal inputs"
    blamed = _blamed(way, pool, {id(step.tensor) for step in theirs})
    passed, reached = pool.way_to(wanted, shared), pool.reached
    made = {id(operation.output) for operation in passed}
    left_out = [step for step in theirs if id(step.tensor) in made and step.name not in order]
    late = [shared[i] for i in reached if order[shared[i]] > order.get(name, len(order))]
    if left_out and not late:
        name, twin = left_out[0].name, left_out[0]
        if blamed is None or blamed is way[-1]:
            blamed, why = None, "this step is not computed"
            before = theirs.steps[: theirs.steps.index(twin)]
            source = next((own.step(step.name).source for step in reversed(before) if step.name in order), source)
    source = source if blamed is None else blamed.source
    return name, str(source), source.code, str(twin.source), twin.source.code, why


def _blamed(way: list[_Operation], pool: _Operations, given: set[int]) -> _Operation | None:
    """The first operation that computes something unlike all that the other side has, or the view that led to it.

    Where results of earlier steps come in, only what is made of them counts: a mask may be written in many ways.
    """
    reached, follows = set(given), []
    for operation in way:
        if not reached.isdisjoint(operation.inputs):
            reached.add(id(operation.output))
            follows.append(operation)
    unlike: list[_Operation] = []
    for operation in follows or way:
        if pool.has(operation.output):
            unlike = []
            continue
        unlike.append(operation)
        if operation.name not in _VIEWS:
            break
    return unlike[0] if unlike else None


def _is_cast(operations: list[_Operation], error: float, dtype: torch.dtype, notes: list[str]) -> bool:
    """Whether a cast to a precision that is no less than the model's own explains what differs in float64."""
    for operation in operations:
        kind = operation.output.dtype
        if not operation.output.ndim or not kind.is_floating_point or kind == torch.float64:
            continue
        if torch.finfo(dtype).eps >= torch.finfo(kind).eps > error / 100:
            note = f"{operation.source}: computes in {str(kind).removeprefix('torch.')} whatever the weights are"
            notes += [note] * (note not in notes)
            return True
    return False


def relative(actual: Tensor, expected: Tensor) -> float:
    """Root mean square difference, relative to that of what is expected; infinite for shapes and NaN that differ."""
    if actual.shape != expected.shape:
        return float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    difference = torch.where(same, 0.0, a - b)
    scale = float(torch.where(b.isfinite(), b, 0.0).square().mean().sqrt())
    error = float(difference.square().mean().sqrt()) / (scale or 1.0)
    return error if error == error else float("inf")


def _outputs(output: Any) -> dict[str, Tensor]:
    items = output.items() if hasattr(output, "items") else ()
    return {key: value for key, value in items if isinstance(value, Tensor)}


@dataclass(frozen=True, eq=False)
class _Operation:
    name: str
    output: Tensor
    inputs: tuple[int, ...]
    source: Any


class _Operations(TorchFunctionMode):
    """Records what every torch function took and returned, and which line called it."""

    def __enter__(self) -> _Operations:
        self.all: list[_Operation] = []
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = tuple(id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor):
                name, source = getattr(func, "__name__", ""), study.source_of(sys._getframe(1))
                if id(output) in inputs and not name.endswith("_"):
                    continue  # a cast to the type that it has, say, computes nothing
                self.all.append(_Operation(name, output, inputs, source))
        return result

    def way_to(self, end: Tensor, stops: Container[int] = ()) -> list[_Operation]:
        """The operations that led to a tensor, back to those in `stops`, which are then in `reached`."""
        needed, way, self.reached = {id(end)}, [], set()
        for operation in reversed(self.all):
            if id(operation.output) in needed:
                if id(operation.output) in stops:
                    self.reached.add(id(operation.output))
                    continue
                way.append(operation)
                needed.update(operation.inputs)
        return way[::-1]

    def has(self, tensor: Tensor) -> bool:
        """Whether a result like this, of the same shape, is among them."""
        shape = _shape(tensor)
        return any(_shape(each.output) == shape and relative(tensor.reshape(shape), each.output.reshape(shape)) < 1e-9
                   for each in self.all)  # fmt: skip


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """Without leading ones: positions may be (T,) or (1, T)."""
    sizes = list(tensor.shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


__all__ = ["Diagnosis", "Finding", "Row", "diagnose", "first_difference", "in_float64", "relative", "rows", "stressed"]

"""Step by step: where two implementations differ, by how much, and whether it is rounding or a bug, at which line.

Every step of one side is also given what the other side had computed before it. What then differs is the step's own
doing; and what still differs in float64, where rounding is a billion times smaller, is no rounding.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from minibert import study
from minibert.parity.inputs import Case
from minibert.parity.metrics import Tally, named, relative
from minibert.study import Source, Step, Trace

FALL = 1e-6  # rounding falls by at least this from float32 to float64
FLOORS = {"plain": 1e-11, "noise": 1e-11, "sharp": 1e-6}  # relative errors that float64 itself may make
_SCORE = 1e6  # of "sharp" weights: above any number that stands for minus infinity by mistake
_COARSE = 500  # ulps of a step on equal inputs that no order of a sum explains; half precision has thousands
_SMALL = 64  # tokens up to which steps are looked at
_OF_TEXTS = re.compile(r"pooler|seq_relationship|classifier|^logits")  # results of whole texts, where they have 2 axes
# Operations that only look at numbers another way
_VIEWS = {
    "view", "reshape", "transpose", "permute", "contiguous", "__getitem__", "split", "chunk", "unsqueeze", "squeeze",
    "expand", "flatten", "unflatten", "clone", "to", "double", "unbind", "__get__",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A step and its lines of code on both sides."""

    step: str
    line: str
    code: str
    twin_line: str
    twin_code: str

    def place(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("step", "line", "code", "twin_line", "twin_code")}


@dataclass(frozen=True)
class Row(Place):
    """One step on both sides: errors as they pile up, and the step's own, on equal inputs. beside: see study.Step."""

    beside: bool
    accumulated: Tally
    local: Tally

    def to_dict(self) -> dict[str, Any]:
        return {**self.place(), "beside": self.beside, **self.accumulated.to_dict(), "local": self.local.to_dict()}


@dataclass(frozen=True)
class Finding(Place):
    """A step whose result in float64, on equal inputs, is another: what shows it, and the relative error."""

    case: str
    weights: str
    error: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


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


def counterparts(*models: nn.Module) -> list[dict[str, nn.Parameter]]:
    """The parameters that all models have: by name, and the rest by their values, if no two are alike."""
    named = [{name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()} for model in models]
    shared = set.intersection(*map(set, named))
    found = [{name: p for name, p in each.items() if name in shared} for each in named]
    rest = [{name: p.detach() for name, p in each.items() if name not in shared} for each in named]
    values = [{name: hash(p.double().cpu().numpy().tobytes()) for name, p in each.items()} for each in rest]
    for value in values[0].values():
        alike = [[name for name, other in each.items() if other == value] for each in values]
        if all(len(names) == 1 for names in alike):
            for number, (name,) in enumerate(alike):
                found[number][" = ".join(name for (name,) in alike)] = named[number][name]
    return found


@torch.no_grad()
def stressed(sides: Sequence[nn.Module], sharpness: float = 1.0) -> list[nn.Module]:
    """The same code on weights that hide nothing; counterparts get the same change.

    No bias is 0 and no scale 1, as they may be in a checkpoint and a fault may count on; and queries are multiplied by
    `sharpness`: scores may be so large that a mask must really mask. Where each side has parameters of its own, these
    stay: they may hold the same numbers otherwise, a weight as its length and direction, say.
    """
    sides = [copy.deepcopy(side) for side in sides]
    shared = counterparts(*sides)
    known = {id(parameter) for each in shared for parameter in each.values()}
    alone = [{name: p for name, p in side.named_parameters() if id(p) not in known} for side in sides]
    for both, own in zip(shared, alone, strict=True):
        for name, parameter in {**both, **({} if all(alone) else own)}.items():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            parameter.add_(noise * 0.1 * max(float(parameter.square().mean().sqrt()), 0.05))
            if "self.query" in name:
                parameter.mul_(sharpness)
    return sides


def visible(name: str, tensor: Tensor, case: Case) -> Tensor:
    """The part of a step that means something: no rows of padding or what the pooler makes of one, no masked scores."""
    real, name = case.real, name.partition("#")[0]
    if real is None:
        return tensor
    if tensor.ndim == 2 and _OF_TEXTS.search(name):  # of a choice each, too
        return tensor.reshape(len(real), -1)[real[:, 0]] if tensor.numel() % len(real) == 0 else tensor
    if name.endswith(".scores") and tensor.ndim == 4 and tensor.shape[-1] == real.shape[1]:
        tensor = torch.where(real[:, None, None], tensor, 0.0)
    if tensor.ndim == 4 and tensor.shape[::2] == real.shape:  # asked first: there may be as many heads as tokens
        return tensor.transpose(1, 2)[real]
    return tensor[real] if tensor.shape[:2] == real.shape else tensor


def _seen(own: Trace, name: str, actual: Tensor, expected: Tensor, case: Case) -> list[Tensor]:
    """The visible parts of a step on both sides. What is the same for all rows may be computed once, (1, T, D); some
    rows or tokens apart, as steps of their own, or more of them; and tokens packed, with padding or without it.
    """
    if ("#" in name or f"{name}#2" in own) and actual.shape != expected.shape:
        return [actual, _part(actual, expected)]
    if actual.shape[1:] == expected.shape[1:] and 1 in (len(actual), len(expected)):
        actual, expected = torch.broadcast_tensors(actual, expected)
    if expected.ndim > 2:
        actual = _part(expected, actual)
    if actual.shape != expected.shape:
        real = _real(case)
        return [_tokens(actual, real), _tokens(expected, real)]
    return [visible(name, each, case) for each in (actual, expected)]


def _part(tensor: Tensor, whole: Tensor) -> Tensor:
    """What is most like `tensor` in `whole`, if that is longer along one axis, not the last, or has one more."""
    missing = whole.ndim - tensor.ndim
    for each in [tensor] if not missing else [tensor.unsqueeze(axis) for axis in range(tensor.ndim * (missing == 1))]:
        differ = [axis for axis in range(whole.ndim) if each.shape[axis] != whole.shape[axis]]
        axis, n = differ[0] if len(differ) == 1 else -1, each.shape[differ[0]] if differ else 0
        if 0 <= axis < whole.ndim - 1 and 0 < n < whole.shape[axis]:
            apart = (whole - each.narrow(axis, 0, 1)).square().movedim(axis, 0).flatten(1).sum(1)
            return whole.narrow(axis, int(apart[: len(apart) - n + 1].argmin()), n).reshape(tensor.shape)
    return whole


def _real(case: Case) -> Tensor:
    """`case.real`, or that all tokens are."""
    ids = next(iter(case.inputs.values()))
    return torch.ones_like(ids, dtype=torch.bool).flatten(0, -2) if case.real is None else case.real


def _tokens(tensor: Tensor, real: Tensor) -> Tensor:
    """The numbers of real tokens, (N, ...), in padded rows or packed as they may be; what is not by tokens as it is."""
    counts = (real.numel(), int(real.sum()))
    if tensor.ndim == 4 and tensor.shape[0] * tensor.shape[2] in counts:
        tensor = tensor.transpose(1, 2)
    for axes in (2, 1):
        if (count := math.prod(tensor.shape[:axes])) in counts:
            rows = tensor.reshape(count, *tensor.shape[axes:])
            return rows[real.flatten()] if count == counts[0] else rows
    return tensor


def few(cases: Sequence[Case], worst: Case) -> list[Case]:
    """Cases that steps are followed on: a few short ones with and without padding, and the worst."""
    small = sorted((case for case in cases if 1 < case.tokens <= _SMALL), key=lambda case: case.tokens)
    padded = [case for case in small if case.real is not None and not bool(case.real.all())]
    whole = [case for case in small if case not in padded]
    chosen = [*padded[:1], *padded[1:][-2:], *whole[:1], *whole[1:][-1:]] or list(cases[:1])
    return chosen if worst in chosen else [*chosen, worst]


def rows(model: nn.Module, reference: nn.Module, cases: list[Case], dtype: torch.dtype) -> list[Row]:
    """Errors of every step that both sides have, in the order of `model`; over all cases."""
    found: dict[str, Row] = {}
    for case in cases:
        theirs, own = _traced(reference, case), _traced(model, case)
        forced = _traced(model, case, theirs)
        for step in (step for step in own if step.name in theirs):
            name, twin = step.name, theirs.step(step.name)
            if name not in found:
                lines = _lines(name, step.source, twin.source)
                found[name] = Row(*lines, step.beside or twin.beside, Tally(dtype), Tally(dtype))
            found[name].accumulated.add(*_seen(own, name, step.tensor, twin.tensor, case))
            if name in forced:
                found[name].local.add(*_seen(forced, name, forced[name], twin.tensor, case))
    return list(found.values())


def _traced(model: nn.Module, case: Case, theirs: Trace | None = None, free: Collection[str] = ()) -> Trace:
    """The steps of a model that may change tensors in place; of another's results, if there are any, but for `free`."""
    given = {} if theirs is None else {name: x for name, x in _results(theirs).items() if name not in free}
    return study.trace(model, case.inputs, given=given, copies=True)


def _lines(name: str, source: Source, twin: Source) -> tuple[str, str, str, str, str]:
    return name, str(source), source.code, str(twin), twin.code


def _results(traced: Trace) -> dict[str, Tensor]:
    """What a side really computed, by the step's name; of embeddings, which two are added first is free."""
    return {step.name: step.tensor for step in traced if not (step.beside or step.name.endswith("words_and_segments"))}


def diagnose(
    model: nn.Module, reference: nn.Module, cases: list[Case], dtype: torch.dtype, casts: list[str]
) -> Finding | None:
    """The first finding that no rounding explains: each step on equal inputs, with plain and with stressed weights.

    Args:
        model, reference: in float64; their dropout, if on, stays on.
        dtype: what they compute in otherwise: a cast below it is a bug, one to it or above is rounding.
        casts: those that are rounding, because they are to no less than `dtype`, are added here.
    """
    sides, sharpness = [model, reference], 1.0
    for kind in FLOORS if counterparts(*sides)[0] else ["plain"]:
        if kind == "sharp":
            sharpness = _SCORE / _largest_score(sides[1], cases[0])
        if kind != "plain":
            sides = stressed([model, reference], sharpness)
        for case in cases:
            if (finding := _finding(*sides, case, kind, dtype, casts)) is not None:
                return finding
    return None


def coarse(found: list[Row]) -> Finding | None:
    """The first step that is far less precise than its type, which float64 need not show: under autocast, say."""
    for row in found:
        if not row.beside and row.local.ulp > _COARSE:
            why = f"{row.local.ulp:.0f} ulp off on equal inputs, but not in float64: it computes in a lower precision"
            return Finding(**row.place(), case="all cases", weights="plain", error=row.local.relative, why=why)
    return None


def _largest_score(model: nn.Module, case: Case) -> float:
    scores = _traced(model, case).ending(".scores")
    shown = [visible(step.name, step.tensor, case) for step in scores]
    return max((float(torch.where(x > -1e30, x, 0.0).abs().max()) for x in shown), default=1.0) or 1.0


def _finding(
    model: nn.Module, reference: nn.Module, case: Case, kind: str, dtype: torch.dtype, casts: list[str]
) -> Finding | None:
    theirs = _traced(reference, case)
    own = _traced(model, case, theirs)
    if not any(error > FLOORS[kind] for *_, error in _errors(own, theirs, case)):
        return None
    results, wanted = (named(each.output) for each in (_traced(model, case), theirs))
    if wanted.keys() == results.keys() and all(
        relative(*(visible(name, each[name], case) for each in (results, wanted))) < 10 * FLOORS[kind]
        for name in wanted
    ):
        return None  # other steps that lead to the same: a sum in another order, say
    free = _alike_by_name(model, theirs, case, FLOORS[kind])
    with _Operations(_real(case)) as known:  # the same once more, with every operation
        theirs = _traced(reference, case)
    with _Operations(_real(case)) as done:
        own = _traced(model, case, theirs, free)
    for name, actual, wanted, error in _errors(own, theirs, case):
        if error <= FLOORS[kind] or name in free:
            continue
        way, common = done.way_to(actual)[0], {id(x) for x in _results(theirs).values() if x is not wanted}
        cast = _cast([*way, *known.way_to(wanted, common)[0]], error, dtype)
        if cast is None:
            step, source, twin, why = _place(name, actual, wanted, own, theirs, done, known)
            return Finding(*_lines(step, source, twin), case.name, kind, error, why)
        casts += [cast] * (cast not in casts)
    return None


def _alike_by_name(model: nn.Module, theirs: Trace, case: Case, floor: float) -> set[str]:
    """Steps that are the other side's by name alone, half of a product, say: what follows is right only if the model
    goes on with its own result.
    """

    def wrong(free: set[str]) -> list[str]:
        errors = _errors(_traced(model, case, theirs, free), theirs, case)
        return [name for name, *_, error in errors if error > floor and name not in free]

    free: set[str] = set()
    while (found := wrong(free)) and set(wrong({*free, found[0]})) < set(found[1:]):
        free.add(found[0])
    return free


def _errors(own: Trace, theirs: Trace, case: Case) -> list[tuple[str, Tensor, Tensor, float]]:
    """(name, result, what it should be, relative error) of each step in the order of `own`, then of each output; last
    what has another shape, for it may be something else of the same name.
    """
    expected, found = {**_results(theirs), **named(theirs.output)}, []
    for name, actual in [*_results(own).items(), *named(own.output).items()]:
        wanted = expected.get(name, expected.get(name.partition("#")[0]))
        if wanted is not None and (name in expected or _part(actual, wanted).shape == actual.shape != wanted.shape):
            a, b = _seen(own, name, actual, wanted, case)
            found.append((a.shape != b.shape, (name, actual, wanted, relative(a, b))))
    return [each for _, each in sorted(found, key=lambda each: each[0])]


def _cast(operations: list[_Operation], error: float, dtype: torch.dtype) -> str | None:
    """The cast that explains what differs in float64, if it is to a precision that is no less than the model's own."""
    for operation in operations:
        kind = operation.output.dtype
        is_lower = operation.output.ndim and kind.is_floating_point and kind != torch.float64
        if is_lower and torch.finfo(dtype).eps >= torch.finfo(kind).eps > error / 100:
            return f"{operation.source}: computes in {str(kind).removeprefix('torch.')} whatever the weights are"
    return None


def _place(
    name: str, actual: Tensor, wanted: Tensor, own: Trace, theirs: Trace, done: _Operations, known: _Operations
) -> tuple[str, Source, Source, str]:
    """Where it goes wrong: a step left out on the way; else the first operation whose result the other never has."""
    order = {step.name: number for number, step in enumerate(own)}
    shared = {id(step.tensor): step.name for step in theirs if step.name in order and step.tensor is not wanted}
    twin = next((step for step in theirs if step.name in (name, name.partition("#")[0])), theirs.steps[-1])
    way = done.way_to(actual)[0]
    source = own.step(name).source if name in own else (way or own.steps)[-1].source
    blamed = _blamed(way, known, {id(step.tensor) for step in theirs}, any("#" in step.name for step in own))
    (passed, reached), (here, taken) = known.way_to(wanted, shared), done.way_to(actual, shared)
    left_out = [step for step in _made_by(passed, theirs) if step.name not in order]
    extra = [step for step in _made_by(here, own) if step.name not in theirs and not step.beside]
    late = any(order[shared[i]] > order.get(name, len(order)) for i in reached)
    if left_out and not late:
        name, twin = left_out[0].name, left_out[0]
        if blamed is None or blamed is way[-1]:
            common = [step for step in theirs if step.name in order and not own.step(step.name).beside]
            near = [step for step in common if step.name.rpartition(".")[0] == name.rpartition(".")[0]]
            before = [step for step in near if theirs.steps.index(step) < theirs.steps.index(twin)]
            if nearest := [*extra[:1], *(own.step(step.name) for step in [*before[-1:], *near[:1]])]:
                source = nearest[0].source
            elif blamed is not None:
                source = blamed.source
            return name, source, twin.source, "this step is not computed"
    mine, other = ({shared[i] for i in each} for each in (taken, reached))
    changes = [f"with {each.name}, which is computed here alone" for each in extra[:1]]
    changes += [*(f"not of {each}" for each in sorted(other - mine)), *(f"of {each}" for each in sorted(mine - other))]
    why = f"made otherwise: {', '.join(changes)}" if changes else "another result on equal inputs"
    return name, blamed.source if blamed else source, twin.source, why


def _made_by(operations: list[_Operation], trace: Trace) -> list[Step]:
    """The steps that are results of these operations."""
    made = {id(operation.output) for operation in operations}
    return [step for step in trace if id(step.tensor) in made]


def _blamed(way: list[_Operation], known: _Operations, given: set[int], apart: bool) -> _Operation | None:
    """The first operation that computes something unlike all that the other side has, and what follows is unlike too.

    Where results of earlier steps come in, only what is made of them counts: a mask may be written in many ways.
    """
    reached, follows = set(given), []
    for operation in way:
        if not reached.isdisjoint(operation.inputs):
            reached.add(id(operation.output))
            follows.append(operation)
    made, needed, unlike = {id(each.output): each.output for each in way}, {id(each.output) for each in way[-1:]}, None
    for operation in (each for each in reversed(follows or way) if id(each.output) in needed):
        if _version(operation.output) == operation.version:
            # Where steps are computed `apart`, a part of what the other has is as good, unless it is cut here
            is_cut = operation.name in _VIEWS and any(i in made and known.has(made[i]) for i in operation.inputs)
            if known.has(operation.output, parts=apart and not is_cut):
                needed.discard(id(operation.output))
                continue
            unlike = operation
        needed.update(operation.inputs)
    return unlike


@dataclass(frozen=True, eq=False)
class _Operation:
    name: str
    output: Tensor
    inputs: tuple[int, ...]
    source: Source
    version: int  # of the output, when it was made: it may be changed in place since


class _Operations(TorchFunctionMode):
    """Records what every torch function took and returned, and which line called it."""

    def __init__(self, real: Tensor):
        super().__init__()
        self.real, self.all = real, list[_Operation]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        inputs, versions = tuple(map(id, given)), [_version(x) for x in given]
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        # A cast to the type that it has, say, computes nothing; what is changed in place changes what it is a view of
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and id(x) not in inputs]
        changed = [x for x, version in zip(given, versions, strict=True) if _version(x) != version]
        for output in (*made, *changed, *(x._base for x in changed if x._base is not None)):
            source = study.source_of(sys._getframe(1))
            self.all.append(_Operation(name, output, inputs, source, _version(output)))
        return result

    def way_to(self, end: Tensor, stops: Collection[int] = ()) -> tuple[list[_Operation], set[int]]:
        """The operations that led to a tensor, back to those in `stops`, and which of these were reached."""
        needed, way = {id(end)}, []
        for operation in reversed(self.all):
            if id(operation.output) in needed and id(operation.output) not in stops:
                way.append(operation)
                needed.update(operation.inputs)
        return way[::-1], needed.intersection(stops)

    def has(self, tensor: Tensor, parts: bool = False) -> bool:
        """Whether it is among the results, or if `parts`, part of one; of another shape by real tokens, or longer."""
        wanted, found = _bare(tensor), [_bare(each.output) for each in self.all]
        pairs = [(wanted, each) for each in found if each.shape == wanted.shape]
        if not pairs:
            packed = _bare(_tokens(tensor, self.real))
            pairs = [(packed, _bare(_tokens(each.output, self.real))) for each in self.all]
            pairs += [(_part(each, wanted), each) for each in found]
        pairs += [(wanted, _part(wanted, each)) for each in found] if parts else []
        return any(relative(*pair) < 1e-9 for pair in pairs)


def _version(tensor: Tensor) -> int:
    """How often it was changed in place, itself or what it shares its memory with."""
    return 0 if tensor.is_inference() else tensor._version


def _bare(tensor: Tensor) -> Tensor:
    """Without leading ones, and without what stands for minus infinity, beside which all else is as good as equal."""
    shape = tuple(itertools.dropwhile(lambda size: size == 1, tensor.shape))
    numbers = tensor.detach().reshape(shape).double()
    return torch.where(numbers < -1e8, 0.0, numbers)

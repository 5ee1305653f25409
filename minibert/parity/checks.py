"""Beyond the forward pass: gradients, training steps, and what should not matter (company, padding, threads, ...)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.parity import steps
from minibert.parity.inputs import Case, labels_for
from minibert.parity.metrics import Outputs, Tally, named, relative
from minibert.parity.sides import Side, coarsest
from minibert.parity.verdict import Report, first_line

_ULPS = 1e4  # and in ulps, for a side that has no float64
_FLOOR = 1e-9  # relative error in float64 above which a difference is a bug


def summary(verdict: str, detail: str, **more: Any) -> dict[str, Any]:
    """What every check reports: a verdict, a sentence, and whether that passes."""
    return {"verdict": verdict, "summary": f"{verdict}; {detail}", "passed": verdict != "bug", **more}


def run(report: Report, own: Side, theirs: Side, cases: Sequence[Case], config: Any, wanted: Sequence[str],
        count: int = 3) -> None:  # fmt: skip
    """Those of "gradients", "train" and "invariance" that are wanted and that the sides allow, into the report."""
    modules, longest = (own.module, theirs.module), getattr(config, "max_position_embeddings", 64)
    if all(module is not None and not hasattr(module, "plan") for module in modules):
        case = min(cases, key=lambda each: (abs(each.tokens - 9), each.real is None))
        kinds = {type(module).__name__ for module in modules}
        labels = labels_for(kinds.pop(), case, config) if len(kinds) == 1 else {}
        ids, padding = case.inputs.get("input_ids"), getattr(config, "pad_token_id", None)
        if ids is not None and padding is not None:  # whose row of the table learns nothing, or does
            case = replace(case, inputs={**case.inputs, "input_ids": torch.where(ids == padding, padding + 1, ids)})
        loss_of = partial(objective, case=case, labels=labels, names=list(report.outputs))
        try:
            if "gradients" in wanted:
                report.checks["gradients"] = gradients(modules, loss_of)
            if "train" in wanted:
                report.checks["train"] = training(modules, loss_of, count)
        except Exception as error:  # not every module can be trained
            report.notes.append(f"gradients are not compared: {first_line(error)}")
    if "invariance" in wanted:
        for side, name, more in ((own, "invariance", {}), (theirs, "invariance of the reference", {"passed": True})):
            if callable(side.run):
                side.invariance = side.invariance or invariance(side, cases, longest)
                report.checks[name] = {**side.invariance, **more}


def tokenizers(ours: Any, theirs: Any, texts: Sequence[str], longest: int) -> dict[str, Any]:
    """Ids, segments and mask of every text, whole and cut short; the first that differ are a bug, for no rounding makes
    another id.
    """
    for (number, text), most in itertools.product(enumerate(texts, 1), (longest, 8)):
        mine, other = (each(*text.split("\t", 1), truncation=True, max_length=most) for each in (ours, theirs))
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            a, b = list(mine[key]), list(other[key])
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                pieces = [each.convert_ids_to_tokens(list(one["input_ids"]))[at : at + 1]
                          for each, one in ((ours, mine), (theirs, other))]  # fmt: skip
                return summary("bug", f"text {number} differs in {key} at piece {at}: {pieces[0]} and {pieces[1]}")
    return summary("same", f"ids, segments and masks of {len(texts)} texts are equal")


Parameters = dict[str, nn.Parameter]
Objective = Callable[[nn.Module], Tensor]


def _on_both(
    compute: Callable[[nn.Module, Parameters, bool], Outputs], modules: Sequence[nn.Module], what: str
) -> dict[str, Any]:
    """Results by name of `compute` on copies of both, which it may change, and on the parameters that both have; where
    bits differ, once more in float64, where True is passed.
    """

    def results(exact: bool) -> Iterator[Outputs]:
        dtype = coarsest(p.dtype for model in modules for p in model.parameters())
        copies = [steps.in_float64(model, dtype) if exact else copy.deepcopy(model) for model in modules]
        return (compute(*each, exact) for each in zip(copies, steps.counterparts(*copies), strict=True))

    actual, expected = results(exact=False)
    equal = sum(torch.equal(actual[name], x) for name, x in expected.items())
    detail = f"{equal} of {len(expected)} {what} are equal to the last bit"
    if equal == len(expected):
        return summary("same bits", detail)
    actual, expected = results(exact=True)
    # All are measured by the largest: some, the gradient of a key's bias say, are nothing but rounding
    scale = max(float(x.square().mean().sqrt()) for x in expected.values())
    errors = {name: float((actual[name] - x).square().mean().sqrt()) / scale for name, x in expected.items()}
    if wrong := [f"{name} by {error:.1e}" for name, error in errors.items() if not error < _FLOOR]:
        return summary("bug", f"{detail}; {len(wrong)} are others in float64, last: {', '.join(wrong[:-4:-1])}")
    return summary("rounding", detail)


def gradients(modules: Sequence[nn.Module], loss_of: Objective) -> dict[str, Any]:
    """The gradient of every parameter, without dropout; differences that float64 does not make fall are a bug."""

    def compute(model: nn.Module, parameters: Parameters, exact: bool) -> Outputs:
        with torch.enable_grad():
            loss = loss_of(model.eval())
            loss.backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        return {**found, "loss": loss.detach()}

    return _on_both(compute, modules, "gradients and the loss")


def training(modules: Sequence[nn.Module], loss_of: Objective, count: int = 3) -> dict[str, Any]:
    """`count` steps of AdamW with dropout, from the same seed; where bits differ, losses without dropout in float64."""

    def compute(model: nn.Module, parameters: Parameters, exact: bool) -> Outputs:
        model, losses = model.train(not exact), {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for step in range(1, count + 1):
                loss = loss_of(model)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[f"loss {step}"] = loss.detach()
        return losses if exact else {**losses, **{name: p.detach() for name, p in parameters.items()}}

    return _on_both(compute, modules, f"losses and parameters of {count} steps of AdamW")


def objective(model: nn.Module, case: Case, labels: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """The loss of a head; for an encoder the product of its outputs, by `names`, with fixed random numbers."""
    dtype, random = next(model.parameters()).dtype, torch.Generator().manual_seed(2)
    wanted = {name: x.to(dtype) if x.is_floating_point() else x for name, x in labels.items()}
    output = model(**{**case.inputs, **wanted})
    if labels:
        return output.loss
    found = named(output)
    results = found if "0" in found else {name: found[name] for name in names}
    shown = [steps.visible(name, x, case) for name, x in zip(names, results.values(), strict=False)]
    return torch.stack([(x * torch.randn(x.shape, generator=random)).mean() for x in shown if x.numel()]).sum()


def invariance(side: Side, cases: Sequence[Case], longest: int) -> dict[str, Any]:
    """How far results change, in ulps, with what should not matter; a change that stays in float64 is a bug."""
    whole = [case for case in cases if case.real is None or bool(case.real.all())] or cases
    case = next((case for case in whole if case.tokens == 9), whole[0])
    exact = None if side.module is None else Side(side.name, steps.in_float64(side.module), torch.float64)
    base, truth = side.outputs(case), exact.outputs(case) if exact else {}
    again = _variants(exact, case, longest) if exact else iter(())
    ulps, bugs = {}, []
    for name, result in _variants(side, case, longest):
        tallies = {key: Tally(side.dtype) for key in base}
        for key, tally in tallies.items():
            tally.add(_cut(result[key], base[key]), base[key])
        ulps[name] = max(tally.ulp for tally in tallies.values())
        twin = next(again, (name, {}))[1]
        stays = any(relative(_cut(twin[key], truth[key]), truth[key]) > _FLOOR for key in truth)
        if stays or (not exact and ulps[name] > _ULPS):
            bugs.append(name)
    changed = ", ".join(f"{name} {ulp:.2g}" for name, ulp in ulps.items() if ulp) or "nothing changes a bit"
    verdict = "bug" if bugs else "rounding" if any(ulps.values()) else "same bits"
    return summary(verdict, f"ulps: {changed}" + f"; stays in float64: {', '.join(bugs)}" * bool(bugs), ulps=ulps)


def _cut(value: Tensor, base: Tensor) -> Tensor:
    return value if value.shape == base.shape else value[:, : base.shape[1]]


def _variants(side: Side, case: Case, longest: int) -> Iterator[tuple[str, Outputs]]:
    """Each way that should not matter, and what comes of it, in the order and size of the case."""
    inputs, T = case.inputs, case.tokens

    def run(arguments: dict[str, Tensor], using: Callable[..., Any] | None = None) -> Outputs:
        return Side(side.name, using or side.run, side.dtype).outputs(Case(case.name, arguments))

    yield "twice", run(inputs)
    rows = [run({key: x[i : i + 1] for key, x in inputs.items()}) for i in range(len(inputs["input_ids"]))]
    yield "alone", {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    yield "order", {key: x.flip(0) for key, x in run({key: x.flip(0) for key, x in inputs.items()}).items()}
    mask = torch.ones_like(inputs["input_ids"])
    for length in sorted({n for n in (8, 64, longest) if T < n <= longest}):
        longer = {key: F.pad(x, (0, length - T)) for key, x in {"attention_mask": mask, **inputs}.items()}
        yield f"padded to {length}", run(longer)
    threads = torch.get_num_threads()
    for count in {1, max(2, threads)} - {threads}:
        torch.set_num_threads(count)
        try:
            result = run(inputs)
        finally:
            torch.set_num_threads(threads)
        yield f"{count} threads", result
    if side.module is not None and not hasattr(side.module, "plan"):
        for name, offset in (("aligned", 0), ("offset 4", 4), ("offset 2", 2), ("transposed", None)):
            yield name, run(inputs, moved(side.module, offset))


def moved(model: nn.Module, offset: int | None) -> nn.Module:
    """The same numbers elsewhere: at an offset of so many bytes from a multiple of 64, or for None column by column."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if offset is None:
            parameter.data = parameter.data.T.contiguous().T if parameter.ndim == 2 else parameter.data
            continue
        memory = torch.empty(parameter.nbytes + 128, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + offset
        there = torch.frombuffer(memory.numpy(), dtype=parameter.dtype, count=parameter.numel(), offset=start)
        parameter.data = there.view(parameter.shape).copy_(parameter.data)
    return model

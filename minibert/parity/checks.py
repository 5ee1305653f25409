"""Beyond the forward pass: gradients, training steps, and what should not matter (company, padding, threads, ...)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.parity import steps
from minibert.parity.comparison import Outputs, Side
from minibert.parity.inputs import Case, labels_for
from minibert.parity.metrics import Tally

_ULPS = 1e4  # and in ulps, for a side that has no float64
_FLOOR = 1e-9  # relative error in float64 above which a difference is a bug


def summary(verdict: str, detail: str) -> dict[str, Any]:
    """What every check reports: a verdict, a sentence, and whether that passes."""
    return {"verdict": verdict, "summary": f"{verdict}; {detail}", "passed": verdict != "bug"}


def tokenizers(ours: Any, theirs: Any, texts: Sequence[str], longest: int) -> dict[str, Any]:
    """Ids, segments and mask of every text; the first that differ are a bug, for no rounding makes another id."""
    for number, text in enumerate(texts, 1):
        pair = text.split("\t", 1)
        mine, other = (each(*pair, truncation=True, max_length=longest) for each in (ours, theirs))
        for key in ("input_ids", "token_type_ids", "attention_mask"):
            a, b = list(mine[key]), list(other[key])
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                pieces = [each.convert_ids_to_tokens(list(one["input_ids"]))[at : at + 1]
                          for each, one in ((ours, mine), (theirs, other))]  # fmt: skip
                return summary("bug", f"text {number} differs in {key} at piece {at}: {pieces[0]} and {pieces[1]}")
    return summary("same", f"ids, segments and masks of {len(texts)} texts are equal")


def objective(model: nn.Module, case: Case, labels: dict[str, Tensor]) -> Tensor:
    """The loss of a head; for an encoder the product of its outputs with fixed random numbers."""
    wanted = {k: x.to(next(model.parameters()).dtype) if x.is_floating_point() else x for k, x in labels.items()}
    output = model(**case.inputs, **wanted)
    if labels:
        return output.loss
    random = torch.Generator().manual_seed(2)
    return sum((x * torch.randn(x.shape, generator=random, dtype=torch.float32)).mean()
               for x in output.values() if isinstance(x, Tensor))  # fmt: skip


def gradients(own: nn.Module, theirs: nn.Module, case: Case, head: str, config: Any) -> dict[str, Any]:
    """The gradient of every parameter, without dropout; differences that float64 does not make fall are a bug."""
    labels = labels_for(head, case, config)

    def found(model: nn.Module) -> dict[str, Tensor]:
        model = copy.deepcopy(model).eval()
        with torch.enable_grad():
            objective(model, case, labels).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    actual, expected = found(own), found(theirs)
    if different := sorted(actual.keys() ^ expected.keys()):
        return summary("bug", f"a gradient on one side only: {', '.join(different[:5])}")
    worst = Tally(next(iter(expected.values())).dtype)
    equal = 0
    for name, gradient in expected.items():
        worst.add(actual[name], gradient)
        equal += torch.equal(actual[name], gradient)
    detail = f"{equal} of {len(expected)} gradients are equal to the last bit, largest difference {worst.max:.1e}"
    if equal == len(expected):
        return summary("same bits", detail)
    actual, expected = (found(steps.in_float64(model)) for model in (own, theirs))
    scale = max(float(x.square().mean().sqrt()) for x in expected.values())
    for name, gradient in expected.items():  # a key's bias has none but rounding, so all are measured by the largest
        error = float((actual[name] - gradient).square().mean().sqrt()) / scale
        if not error < _FLOOR:
            return summary("bug", f"the gradient of {name} is another in float64, by {error:.1e}; {detail}")
    return summary("rounding", detail)


def training(own: nn.Module, theirs: nn.Module, case: Case, head: str, config: Any, count: int = 3) -> dict[str, Any]:
    """`count` steps of AdamW with dropout, from the same seed; where bits differ, losses without dropout in float64."""
    labels = labels_for(head, case, config)

    def run(model: nn.Module, dropout: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = copy.deepcopy(model).train(dropout)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-4), []
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for _ in range(count):
                loss = objective(model, case, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses, dict(model.named_parameters())

    (losses, after), (expected, expected_after) = run(own, True), run(theirs, True)
    equal = sum(torch.equal(after[name], x) for name, x in expected_after.items() if name in after)
    detail = f"{count} steps of AdamW, {equal} of {len(expected_after)} parameters equal to the last bit after them"
    if losses == expected and equal == len(expected_after) == len(after):
        return summary("same bits", detail)
    losses, expected = (run(steps.in_float64(model), False)[0] for model in (own, theirs))
    error = max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(losses, expected, strict=True))
    return summary("rounding" if error < _FLOOR else "bug", f"{detail}; losses in float64 differ by {error:.1e}")


def invariance(side: Side, cases: Sequence[Case], longest: int) -> dict[str, Any]:
    """How far results change, in ulps, with what should not matter; a change that stays in float64 is a bug."""
    case = next((c for c in cases if c.tokens == 9 and c.real is None), None)
    case = case or next((c for c in cases if c.real is None or bool(c.real.all())), cases[0])
    exact = None if side.module is None else Side(side.name, steps.in_float64(side.module), torch.float64)
    base, truth = side.outputs(case), {} if exact is None else exact.outputs(case)
    found: dict[str, float] = {}
    bugs = []
    again = _variants(exact, case, longest) if exact is not None else iter(())
    for name, result in _variants(side, case, longest):
        tallies = [Tally(side.dtype) for _ in base]
        for tally, key in zip(tallies, base, strict=True):
            tally.add(_cut(result[key], base[key]), base[key])
        found[name] = max((tally.ulp for tally in tallies), default=0.0)
        twin = next(again, (name, {}))[1]
        stays = any(steps.relative(_cut(twin[key], truth[key]), truth[key]) > _FLOOR for key in truth)
        if stays or (exact is None and found[name] > _ULPS):
            bugs.append(name)
    changed = ", ".join(f"{name} {ulp:.2g}" for name, ulp in found.items() if ulp) or "nothing changes a bit"
    verdict = "bug" if bugs else "rounding" if any(found.values()) else "same bits"
    return {**summary(verdict, f"ulps: {changed}" + (f"; stays in float64: {', '.join(bugs)}" if bugs else "")),
            "ulps": found}  # fmt: skip


def _cut(value: Tensor, base: Tensor) -> Tensor:
    return value if value.shape == base.shape else value[:, : base.shape[1]]


def _variants(side: Side, case: Case, longest: int) -> Iterator[tuple[str, Outputs]]:
    """Each way that should not matter, and what comes of it, in the order and size of the case."""
    inputs = case.inputs
    B, T = inputs["input_ids"].shape[0], case.tokens

    def run(arguments: dict[str, Tensor], using: Callable[..., Any] | None = None) -> Outputs:
        return Side(side.name, using or side.run, side.dtype).outputs(Case(case.name, arguments))

    yield "twice", run(inputs)
    rows = [run({key: x[i : i + 1] for key, x in inputs.items()}) for i in range(B)]
    yield "alone", {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    turned = run({key: x.flip(0) for key, x in inputs.items()})
    yield "order", {key: x.flip(0) for key, x in turned.items()}
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

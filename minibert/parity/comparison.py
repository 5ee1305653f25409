"""`compare`: two implementations on the same inputs, and a verdict."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity import steps
from minibert.parity.answers import Answers, asked_in, nearest, pooled, scores
from minibert.parity.inputs import Case, as_cases
from minibert.parity.metrics import Outputs, Tally, named, relative
from minibert.parity.steps import Finding, Row, visible

LEVELS = ("bits", "exact", "answers")  # each weaker than the one before
CHECKS = ("gradients", "train", "invariance")


@dataclass
class Side:
    """One implementation: any callable that takes the arguments of a case, or its results by the case's number."""

    name: str
    run: Callable[..., Any] | dict[int, Outputs]
    dtype: torch.dtype = torch.float32
    invariance: dict[str, Any] | None = None  # of `checks`: measured once, however often the side is compared

    @property
    def module(self) -> nn.Module | None:
        return self.run if isinstance(self.run, nn.Module) else None

    @torch.no_grad()
    def outputs(self, case: Case, number: int = 0) -> Outputs:
        """See `named`."""
        if isinstance(self.run, dict):
            if number not in self.run:
                raise ValueError(f"{self.name} has no results for inputs[{number}]")
            return named(self.run[number])
        device = next((p.device for p in self.module.parameters()), None) if self.module is not None else None
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that [PAD] is asked without a mask, say
            return named(self.run(**{name: x if device is None else x.to(device) for name, x in case.inputs.items()}))


def numbered(tensors: Mapping[str, Tensor]) -> dict[int, Outputs]:
    """Tensors named 0.logits, 1.logits, ... by their number; those without are of number 0."""
    found: dict[int, Outputs] = {}
    for key, tensor in tensors.items():
        number, dot, name = key.partition(".")
        is_numbered = bool(dot) and number.isdigit()
        found.setdefault(int(number) if is_numbered else 0, {})[name if is_numbered else key] = tensor
    return found


def coarsest(dtypes: Any) -> torch.dtype:
    """The floating-point type with the fewest digits."""
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def as_side(thing: Any, argument: str) -> Side:
    """Raises TypeError for what is neither callable nor a mapping of tensors."""
    name = type(thing).__name__
    if isinstance(thing, Mapping):
        if not thing or not all(isinstance(value, Tensor) for value in thing.values()):
            raise TypeError(f"{argument} must map names to tensors, and not be empty")
        return Side(name, numbered(thing), coarsest(value.dtype for value in thing.values()))
    if not callable(thing):
        raise TypeError(f"{argument} must be a model, a callable or a mapping of tensors, got {name}")
    tensors = thing.parameters() if isinstance(thing, nn.Module) else ()
    dtype = next((p.dtype for p in tensors if p.is_floating_point()), getattr(thing, "dtype", None))
    return Side(name, thing, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def matched(*results: Outputs) -> list[tuple[str, list[Tensor]]]:
    """What all sides have by name, or in order where one side has no names. Raises ValueError if none match."""
    if common := [name for name in results[1] if all(name in each for each in results)]:
        return [(name, [each[name] for each in results]) for name in common]
    if not any("0" in each for each in results):
        raise ValueError(f"the two sides have no output in common: {', '.join(results[0])} and {', '.join(results[1])}")
    names = next((each for each in results if "0" not in each), results[0])
    return [(name, list(found)) for name, *found in zip(names, *(each.values() for each in results), strict=False)]


@dataclass(repr=False)
class Report:
    """What `compare` found. True in a condition if it passed, so that `assert report` says all.

    outputs, answers: of each output, over all cases; exact: the outputs of both sides in float64, where both can.
    rows: all steps. bug: the step and the lines of both sides where float64 does not make the difference fall.
    casts: where a side computes in less than float64 whatever its weights are, which explains what does not fall.
    truth: "reference" or "model", by whose float64 results errors are measured; None if there are none.
    """

    candidate: str
    reference: str
    require: str
    dtype: torch.dtype
    cases: list[str]
    outputs: dict[str, Tally] = field(default_factory=dict)
    exact: dict[str, Tally] = field(default_factory=dict)
    answers: dict[str, Answers] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    bug: Finding | None = None
    truth: str | None = None
    casts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str | None:
        """The strongest of "bits", "exact", "answers" that holds, or None."""
        tallies = self.outputs.values()
        if all(tally.bits for tally in tallies):
            return "bits"
        if all(tally.is_exact(both_ways=self.truth != "reference") for tally in tallies):
            return "exact"
        same = all(found.same == found.count for found in self.answers.values())
        return "answers" if same and self.answers and not any(tally.broken for tally in tallies) else None

    @property
    def verdict(self) -> str:
        """One of "same bits", "rounding", "bug", or "different" if no float64 can tell or NaN is on one side only."""
        tallies = self.outputs.values()
        if self.bug is not None or not all(check["passed"] for check in self.checks.values()):
            return "bug"
        if all(tally.bits for tally in tallies):
            return "same bits"
        if self.exact:
            floor = 1e-4 if self.casts else 1e-10
            stays = any(tally.broken or tally.rms > max(steps.FALL * self.outputs[name].rms, floor * tally.scale)
                        for name, tally in self.exact.items())  # fmt: skip
            return "bug" if stays else "different" if any(tally.broken for tally in tallies) else "rounding"
        if self.truth is None:
            return "different"
        if all(tally.is_exact(both_ways=True) for tally in tallies):
            return "rounding"
        # Far from its own float64 result, a model is imprecise, int8 say; a reference that is further away is another
        apart = any(tally.broken or (tally.reference_error or 0.0) > (tally.error or 0.0) for tally in tallies)
        return "bug" if apart or self.truth == "reference" else "different"

    @property
    def passed(self) -> bool:
        """A bug fails "bits" and "exact" even where it does not show on these inputs; at "answers" it is a warning."""
        reached = self.level is not None and LEVELS.index(self.level) <= LEVELS.index(self.require)
        return reached and (self.require == "answers" or self.verdict != "bug")

    @property
    def first(self) -> Finding | Row | None:
        """Where the bug is; else the first step that a side really computes whose bits differ."""
        return self.bug or next((row for row in self.rows if not row.accumulated.bits and not row.beside), None)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN and infinities, which JSON has not, are None."""
        names = ("candidate", "reference", "require", "level", "passed", "verdict", "checks", "cases")
        return finite({
            **{name: getattr(self, name) for name in names},
            "notes": [*self.notes, *self.casts],
            "dtype": str(self.dtype).removeprefix("torch."),
            "first": self.first and self.first.place(),
            "bug": self.bug and self.bug.to_dict(),
            "outputs": {name: tally.to_dict() for name, tally in self.outputs.items()},
            "answers": {name: found.to_dict() for name, found in self.answers.items()},
            "steps": [row.to_dict() for row in self.rows],
        })  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def __repr__(self) -> str:
        return "\n  ".join(summary(self.to_dict()))


def finite(value: Any) -> Any:
    """The same without NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: Exception) -> str:
    """What it says, shortly."""
    return (str(error) or type(error).__name__).splitlines()[0]


def summary(found: dict[str, Any]) -> list[str]:
    """The lines of a report, from `Report.to_dict`: what the terminal and every certificate show."""
    lines = [f"{'PASSED' if found['passed'] else 'FAILED'}  {found['candidate']} against {found['reference']}: "
             f"{found['verdict']}; asked for {found['require']}, holds {found['level'] or 'nothing'}"]  # fmt: skip
    if (first := found["first"]) is not None:
        bug = found["bug"]
        why = f" ({bug['why']}, on {bug['case']}, {bug['weights']} weights)" if bug else ""
        lines.append(f"{'bug' if bug else 'bits first differ'} at {first['step']}{why}: {first['line']} "
                     f"`{first['code']}`; there: {first['twin_line']} `{first['twin_code']}`")  # fmt: skip
    for name, x in found["outputs"].items():
        error = "" if x["error"] is None else f", rms error {x['error']:.1e} ({x['reference_error']:.1e} there)"
        lines.append(f"{name}: " + (x["broken"] or ("equal bits" if x["bits"] else
                                    f"max {x['max']:.1e}, {x['ulp'] or 0:.2g} ulp{error}")))  # fmt: skip
    for name, x in found["answers"].items():
        sizes = f"largest error {x['largest_error'] or 0:.1e}, half the smallest gap {x['half_smallest_gap'] or 0:.1e}"
        proof = "none can flip" if x["cannot_flip"] else f"{x['at_risk_count']} could: {'; '.join(x['at_risk'][:5])}"
        lines.append(f"{name}: {x['same']} of {x['count']} answers the same; {sizes}: {proof}")
    lines += [f"{name}: {check['summary']}" for name, check in found["checks"].items()]
    return lines + [f"note: {note}" for note in found["notes"]]


def compare(
    model: Any,
    reference: Any,
    inputs: Any = None,
    *,
    require: str = "exact",
    checks: Sequence[str] = ("gradients",),
) -> Report:
    """Compare two implementations of BERT, output by output and step by step.

    Args:
        model: the one in question: a torch module, or any callable that takes `inputs` as keyword arguments.
        reference: what it should equal: a module, a callable, or a mapping of the tensors it gave (`{"logits": ...}`;
            for several inputs `{"0.logits": ..., "1.logits": ...}`).
        inputs: a mapping of tensors (`input_ids`, `attention_mask`, ...), the tensor input_ids, or several of them;
            default: ids of every length under every mask, from the model's config.
        require: "bits" (equal to the last bit), "exact" (root mean square error to float64 at most 2 times the
            reference's own, 3 in half precision) or "answers" (top word, label, span, nearest text).
        checks: of "gradients" (every parameter's, where both are modules), "train" (three steps of AdamW with dropout)
            and "invariance" (to company, padding, threads and memory layout).

    Where both are torch modules with the same names of modules and parameters, differences are followed to the line of
    code. Rows of padding do not count. Modules are run in the mode they are in: dropout that is on is a difference.

    Raises:
        ValueError: `require` or `checks` names what is none, the sides have no output in common, or inputs is empty.
        TypeError: a side is not callable, or inputs is no mapping of tensors.
    """
    if require not in LEVELS:
        raise ValueError(f"require={require!r}: must be one of {', '.join(LEVELS)}")
    if unknown := set(checks) - set(CHECKS):
        raise ValueError(f"checks has {unknown.pop()!r}: must be of {', '.join(CHECKS)}")
    own, theirs = as_side(model, "model"), as_side(reference, "reference")
    config = getattr(own.run, "config", None) or getattr(theirs.run, "config", None)
    module = theirs.module if own.module is None else own.module  # a compiled one has no truth value
    cases = as_cases(inputs, config, type(module).__name__)
    report = comparison(own, theirs, cases, config, require)
    if checks:
        from minibert.parity.checks import run

        run(report, own, theirs, cases, config, checks)
    return report


@torch.no_grad()
def comparison(own: Side, theirs: Side, cases: list[Case], config: Any, require: str) -> Report:
    """`compare`, with names for both sides."""
    dtype = coarsest([own.dtype, theirs.dtype])
    report, exact = Report(own.name, theirs.name, require, dtype, [case.name for case in cases]), []
    for role, side in (("model", own), ("reference", theirs)):
        try:
            if side.module is not None:
                twin = Side(side.name, steps.in_float64(side.module, dtype), torch.float64)
                twin.outputs(cases[0])
                exact.append(twin)
                report.truth = role
        except Exception as error:  # foreign code may ask for its own type
            report.notes.append(f"{side.name} does not compute in float64: {first_line(error)}")
    worst = _run(report, [own, theirs, *exact], cases, config)
    if len(exact) == 2:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            _follow(report, *(side.module for side in (own, theirs, *exact)), steps.few(cases, worst))
    return report


def _run(report: Report, sides: list[Side], cases: list[Case], config: Any) -> Case:
    """All outputs, in the sides' own type and in float64, and the answers; the case that differs most in float64."""
    vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
    words, several = (getattr(config, name, None) for name in ("vocab_size", "problem_type"))
    worst, furthest, asking = cases[0], -1.0, asked_in(cases)
    for number, case in enumerate(cases):
        for name, found in matched(*(side.outputs(case, number) for side in sides)):
            actual, expected, *exact = (visible(name, each, case) for each in found)
            report.outputs.setdefault(name, Tally(report.dtype)).add(actual, expected, exact[-1] if exact else None)
            if len(exact) == 2:
                report.exact.setdefault(name, Tally(torch.float64)).add(*exact)
                if (error := relative(*exact)) > furthest:
                    furthest, worst = error, case
            if case not in asking:
                continue
            asked = [scores(name, each, case, words, several == "multi_label_classification") for each in found[:2]]
            if asked[1] is not None:
                report.answers.setdefault(name, Answers()).add(case.name, *asked)
            if name == "last_hidden_state" and actual.shape == expected.shape:
                for kept, each in zip(vectors, found, strict=False):
                    kept.append(pooled(each, case))
    if sum(map(len, vectors[0])) > 1:
        report.answers["nearest text"] = Answers()
        report.answers["nearest text"].add("text", *map(nearest, vectors))
    return worst


def _follow(
    report: Report, own: nn.Module, theirs: nn.Module, exact: nn.Module, twin: nn.Module, cases: list[Case]
) -> None:
    """Every step of both sides, and where they part in float64."""
    try:
        if all(p.device.type == "cpu" for module in (own, theirs) for p in module.parameters()):
            report.rows = steps.rows(own, theirs, cases, report.dtype)
            if not report.rows:
                report.notes.append("no step has the same name on both sides: outputs alone are compared")
                return
        names = [dict(side.named_parameters()).keys() for side in (exact, twin)]
        if different := sorted(names[0] ^ names[1]):
            report.notes.append(f"parameters on one side only: {', '.join(different[:5])}")
        report.bug = steps.diagnose(exact, twin, cases, report.dtype, report.casts)
        if report.bug is None and report.level not in ("bits", "exact"):
            report.bug = steps.coarse(report.rows)
    except Exception as error:  # someone's own model may do anything between its modules
        report.notes.append(f"outputs alone are compared: {first_line(error)}")

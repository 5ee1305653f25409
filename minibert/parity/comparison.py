"""`compare`: two implementations on the same inputs, and a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity import steps
from minibert.parity.answers import Answers, asked_in, nearest, pooled, scores
from minibert.parity.inputs import Case, as_cases
from minibert.parity.metrics import Tally
from minibert.parity.steps import Diagnosis, Finding, Row

LEVELS = ("bits", "exact", "answers")  # each weaker than the one before
_SMALL = 64  # tokens up to which steps are looked at
Outputs = dict[str, Tensor]


@dataclass
class Side:
    """One implementation: any callable that takes the arguments of a case, or its results, `golden`."""

    name: str
    run: Callable[..., Any] | None
    dtype: torch.dtype = torch.float32
    golden: Mapping[str, Tensor] | None = None

    @property
    def module(self) -> nn.Module | None:
        return self.run if isinstance(self.run, nn.Module) else None

    @torch.no_grad()
    def outputs(self, case: Case, number: int = 0) -> Outputs:
        """All results that are numbers, by name; by position ("0", "1") where they have none."""
        if self.golden is not None:
            start = f"{number}."
            found = {key[len(start) :]: value for key, value in self.golden.items() if key.startswith(start)}
            return {key: value for key, value in (found or self.golden).items() if value.is_floating_point()}
        device = next((p.device for p in self.module.parameters()), None) if self.module is not None else None
        result = self.run(**{name: x if device is None else x.to(device) for name, x in case.inputs.items()})
        if not hasattr(result, "items"):
            result = {str(i): x for i, x in enumerate(result if isinstance(result, tuple | list) else [result])}
        tensors = {key: torch.as_tensor(x).cpu() for key, x in result.items() if hasattr(x, "shape")}
        return {key: value.detach() for key, value in tensors.items() if value.is_floating_point()}


def as_side(thing: Any, name: str, argument: str) -> Side:
    """Raises TypeError for what is neither callable nor a mapping of tensors."""
    if isinstance(thing, Side):
        return thing
    if isinstance(thing, Mapping):
        if not thing or not all(isinstance(value, Tensor) for value in thing.values()):
            raise TypeError(f"{argument} must map names to tensors, and not be empty")
        floats = [value.dtype for value in thing.values() if value.is_floating_point()]
        return Side(name, None, max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32), thing)
    if not callable(thing):
        raise TypeError(f"{argument} must be a model, a callable or a mapping of tensors, got {type(thing).__name__}")
    parameters = thing.parameters() if isinstance(thing, nn.Module) else ()
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), getattr(thing, "dtype", torch.float32))
    return Side(name, thing, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def matched(actual: Outputs, expected: Outputs) -> list[tuple[str, Tensor, Tensor]]:
    """Results of both sides by name, or in order where one side has no names. Raises ValueError if none match."""
    both = [name for name in expected if name in actual and name != "loss"]
    if both:
        return [(name, actual[name], expected[name]) for name in both]
    if "0" in expected or "0" in actual:
        names = list(expected) if "0" in actual else list(actual)
        return [(name, a, b) for name, a, b in zip(names, actual.values(), expected.values(), strict=False)]
    raise ValueError(f"the two sides have no output in common: {', '.join(actual)} and {', '.join(expected)}")


@dataclass(repr=False)
class Report:
    """What `compare` found. True in a condition if it passed, so that `assert report` says all.

    verdict: "same bits"; "rounding"; "bug" - float64 does not make the difference fall -; or "different" where neither
    side can compute in float64. level: the strongest of "bits", "exact", "answers" that holds, or None. first: the step
    and the lines of both sides where the bug is, else where bits first differ. rows: all steps.
    """

    candidate: str
    reference: str
    require: str
    dtype: str
    level: str | None
    verdict: str
    outputs: dict[str, Tally]
    answers: dict[str, Answers]
    rows: list[Row]
    bug: Finding | None
    cases: list[str]
    notes: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """A bug fails "bits" and "exact" even where it does not show on these inputs; at "answers" it is a warning."""
        reached = self.level is not None and LEVELS.index(self.level) <= LEVELS.index(self.require)
        bugs = self.verdict == "bug" or any(check.get("verdict") == "bug" for check in self.checks.values())
        failed = any(check.get("passed") is False for check in self.checks.values())
        return reached and (self.require == "answers" or not (bugs or failed))

    @property
    def first(self) -> Finding | Row | None:
        return self.bug or steps.first_difference(self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def to_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "candidate": self.candidate, "reference": self.reference, "dtype": self.dtype, "require": self.require,
            "level": self.level, "passed": self.passed, "verdict": self.verdict,
            "first": None if first is None else {"step": getattr(first, "step", None) or first.name,
                                                 **{key: getattr(first, key) for key in _PLACE}},
            "bug": None if self.bug is None else self.bug.to_dict(),
            "outputs": {name: tally.to_dict() for name, tally in self.outputs.items()},
            "answers": {name: found.to_dict() for name, found in self.answers.items()},
            "steps": [row.to_dict() for row in self.rows],
            "checks": self.checks, "cases": self.cases, "notes": self.notes,
        }  # fmt: skip

    def to_json(self) -> str:
        """Numbers are numbers; NaN and infinities, which JSON has not, are null."""
        return json.dumps(plain(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)

    def __repr__(self) -> str:
        lines = [f"{'PASSED' if self.passed else 'FAILED'}  {self.candidate} against {self.reference}: {self.verdict}; "
                 f"asked for {self.require}, holds {self.level or 'nothing'}"]  # fmt: skip
        for name, tally in self.outputs.items():
            error = "" if tally.error is None else f", rms error {tally.error:.1e} ({tally.reference_error:.1e} there)"
            distance = "equal bits" if tally.bits else f"max {tally.max:.1e}, {tally.ulp:.2g} ulp{error}"
            lines.append(f"  {name}: {distance}" + (f", {tally.broken}" if tally.broken else ""))
        for name, found in self.answers.items():
            proof = "none can flip" if found.cannot_flip else f"{len(found.at_risk)} could flip"
            lines.append(f"  {name}: {found.same} of {found.count} answers the same, {proof}")
        if (first := self.first) is not None:
            what = "bug at" if self.bug else "bits first differ at"
            name = getattr(first, "step", None) or first.name
            lines.append(f"  {what} {name}: {first.line} `{first.code}`; there: {first.twin_line} `{first.twin_code}`")
        for name, check in self.checks.items():
            lines.append(f"  {name}: {check.get('summary', '')}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


_PLACE = ("line", "code", "twin_line", "twin_code")


def plain(value: Any) -> Any:
    """The same without NaN and infinities."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value


def compare(model: Any, reference: Any, inputs: Any = None, *, require: str = "exact") -> Report:
    """Compare two implementations of BERT, output by output and step by step.

    Args:
        model: the one in question: a torch module, or any callable that takes `inputs` as keyword arguments.
        reference: what it should equal: a module, a callable, or a mapping of the tensors it gave (`{"logits": ...}`;
            for several inputs `{"0.logits": ..., "1.logits": ...}`).
        inputs: a mapping of tensors (`input_ids`, `attention_mask`, ...), the tensor input_ids, or several of them;
            default: ids of every length under every mask, from the model's config.
        require: "bits" (equal to the last bit), "exact" (root mean square error to float64 at most 2 times the
            reference's own, 3 in half precision) or "answers" (top word, label, span, nearest text).

    Where both are torch modules with the same names of modules and parameters, differences are followed to the line of
    code. Rows of padding do not count. Modules are run in the mode they are in: dropout that is on is a difference.

    Raises:
        ValueError: `require` is none of the levels, the sides have no output in common, or inputs is empty.
        TypeError: a side is not callable, or inputs is no mapping of tensors.
    """
    if require not in LEVELS:
        raise ValueError(f"require={require!r}: must be one of {', '.join(LEVELS)}")
    own = as_side(model, type(model).__name__, "model")
    theirs = as_side(reference, type(reference).__name__, "reference")
    config = getattr(own.run, "config", None) or getattr(theirs.run, "config", None)
    cases = as_cases(inputs, config, type(own.module or theirs.module).__name__)
    return comparison(own, theirs, cases, config, require)


@torch.no_grad()
def comparison(own: Side, theirs: Side, cases: list[Case], config: Any, require: str) -> Report:
    """`compare`, with names for both sides."""
    return _Comparison(own, theirs, cases, config).report(require)


class _Comparison:
    def __init__(self, own: Side, theirs: Side, cases: list[Case], config: Any):
        self.own, self.theirs, self.cases, self.notes = own, theirs, cases, []
        self.dtype = max(own.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        self.own64, self.theirs64 = self._exact(own), self._exact(theirs)
        self.several = getattr(config, "problem_type", None) == "multi_label_classification"
        self.words = getattr(config, "vocab_size", None)
        self.outputs: dict[str, Tally] = {}
        self.falls: dict[str, Tally] = {}  # the same comparison in float64
        self.answers: dict[str, Answers] = {}
        self.worst = cases[0]

    def _exact(self, side: Side) -> Side | None:
        if side.module is None:
            return None
        try:
            return Side(side.name, steps.in_float64(side.module, self.dtype), torch.float64)
        except (RuntimeError, ValueError, TypeError) as error:
            self.notes.append(f"{side.name} does not compute in float64: {str(error).splitlines()[0]}")
            return None

    def report(self, require: str) -> Report:
        self._forward()
        rows, diagnosis = self._steps()
        self.notes += diagnosis.notes
        verdict = self._verdict(diagnosis)
        return Report(self.own.name, self.theirs.name, require, str(self.dtype).removeprefix("torch."), self._level(),
                      verdict, self.outputs, self.answers, rows, diagnosis.bug, [case.name for case in self.cases],
                      list(dict.fromkeys(self.notes)))  # fmt: skip

    def _forward(self) -> None:
        vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
        worst, asking = -1.0, asked_in(self.cases)
        for number, case in enumerate(self.cases):
            pairs = matched(self.own.outputs(case), self.theirs.outputs(case, number))
            mine64 = self.own64.outputs(case) if self.own64 else {}
            their64 = self.theirs64.outputs(case) if self.theirs64 else {}
            truths = their64 or mine64
            for position, (name, actual, expected) in enumerate(pairs):
                shown, wanted = (steps.visible(name, each, case) for each in (actual, expected))
                truth = truths.get(name, next(iter(truths.values())) if position == 0 and truths else None)
                truth = None if truth is None else steps.visible(name, truth, case)
                self.outputs.setdefault(name, Tally(self.dtype)).add(shown, wanted, truth)
                if name in mine64 and name in their64:
                    exact = [steps.visible(name, each[name], case) for each in (mine64, their64)]
                    self.falls.setdefault(name, Tally(torch.float64)).add(*exact)
                    if (error := steps.relative(*exact)) > worst:
                        worst, self.worst = error, case
                if not any(case is each for each in asking):
                    continue
                asked = [scores(name, each, case, self.words, self.several) for each in (actual, expected)]
                if asked[1] is not None:
                    self.answers.setdefault(name, Answers()).add(case.name, *asked)
                if name == "last_hidden_state" and actual.shape == expected.shape:
                    for kept, each in zip(vectors, (actual, expected), strict=True):
                        kept.append(pooled(each, case))
        if sum(map(len, vectors[0])) > 1:
            self.answers["nearest text"] = Answers()
            self.answers["nearest text"].add("text", *map(nearest, vectors))

    def _steps(self) -> tuple[list[Row], Diagnosis]:
        if self.own64 is None or self.theirs64 is None:
            return [], Diagnosis()
        chosen, modules = few(self.cases, self.worst), (self.own.module, self.theirs.module)
        try:
            here = all(p.device.type == "cpu" for module in modules for p in module.parameters())
            rows = steps.rows(*modules, chosen, self.dtype) if here else []
            if here and not rows:
                return [], Diagnosis(notes=["no step has the same name on both sides: outputs alone are compared"])
            return rows, steps.diagnose(self.own64.module, self.theirs64.module, chosen, self.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            return [], Diagnosis(notes=[f"outputs alone are compared: {str(error).splitlines()[0]}"])

    def _verdict(self, diagnosis: Diagnosis) -> str:
        if diagnosis.bug is not None:
            return "bug"
        if all(tally.bits for tally in self.outputs.values()):
            return "same bits"
        if self.falls:
            floor = 1e-4 if any("computes in" in note for note in diagnosis.notes) else 1e-10
            stays = [tally.broken or tally.rms > max(steps.FALL * self.outputs[name].rms, floor * tally.scale)
                     for name, tally in self.falls.items()]  # fmt: skip
            return "bug" if any(stays) else "different" if self._is_broken() else "rounding"
        if self.own64 is None and self.theirs64 is None:
            return "different"
        near = all(tally.is_exact(both_ways=True) for tally in self.outputs.values())
        return "rounding" if near else "bug"

    def _is_broken(self) -> bool:
        return any(tally.broken for tally in self.outputs.values())

    def _level(self) -> str | None:
        tallies = self.outputs.values()
        if all(tally.bits for tally in tallies):
            return "bits"
        if all(tally.is_exact(both_ways=self.theirs64 is None) for tally in tallies):
            return "exact"
        same = all(found.same == found.count for found in self.answers.values())
        return "answers" if same and self.answers and not self._is_broken() else None


def few(cases: Sequence[Case], worst: Case) -> list[Case]:
    """Cases that steps are followed on: a few short ones with and without padding, and the worst."""
    small = sorted((case for case in cases if 1 < case.tokens <= _SMALL), key=lambda case: case.tokens)
    padded = [case for case in small if case.real is not None and not bool(case.real.all())]
    whole = [case for case in small if not any(case is each for each in padded)]
    chosen = [*padded[:1], *padded[1:][-2:], *whole[:1], *whole[1:][-1:]] or list(cases[:1])
    return chosen if any(case is worst for case in chosen) else [*chosen, worst]

"""What a comparison found, and what it means: the level that holds, rounding or bug, passed or failed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from minibert.parity import steps
from minibert.parity.answers import Answers
from minibert.parity.metrics import Tally
from minibert.parity.steps import Finding, Row

LEVELS = ("bits", "exact", "answers")  # each weaker than the one before


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

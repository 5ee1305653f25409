"""`compare`: two implementations on the same inputs, and a verdict."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity import steps
from minibert.parity.answers import Answers, asked_in, nearest, pooled, scores
from minibert.parity.checks import run as run_checks
from minibert.parity.inputs import Case, as_cases
from minibert.parity.metrics import Tally, relative
from minibert.parity.sides import Side, as_side, coarsest, matched
from minibert.parity.steps import visible
from minibert.parity.verdict import LEVELS, Report, first_line

CHECKS = ("gradients", "train", "invariance")


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
        run_checks(report, own, theirs, cases, config, checks)
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

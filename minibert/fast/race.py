"""A race of candidates that compute the same: who is wrong is out, who is fastest wins, and a receipt says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Candidates = Mapping[str, Callable[[], Tensor]]
ROUNDS = 7, 25  # at least, at most: as many as pass in
SECONDS = 0.3


def race(
    candidates: Candidates, allowed: Mapping[str, float], clock: Callable[[Candidates], dict[str, float]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of each candidate that is right, and for the others what is wrong with them, both by name.

    The first candidate is right by definition. allowed: how far from its result another's may be, in units of the
    largest magnitude in it.
    """
    expected, right, obstacles = None, {}, {}
    for name, run in candidates.items():
        try:
            result = run().float()
        except Exception as failure:  # an operation that this build, CPU or GPU does not have: the others remain
            if expected is None:
                raise
            obstacles[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]:.80}"
            continue
        if expected is None:
            expected = result
        error = float((result - expected).abs().max() / expected.abs().max())
        if error <= allowed.get(name, 0.0):
            right[name] = run
        else:
            obstacles[name] = f"wrong by {error:.1e} of the largest value"
    times = clock(right)
    return times, obstacles | {name: "could not be timed" for name in right if name not in times}


def wall_clock(candidates: Candidates) -> dict[str, float]:
    """The best of some rounds, in turn, so that whatever else the machine does meets all of them alike."""
    best = dict.fromkeys(candidates, float("inf"))
    began, (least, most) = time.perf_counter(), ROUNDS
    with torch.no_grad():
        for number in range(most):
            if number >= least and time.perf_counter() - began > SECONDS:
                break
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
    return best

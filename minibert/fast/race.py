"""A race of candidates that compute the same: who is wrong is out, who is fastest wins, and a receipt says why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Candidates = Mapping[str, Callable[[], Tensor]]
ROUNDS = 7  # at least, and until as many in a row have made nobody faster by
IMPROVEMENT = 0.02  # of its best time
SECONDS = 1.5  # at most: a machine that does other work may settle late


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
    """The best of some rounds, in turn, so that whatever else the machine does meets all of them alike.

    What wins may be compiled and kept, so no time is given up while rounds still get faster.
    """
    best = dict.fromkeys(candidates, float("inf"))
    began, since = time.perf_counter(), 0
    with torch.no_grad():
        while since < ROUNDS and time.perf_counter() - began < SECONDS:
            since += 1
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if seconds < (1 - IMPROVEMENT) * best[name]:
                    since = 0
                best[name] = min(best[name], seconds)
    return best

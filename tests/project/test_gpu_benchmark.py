"""benchmarks/gpu.py runs: every section, its comparisons of answers included, on tiny shapes without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_dry_run():
    pytest.importorskip("triton")
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    with open(done.stdout.split("all done: ")[1].strip(), newline="") as file:
        rows = list(csv.DictReader(file))
    sections = {row["benchmark"] for row in rows}
    assert sections == {f"gpu {name}" for name in "peak accuracy full natural latency training kernels".split()}
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_refusals():
    assert "no section fast: there are peak, accuracy" in run("--dry-run", "--only", "fast").stderr
    assert "no CUDA device: --dry-run" in run().stderr

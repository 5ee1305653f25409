"""What every benchmark shares: the machine's description, timing of contenders in turn, rows of a CSV file.

Correctness comes first: `compare` refuses to time a contender whose answer is not within its own tolerance. Then all
contenders run one after the other, round after round, so that whatever else the machine does meets all of them alike;
what is reported are medians, their spread, and ratios to a baseline of the same run.
"""

from __future__ import annotations

import csv
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
STARTED = datetime.now().isoformat(timespec="minutes")  # of this run
PEERS = ("torch", "transformers", "onnxruntime", "openvino", "nncf", "sentence-transformers")
_PAUSE = 0.01  # seconds between contenders: idle threads of the last one stop spinning


def cpu_name() -> str:
    """As the system names it, with its family and model, since cloud machines hide the marketing name."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def machine() -> dict[str, Any]:
    """Date, processor, threads and versions: the first columns of every row."""
    versions = []
    for package in PEERS:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "date": STARTED,
        "device": device,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "versions": ", ".join(versions),
    }


@dataclass
class Contender:
    """run: the work to time. error: how far its answer is from the reference's, and tolerance: how far it may be."""

    name: str
    run: Callable[[], Any]
    tolerance: float | None = None
    error: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median


def largest_error(answer: list[Tensor], reference: list[Tensor]) -> float:
    """The largest absolute difference over pairs of tensors."""
    pairs = zip(answer, reference, strict=True)
    return max(float((ours.double() - theirs.double()).abs().max()) for ours, theirs in pairs)


def check(contender: Contender, reference: list[Tensor]) -> None:
    """Run once and store the error. Raises AssertionError beyond the contender's tolerance."""
    contender.error = largest_error(contender.run(), reference)
    if contender.tolerance is not None and not contender.error <= contender.tolerance:
        raise AssertionError(f"{contender.name}: off by {contender.error:.2e}, allowed {contender.tolerance:.0e}")


def alternate(contenders: list[Contender], rounds: int, warmup: int = 1) -> None:
    """Time each contender once a round, `rounds` times over, after `warmup` untimed rounds."""
    for number in range(warmup + rounds):
        for contender in contenders:
            time.sleep(_PAUSE)
            start = time.perf_counter()
            contender.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                contender.seconds.append(time.perf_counter() - start)


def rows(benchmark: str, shape: str, contenders: list[Contender], baseline: str, **more: Any) -> list[dict[str, Any]]:
    """One row a contender: ratio > 1 means so many times faster than the baseline of the same run."""
    base = next(contender.median for contender in contenders if contender.name == baseline)
    return [
        {
            **machine(),
            "benchmark": benchmark,
            "shape": shape,
            "contender": contender.name,
            "median_ms": round(contender.median * 1e3, 4),
            "spread": round(contender.spread, 4),
            "rounds": len(contender.seconds),
            "baseline": baseline,
            "ratio": round(base / contender.median, 3),
            "error": "" if contender.error is None else f"{contender.error:.2e}",
            **more,
        }
        for contender in contenders
    ]


def show(table: list[dict[str, Any]]) -> None:
    """Print what rows() gives, fastest first."""
    print(f"\n{table[0]['benchmark']}, {table[0]['shape']} ({table[0]['device']}, {table[0]['threads']} threads)")
    for row in sorted(table, key=lambda row: row["median_ms"]):
        error = f"   error {row['error']}" if row["error"] else ""
        print(
            f"  {row['contender']:32} {row['median_ms']:10.3f} ms  +-{row['spread']:6.1%}  {row['ratio']:7.3f} x{error}"
        )


def append(table: list[dict[str, Any]], file: Path) -> None:
    """Add rows to a CSV file, which is made with a header if need be. ValueError if its columns are others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = list(table[0])
    if file.exists():
        with file.open(newline="") as stream:
            header = next(csv.reader(stream), columns)
        if header != columns:
            raise ValueError(f"{file} has the columns {header}, these rows have {columns}")
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(table)


def compare(
    benchmark: str,
    shape: str,
    contenders: list[Contender],
    baseline: str,
    rounds: int,
    reference: list[Tensor] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Check, time in turn, print; returns the rows."""
    if reference is not None:
        for contender in contenders:
            check(contender, reference)
    alternate(contenders, rounds, warmup=1 if reference is None else 0)  # the check was a first run
    table = rows(benchmark, shape, contenders, baseline, **more)
    show(table)
    return table

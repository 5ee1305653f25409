"""The metrics of a run as a picture."""

from __future__ import annotations

import os
from typing import Any

from minibert.training.run import read_metrics
from minibert.weights import files


def plot_curves(metrics: str | os.PathLike[str], image: str | os.PathLike[str]) -> None:
    """Draw losses and accuracies of both tasks over the steps, training and validation, from a metrics.jsonl to a PNG.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    names = (("mlm_loss", "nsp_loss"), ("mlm_accuracy", "nsp_accuracy"))
    for panel, name in zip(panels.flat, (name for row in names for name in row), strict=True):
        _curve(panel, records, name, color="0.65", linewidth=0.8, label="training")
        _curve(panel, records, f"validation_{name}", color="tab:blue", marker=".", label="validation")
        panel.set_title(name.replace("mlm", "MLM").replace("nsp", "NSP").replace("_", " "))
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("step")
    panels[0, 0].legend()
    with files.replacing(image) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _curve(panel: Any, records: list[dict[str, Any]], name: str, **style: Any) -> None:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), **style)

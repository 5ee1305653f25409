"""Tables and plots of the latest rows in results/, for README.md.

python benchmarks/report.py            # writes results/report.md and results/*.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from common import RESULTS

Row = dict[str, Any]


def latest(file: Path) -> list[Row]:
    """The rows of each shape's last run: contenders are compared within a run only."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    last = {(row["benchmark"], row["shape"]): row["date"] for row in rows}
    return [row for row in rows if row["date"] == last[row["benchmark"], row["shape"]]]


def by_shape(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each shape, fastest first."""
    shapes = dict.fromkeys(row["shape"] for row in rows)
    return {
        shape: sorted((row for row in rows if row["shape"] == shape), key=lambda row: float(row["median_ms"]))
        for shape in shapes
    }


def table(rows: list[Row]) -> str:
    lines = [f"| contender | median ms | spread | times {rows[0]['baseline']} | error |", "|---|---|---|---|---|"]
    for row in rows:
        name = f"**{row['contender']}**" if row["contender"].startswith("minibert") else row["contender"]
        lines.append(
            f"| {name} | {float(row['median_ms']):.1f} | {float(row['spread']):.1%} | {float(row['ratio']):.2f} "
            f"| {row['error'] or '-'} |"
        )
    return "\n".join(lines)


def plot(title: str, rows: list[Row], file: Path) -> None:
    """How many times faster than the baseline, a bar a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows[::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.2))
    colours = ["tab:orange" if row["contender"].startswith("minibert") else "tab:gray" for row in rows]
    bars = axis.barh([row["contender"] for row in rows], [float(row["ratio"]) for row in rows], color=colours)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.margins(x=0.1, y=0.02)
    axis.set(xlabel=f"times faster than {rows[0]['baseline']}")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def roofline(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open(newline="") as stream:
        rows = list({(row["dtype"], row["what"]): row for row in csv.DictReader(stream)}.values())
    lines = ["## Share of the matrix-product roof", "", "| dtype | what | GFLOP/s | share |", "|---|---|---|---|"]
    lines += [f"| {r['dtype']} | {r['what']} | {float(r['gflops']):.0f} | {float(r['share']):.1%} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts = ["# Results"]
    for name in ("throughput", "latency"):
        for shape, rows in by_shape(latest(options.results / f"{name}.csv")).items():
            title = f"{name}, {shape}"
            where = f"{rows[0]['date']}, {rows[0]['device']}, {rows[0]['threads']} threads. {rows[0]['versions']}"
            parts += [f"## {title}", where, table(rows)]
            plot(title, rows, options.results / f"{name}-{shape.split(':')[0].replace(' ', '')}.png")
    parts.append(roofline(options.results / "roofline.csv"))
    (options.results / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"wrote {options.results / 'report.md'}")


if __name__ == "__main__":
    main()

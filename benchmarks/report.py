"""Tables and plots of the latest rows of results/inference.csv, for README.md and docs/benchmarks.md.

python benchmarks/report.py            # writes results/report.md and results/inference-*.png
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from common import RESULTS

Row = dict[str, str]


def latest(file: Path) -> list[Row]:
    """The rows of the last run of each size, dtype and work: contenders are compared within a run only."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    last = {(row["size"], row["dtype"], row["work"]): row["date"] for row in rows}
    return [row for row in rows if row["date"] == last[row["size"], row["dtype"], row["work"]]]


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by size and dtype."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["size"], row["dtype"]), []).append(row)
    return found


def quality(row: Row) -> str:
    """What stands in the column of errors."""
    cells = [f"{float(row['error']):.1e}"] if row["error"] != "nan" else []
    if row["cosine_mean"] != "nan":
        cells.append(f"{float(row['cosine_mean']):.4f}, {float(row['cosine_least']):.4f}")
    return "; ".join(cells) or "-"


def table(rows: list[Row]) -> str:
    """Milliseconds, a row a contender and a column a work, the quickest in bold; the last row: best peer / minibert."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cell = {(row["contender"], row["work"]): row for row in rows}
    best = {w: min(float(cell[n, w]["median_ms"]) for n in names if (n, w) in cell) for w in works}
    lines = ["| | " + " | ".join(works) + " | error; cosine, mean and least |", "|---" * (len(works) + 2) + "|"]
    for name in names:
        values = []
        for work in works:
            row = cell.get((name, work))
            text = "-" if row is None else f"{float(row['median_ms']):.4g}"
            values.append(f"**{text}**" if row is not None and float(row["median_ms"]) == best[work] else text)
        own = next(row for row in rows if row["contender"] == name)
        lines.append(f"| {name} | {' | '.join(values)} | {quality(own)} |")
    ratios = [cell[names[0], work]["best_peer_over_this"] for work in works]
    lines.append(f"| best peer / {names[0]} | {' | '.join(ratios)} | |")
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Milliseconds by work, a bar a contender, minibert's in colour."""
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(2.6 * len(works), 3.2), layout="constrained")
    for axis, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works, strict=True):
        own = sorted((row for row in rows if row["work"] == work), key=lambda row: -float(row["median_ms"]))
        colours = ["tab:orange" if row["contender"].startswith("minibert") else "tab:gray" for row in own]
        bars = axis.barh([row["contender"] for row in own], [float(row["median_ms"]) for row in own], color=colours)
        axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
        axis.margins(x=0.25)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{work}, ms", fontsize=9)
    figure.suptitle(f"{rows[0]['size']}, {rows[0]['dtype']}: {rows[0]['device']}", fontsize=9)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts = ["# The encoder beside its peers"]
    for (size, dtype), rows in groups(latest(options.results / "inference.csv")).items():
        first = rows[0]
        where = (
            f"{first['date']}, {first['device']}, {first['threads']} threads, {first['rounds']} rounds; milliseconds."
        )
        parts += [f"## {size}, {dtype}", where, table(rows)]
        plot(rows, options.results / f"inference-{size}-{dtype}.png")
    (options.results / "report.md").write_text("\n\n".join([*parts, f"Versions: {rows[0]['versions']}"]) + "\n")
    print(f"wrote {options.results / 'report.md'}")


if __name__ == "__main__":
    main()

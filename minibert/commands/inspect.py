"""`minibert inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert inspect`."""
    parser.add_argument("model", nargs="?", help="a directory or a name on the Hub; default: the bundled model")
    terminal.add_revision(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor: status, type, shape, hash")
    parser.add_argument("--head", help="look at it with this head (see convert; default: what it was saved as)")


def run(arguments: Arguments) -> None:
    """What a checkpoint holds: the tree of modules, parameters, and what became of each tensor."""
    from minibert.weights.convert import inspect

    name = terminal.chosen_model(arguments)
    model, report = inspect(name, arguments.head, revision=arguments.revision)
    statuses = dict.fromkeys(tensor.status for tensor in report.tensors)
    counts = {status: len(report.named(status)) for status in statuses}
    loaded = [tensor for tensor in report.tensors if tensor.status == "loaded"]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in loaded})
    result: dict[str, Any] = {
        "model": str(name),
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtypes": dtypes,
        "config": model.config.to_dict(),
        "counts": counts,
    }
    lines = [repr(model), "", f"{model.num_parameters():,} parameters, stored as {' and '.join(dtypes)}"]
    lines += ["tensors: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    if arguments.json or arguments.tensors:
        result["tensors"] = report.to_dict()
        heading = ("tensor", "status", "dtype", "shape", "sha256", "name in file")
        lines += ["", *terminal.table([heading, *map(_row, result["tensors"])])]
    terminal.show(arguments, result, lines)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    source = "" if entry["source"] == entry["name"] else entry["source"] or ""
    shape = "x".join(map(str, entry["shape"]))
    return entry["name"], entry["status"], entry["dtype"] or "", shape, (entry["sha256"] or "")[:16], source

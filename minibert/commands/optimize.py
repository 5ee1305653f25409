"""`minibert optimize`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert optimize`."""
    parser.add_argument("model", nargs="?", help="a directory or a name on the Hub; default: the bundled model")
    terminal.add_revision(parser)
    terminal.add_dtype(parser, allowed=("float32", "bfloat16", "float16", "int8", "auto"))
    parser.add_argument("--explain", action="store_true", help="only say what is there and what it would cost")


def run(arguments: Arguments) -> None:
    """Compile a model's layers into one graph for this CPU, once; what runs such a model then finds it by itself.

    Kept in $MINIBERT_CACHE, $XDG_CACHE_HOME/minibert or ~/.cache/minibert, and shared by all models of one shape.
    """
    from minibert import BertModel, optimize

    model = BertModel.from_pretrained(terminal.chosen_model(arguments), revision=arguments.revision)
    fast = optimize(model, arguments.dtype, compile=None if arguments.explain else True)
    lines = fast.explain().splitlines()
    terminal.show(arguments, {"dtype": fast.plan.dtype, "receipts": lines}, lines)

"""`minibert embed`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="texts in UTF-8, one a line; - for standard input")
    terminal.add_model(parser, default="")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.npy", help="a float32 array, one row a line")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--prompt-name", help="put this prompt of the model before each text (query, document, ...)")
    terminal.add_compute(parser, allowed=("float32", "bfloat16", "int8", "auto"), default="float32")


def run(arguments: Arguments) -> None:
    """Embed a file of any size, line by line, into a .npy; run it again to go on after an interruption."""
    from minibert.embedding.files import run

    names = ("model", "normalize", "prompt_name", "dtype", "device", "revision")
    run(arguments.file, arguments.output, **{name: getattr(arguments, name) for name in names})

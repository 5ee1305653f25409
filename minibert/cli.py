"""The `minibert` command: finds the command asked for, runs it, and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from minibert.terminal import INTERRUPTED, add_output

# A command -> the module with its `add_arguments(parser)` and `run(arguments)`, see minibert/commands/__init__.py.
# These modules import torch only when they run.
COMMANDS = {
    "demo": "minibert.commands.demo",
    "fill-mask": "minibert.commands.fill_mask",
    "next-sentence": "minibert.commands.next_sentence",
    "pretraining-loss": "minibert.commands.pretraining_loss",
    "study": "minibert.commands.study",
    "inspect": "minibert.commands.inspect",
    "convert": "minibert.commands.convert",
    "optimize": "minibert.commands.optimize",
    "embed": "minibert.commands.embed",
    "pretrain": "minibert.pretraining.command",
    "finetune": "minibert.finetuning.command",
    "classify": "minibert.commands.classify",
    "ner": "minibert.commands.ner",
    "answer": "minibert.commands.answer",
    "parity": "minibert.parity.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (`parity`: 2) for an error told in one line, 130 after Ctrl-C.

    What the terminal cannot show is printed as escapes, so that no result is lost to it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status = arguments.run(arguments)
            sys.stdout.flush()  # here, where an error can still be told
        except KeyboardInterrupt:
            print("minibert: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader, `head` say, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes once more at its end
            return 0
        except Exception as error:
            if arguments.traceback:
                traceback.print_exc()
            print(f"minibert: {_one_line(error)}", file=sys.stderr)
            return getattr(arguments, "trouble", 1)
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, with their own arguments and those that all share."""
    from minibert import __version__

    parser = argparse.ArgumentParser(prog="minibert", description="BERT in plain PyTorch: small, exact, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = import_module(module)
        first_line = (command.run.__doc__ or "").splitlines()[0]
        subparser = commands.add_parser(name, help=first_line.rstrip("."), description=command.run.__doc__)
        command.add_arguments(subparser)
        add_output(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _one_line(error: Exception) -> str:
    """The message, with its kind where it alone would say too little."""
    text = " ".join(str(error).split())
    said = isinstance(error, (ValueError, TypeError, OSError, ImportError)) and text
    return text if said else f"{type(error).__name__}: {text}".rstrip(": ")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"minibert: warning: {' '.join(str(message).split())}", file=sys.stderr)

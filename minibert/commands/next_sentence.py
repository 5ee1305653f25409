"""`minibert next-sentence`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert next-sentence`."""
    add_pair(parser)
    terminal.add_model(parser)
    terminal.add_compute(parser)


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Two texts, A and B, that may follow each other."""
    parser.add_argument("text", metavar="A", help="the first text")
    parser.add_argument("text_pair", metavar="B", help="the text that may follow it")


def run(arguments: Arguments) -> None:
    """Does text B follow text A?"""
    from minibert.commands.pipelines import opened

    result = opened("next-sentence-prediction", arguments)((arguments.text, arguments.text_pair))
    meaning = {"IS_NEXT": "B follows A", "NOT_NEXT": "B comes from elsewhere"}
    rows = [(f"  {score:.4f}", name, meaning[name]) for name, score in result["probabilities"].items()]
    terminal.show(arguments, result, terminal.table(rows))

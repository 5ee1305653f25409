"""`minibert fill-mask`."""

from __future__ import annotations

import argparse
from typing import Any

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert fill-mask`."""
    terminal.add_texts(parser, "texts with one or several [MASK]")
    parser.add_argument("--top-k", type=int, default=5, help="answers for each mask (default 5)")
    parser.add_argument("--targets", nargs="+", metavar="WORD", help="score these words only")
    terminal.add_model(parser)
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The likeliest words at each [MASK] of a text."""
    from minibert.commands.pipelines import opened

    fill_mask = opened("fill-mask", arguments, top_k=arguments.top_k, targets=arguments.targets)
    terminal.show_answers(arguments, fill_mask, _rows, one_alone=True)


def _rows(text: str, result: list[Any]) -> list[str]:
    masks = [result] if isinstance(result[0], dict) else result
    rows = []
    for i, answers in enumerate(masks, 1):
        rows += [text + (f"   (mask {i} of {len(masks)})" if len(masks) > 1 else "")]
        rows += terminal.table(
            [(f"  {answer['score']:.4f}", answer["token_str"], answer["sequence"]) for answer in answers]
        )
    return rows

"""`minibert classify`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert classify`."""
    terminal.add_texts(parser, "texts to classify, each")
    parser.add_argument("--truncate", action="store_true", help="cut texts of more tokens than the model takes")
    terminal.add_model(parser, default="")
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The label of each text, by a fine-tuned classifier."""
    from minibert.commands.pipelines import opened

    classify = opened("text-classification", arguments, truncation=arguments.truncate)
    terminal.show_answers(
        arguments, classify, lambda text, result: [f"{result['score']:.4f}  {result['label']}  {text}"]
    )

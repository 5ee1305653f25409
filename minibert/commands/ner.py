"""`minibert ner`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert ner`."""
    terminal.add_texts(parser, "texts to tag, each")
    terminal.add_model(parser, default="")
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The entities in each text, by a fine-tuned tagger."""
    from minibert.commands.pipelines import opened

    tag = opened("token-classification", arguments, aggregation_strategy="first", stride=16)
    terminal.show_answers(
        arguments,
        tag,
        lambda text, found: [
            f"{each['score']:.4f}  {each['entity_group']}  {text[each['start'] : each['end']]}" for each in found
        ],
    )

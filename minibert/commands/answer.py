"""`minibert answer`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert answer`."""
    parser.add_argument("question", metavar="QUESTION", help="a question, in quotation marks")
    parser.add_argument("context", metavar="CONTEXT", help="the text that answers it")
    parser.add_argument("--top-k", type=int, default=1, help="answers (default 1)")
    terminal.add_model(parser, default="")
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The span of a text that answers a question, by a fine-tuned model."""
    from minibert.commands.pipelines import opened

    ask = opened("question-answering", arguments)
    found = ask(arguments.question, arguments.context, top_k=arguments.top_k)
    answers = found if isinstance(found, list) else [found]
    rows = [(f"{each['score']:.4f}", each["answer"]) for each in answers]
    terminal.show(arguments, answers, terminal.table(rows))

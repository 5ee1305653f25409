"""`minibert demo`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert demo`."""
    terminal.add_model(parser, default="bert-base from the Hub if reachable, else the bundled model")
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The three flows: fill-mask, next sentence, joint pretraining loss."""
    from minibert import demo

    result = demo.run(arguments.model, revision=arguments.revision, device=arguments.device, dtype=arguments.dtype)
    lines = demo.lines(result)
    for name in ("prediction_logits", "seq_relationship_logits"):
        logits = result["pretraining"].pop(name)
        result["pretraining"][f"{name}_shape"] = list(logits.shape)  # the numbers would be millions
    terminal.show(arguments, result, lines)

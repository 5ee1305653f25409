"""`minibert convert`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert convert`."""
    parser.add_argument("source", metavar="SOURCE", help="a directory or a name on the Hub")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the directory to write; what was there is replaced whole")
    terminal.add_dtype(parser, default="as in the source")
    parser.add_argument("--head", help="keep this head only: encoder, pretraining, masked-lm, next-sentence, ...")
    parser.add_argument("--verify", action="store_true", help="compare all outputs with transformers' (if installed)")
    terminal.add_revision(parser)


def run(arguments: Arguments) -> None:
    """Write any BERT checkpoint anew: config.json, safetensors with today's names, tokenizer files."""
    from minibert.weights.convert import convert

    report = convert(
        arguments.source,
        arguments.out_dir,
        dtype=arguments.dtype,
        head=arguments.head,
        verify=arguments.verify,
        revision=arguments.revision,
    )
    result = {
        "directory": arguments.out_dir,
        "tensors": len(report.named("loaded", "renamed")),
        "renamed": len(report.named("renamed")),
        "verified": arguments.verify,
    }
    verified = ", outputs verified to be equal" if arguments.verify else ""
    line = f"{arguments.out_dir}: {result['tensors']} tensors of the model, {result['renamed']} of them renamed"
    terminal.show(arguments, result, [line + verified])

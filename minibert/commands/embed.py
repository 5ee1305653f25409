"""`minibert embed`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert embed`."""
    parser.add_argument("file", metavar="FILE", help="texts in UTF-8, one a line (.gz, .xz too); - for standard input")
    terminal.add_model(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT.npy", help="a float32 array, one row a line")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--prompt-name", help="put this prompt of the model before each text (query, document, ...)")
    terminal.add_batch_size(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="embed on N processes; each has a copy of the model")
    terminal.add_compute(parser, allowed=("float32", "bfloat16", "int8", "auto"), default="float32")


def run(arguments: Arguments) -> None:
    """Embed a file of any size, line by line, into a .npy; run it again to go on after an interruption."""
    from minibert.embedding import SentenceEncoder, embed_file
    from minibert.embedding.files import partial, state

    name = terminal.chosen_model(arguments)
    if arguments.model is None:
        print("no --model: the bundled one was trained on masked words, not to tell texts apart", file=sys.stderr)
    encoder = SentenceEncoder.from_pretrained(
        name, revision=arguments.revision, device=arguments.device, dtype=arguments.dtype
    )
    from_standard_input = arguments.file == terminal.STANDARD_INPUT
    if from_standard_input:
        _say(arguments, "standard input cannot be resumed: if this is interrupted, it starts anew")
    elif state(arguments.output).exists():
        _say(arguments, f"{partial(arguments.output)} is there: going on")
    try:
        done = embed_file(
            encoder,
            arguments.file,
            arguments.output,
            show_progress_bar=terminal.shows_progress(arguments),
            processes=arguments.processes,
            batch_size=arguments.batch_size,
            normalize=arguments.normalize,
            prompt_name=arguments.prompt_name,
        )
    except KeyboardInterrupt:
        again = "" if from_standard_input else "; the same command goes on from there"
        print(f"\nwhat was finished is in {partial(arguments.output)}{again}", file=sys.stderr)
        raise
    resumed = f", {done.resumed} of them from before" if done.resumed else ""
    shown = f"{done.output}: {done.texts} texts{resumed}, {done.dimension} numbers each, float32"
    terminal.show(arguments, {"model": name, **asdict(done)}, [shown])
    if done.truncated:
        which = "1 text had" if done.truncated == 1 else f"{done.truncated} texts had"
        was = "was" if done.truncated == 1 else "were"
        print(f"{which} more than {done.max_seq_length} tokens and {was} cut", file=sys.stderr)


def _say(arguments: Arguments, text: str) -> None:
    if not arguments.quiet:
        print(text, file=sys.stderr)

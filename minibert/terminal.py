"""What all commands share: options of one spelling, texts that come in, results that go out.

Results go to standard output, and with --json they are all that goes there; warnings, errors and progress go to
standard error. Torch takes its time to import, so nothing here imports it: help is printed at once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any, BinaryIO

Arguments = argparse.Namespace

STANDARD_INPUT = "-"
PACKED = {".gz": gzip.open, ".xz": lzma.open}  # ends of the names of files that are unpacked
INTERRUPTED = 130  # the exit status after Ctrl-C: 128 and the number of SIGINT
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}  # short names of types


# Options


def add_model(parser: argparse.ArgumentParser, default: str = "the model bundled with minibert") -> None:
    """--model and --revision. `default` says what is used without it; "" where only a fine-tuned model will do."""
    says = f"default: {default}" if default else "required, and fine-tuned for this"
    parser.add_argument("--model", metavar="MODEL", help=f"a directory or a name on the Hub; {says}")
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """--revision, of a model on the Hub."""
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def add_compute(parser: argparse.ArgumentParser, **dtype: Any) -> None:
    """--device and --dtype, both None where not given, for a command that computes. `dtype`: see `add_dtype`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one, else the CPU")
    add_dtype(parser, **dtype)


def add_dtype(
    parser: argparse.ArgumentParser,
    *,
    allowed: Sequence[str] = ("float32", "bfloat16", "float16"),
    default: str = "that of the model's file",
) -> None:
    """--dtype: one of `allowed`, by its long name or its short one (bf16); the command gets the long one."""
    names = [f"{name} or {short}" for short, name in DTYPES.items() if name in allowed]
    names += [name for name in allowed if name not in DTYPES.values()]
    parser.add_argument(
        "--dtype",
        type=lambda name: DTYPES.get(name, name),
        choices=list(allowed),
        metavar="DTYPE",
        help=f"{', '.join(names)}; default: {default}",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """--batch-size, None where not given."""
    parser.add_argument("--batch-size", type=int, help="the most texts to compute at once; default: as many as pay")


def add_output(parser: argparse.ArgumentParser) -> None:
    """--json, --quiet and --traceback, which `minibert.cli` gives to every command."""
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress, no notices: the result, warnings and errors")
    parser.add_argument("--traceback", action="store_true", help="after an error, show where it arose")


def chosen_model(arguments: Arguments) -> str:
    """The model that was named, or the bundled one."""
    from minibert.weights import hub

    return arguments.model or hub.default_model()


def shows_progress(arguments: Arguments) -> bool | None:
    """False with --quiet; else None, which progress bars take for: where standard error is a terminal."""
    return False if getattr(arguments, "quiet", False) else None


# Texts


def add_texts(parser: argparse.ArgumentParser, what: str) -> None:
    """TEXT ... or --file FILE, of which `texts` takes one."""
    parser.add_argument("text", nargs="*", metavar="TEXT", help=f"{what}, in quotation marks")
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="texts in UTF-8, one a line (.gz and .xz too); - for standard input. Results come as they are ready; "
        "with --json, one line of JSON a text",
    )
    add_batch_size(parser)


def texts(arguments: Arguments) -> Iterable[str]:
    """The texts given as arguments, or the lines of the file, which are read as they are asked for."""
    if bool(arguments.text) == (arguments.file is not None):
        raise ValueError("give texts, or a file of them with --file (- for standard input)")
    return arguments.text or lines(arguments.file)


def lines(file: str) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends. ValueError, with its number, for one that is no line of text."""
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield text_of(line, number)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None


def text_of(line: bytes, number: int) -> str:
    """The line of this number, counted from 1, as text without its end.

    Raises ValueError for what is not UTF-8 and for what others would take for several lines: which line a result
    belongs to must not depend on who counts.
    """
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8: {error}") from None
    if "\0" in text:
        raise ValueError(f"line {number} is not UTF-8: it has a NUL byte, as UTF-16 and binary files have")
    if "\r" in text:
        raise ValueError(f"line {number} has a carriage return in it: end lines with a line feed")
    return text


def opened(file: str) -> BinaryIO:
    """A file for reading bytes: as it is, unpacked if its name ends in .gz or .xz, or standard input for "-"."""
    if file == STANDARD_INPUT:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    opener: Any = PACKED.get(Path(file).suffix.lower(), open)
    return opener(file, "rb")


# Results


def show(arguments: Arguments, result: Any, rows: Sequence[str]) -> None:
    """The result as JSON if asked for, else as readable lines."""
    print(_json(result, indent=2) if _wants_json(arguments) else "\n".join(rows))


def show_answers(
    arguments: Arguments,
    answer: Callable[[Iterator[str]], Iterable[Any]],
    rows: Callable[[str, Any], Sequence[str]],
    *,
    one_alone: bool = False,
) -> None:
    """The answer to each text of `texts`; `rows` makes readable lines of a text and its answer.

    Of texts given as arguments the JSON is a list, but with `one_alone` the answer itself where there is one text. Of a
    file each answer is shown as soon as it is there: with --json as one line.
    """
    given, again = tee(texts(arguments))
    answered = zip(answer(given), again, strict=False)  # answers first: it is they that raise what is wrong with a text
    if arguments.file is None:
        results, shown = [], []
        for result, text in answered:
            results.append(result)
            shown += rows(text, result)
        show(arguments, results[0] if one_alone and len(results) == 1 else results, shown)
        return
    for result, text in answered:
        if _wants_json(arguments):
            print(_json(result), flush=True)
        elif shown := rows(text, result):
            print("\n".join(shown), flush=True)


def notice(arguments: Arguments, text: str) -> None:
    """What is good to know but no result: not with --quiet, and with --json to standard error."""
    if not getattr(arguments, "quiet", False):
        print(text, file=sys.stderr if _wants_json(arguments) else sys.stdout)


def _wants_json(arguments: Arguments) -> bool:
    return getattr(arguments, "json", False)


def table(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Rows as aligned columns; the columns numbered in `right` are aligned to the right."""
    if not rows:
        return []
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    pad = [str.rjust if column in right else str.ljust for column in range(len(widths))]
    return ["  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(row)).rstrip() for row in cells]


def _json(result: Any, indent: int | None = None) -> str:
    """As itself where the terminal can show it, else with escapes, which are JSON too."""
    text = json.dumps(result, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(result, indent=indent)
    return text

"""Files to lines and records: CSV, TSV and JSON, decoded strictly. Errors name the file and the line.

What is not text in UTF-8 is refused by what it is; nothing is repaired or guessed.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLES, JSONS = (".csv", ".tsv", ".tab"), (".jsonl", ".ndjson", ".json")
DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
# How files begin that are no text in UTF-8, the longer beginnings first
_OTHERS = (
    (b"\xff\xfe\x00\x00", "text in UTF-32"), (b"\x00\x00\xfe\xff", "text in UTF-32"), (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"), (b"\x1f\x8b", "compressed (gzip)"), (b"\xfd7zXZ\x00", "compressed (xz)"),
    (b"BZh", "compressed (bzip2)"), (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    (b"PK\x03\x04", "a zip archive (such as .xlsx)"), (b"\xd0\xcf\x11\xe0", "an Office document (such as .xls)"),
    (b"PAR1", "Parquet"), (b"ARROW1", "Arrow"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)  # fmt: skip

Record = tuple[str, dict[str, Any]]  # FILE:LINE, and the values by their column's name


@dataclass(frozen=True)
class Layout:
    """How a table is laid out: the delimiter (None: by the file's name), and whether line 1 names the columns.

    Without such a line the columns are called "1", "2", ...
    """

    delimiter: str | None = None
    header: bool = True


def as_delimiter(text: str) -> str:
    """A delimiter as one character; it may be given by name. Raises ValueError for what cannot be one."""
    found = DELIMITERS.get(text.lower(), text)
    if len(found) != 1 or found in '"\r\n' or found.isalnum():
        names = ", ".join(name for name in DELIMITERS if name.isalpha())
        raise ValueError(f"--delimiter {text!r}: must be one character other than a quote, or one of {names}")
    return found


def check_kind(path: Path, layout: Layout) -> None:
    """Raises ValueError for a file whose name does not say what it is, or contradicts the layout."""
    suffix = path.suffix.lower()
    if suffix in JSONS and layout != Layout():
        raise ValueError(f"{path}: is JSON by its name, which has no delimiter and no header line")
    if suffix not in (*TABLES, *JSONS) and layout.delimiter is None:
        raise ValueError(f"{path}: must be a file of type {', '.join((*TABLES, *JSONS))}, or give --delimiter")


def read_records(path: Path, layout: Layout | None = None) -> Iterator[Record]:
    """The records of a file, by its name a table or JSON: objects one a line, or one array of them.

    Raises ValueError with FILE:LINE for what is damaged or ambiguous, as a column that is named twice.
    """
    layout = layout or Layout()
    check_kind(path, layout)
    return _json_records(path) if path.suffix.lower() in JSONS else _table_records(path, layout)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """FILE:LINE and the line with its end. Only a line feed ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if number == 1:
                kind = next((kind for beginning, kind in _OTHERS if line.startswith(beginning)), None)
                if kind is not None:
                    raise ValueError(f"{place}: the file is {kind}; text in UTF-8 is needed")
            if b"\0" in line:
                raise ValueError(f"{place}: a NUL byte; text in UTF-8 is needed, and this may be UTF-16 or no text")
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8: {error}; save the file as UTF-8") from None


def is_blank(text: str) -> bool:
    """Whether nothing of a text is seen, and no token will stand for any of it."""
    return all(char.isspace() or is_unseen(char) for char in text)


def is_unseen(char: str) -> bool:
    """Whether a character has no width and no shape, as control characters and marks of direction."""
    return unicodedata.category(char) in ("Cc", "Cf") and not char.isspace()


# Columns


@lru_cache(maxsize=1000)
def normal(name: str) -> str:
    """A name without what is not seen: case, surrounding white space, ways to write the same character."""
    return unicodedata.normalize("NFKC", name).strip(" \t\ufeff").casefold()


def find_column(names: Iterable[str], wanted: str, place: str) -> str | None:
    """The column called `wanted`, up to case and white space. Raises ValueError if there are several."""
    found = [name for name in names if normal(name) == normal(wanted)]
    if len(found) > 1:
        raise ValueError(f"{place}: the columns {' and '.join(map(repr, found))} differ only in spelling; rename one")
    return found[0] if found else None


def _names(first: list[str], layout: Layout, place: str) -> list[str]:
    """What the columns are called, by the first row. Raises ValueError for a name that is given twice."""
    names = [name.strip() for name in first] if layout.header else [str(i + 1) for i in range(len(first))]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{place}: named more than once: {', '.join(map(repr, twice))}")
    return names


# Tables


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """Csv refuses fields of more than 131,072 characters; the limit is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def delimiter_of(path: Path, layout: Layout) -> str:
    """What separates the columns of a table: as asked for, else by the file's name."""
    if layout.delimiter is not None:
        return layout.delimiter
    return "," if path.suffix.lower() == ".csv" else "\t"


def _table_records(path: Path, layout: Layout) -> Iterator[Record]:
    names: list[str] | None = None
    for place, row in _rows(path, delimiter_of(path, layout)):
        if names is None:
            names = _names(row, layout, place)
            if layout.header:
                continue
        if len(row) != len(names):
            verb = "names" if layout.header else "has"
            raise ValueError(f"{place}: {len(row)} fields, the first line {verb} {len(names)}")
        yield place, dict(zip(names, row, strict=True))


def _rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """FILE:LINE and the fields of each row that is not blank."""
    # Between tabs a quote is a character: nothing has to be quoted there
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader((line for _, line in lines(path)), delimiter=delimiter, quoting=quoting, strict=True)
    number = 1  # of the line in which the row begins
    while True:
        try:
            with _fields_of_any_size():
                row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from None
        place, number = f"{path}:{number}", reader.line_num + 1
        if row is None:
            return
        if len(row) > 1 or (row and row[0].strip()):
            yield place, row


def header_of(path: Path, layout: Layout) -> list[str] | None:
    """The column names of a table; None for JSON, whose objects have their own. [] for an empty file."""
    if path.suffix.lower() in JSONS:
        return None
    _, row = next(_rows(path, delimiter_of(path, layout)), ("", []))
    return _names(row, layout, f"{path}:1")


# JSON


def _json_records(path: Path) -> Iterator[Record]:
    first = next((line for _, line in lines(path) if line.strip()), "")
    pairs = _array(path) if first.lstrip().startswith("[") else _objects(path)
    for place, value in pairs:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: must be an object with named fields, got {json.dumps(value):.60}")
        yield place, value


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in lines(path):
        if line.strip():
            try:
                yield place, parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON, one object a line or one array is needed: {error}") from None


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of the array that a file holds, each with the line in which it begins."""
    text = "".join(line for _, line in lines(path))
    decoder, at, number, counted = json.JSONDecoder(object_pairs_hook=_unique), text.index("[") + 1, 1, 0
    first = True
    while True:
        at = _skip(text, at)
        number, counted = number + text.count("\n", counted, at), at
        place = f"{path}:{number}"
        if text[at : at + 1] == "]" and first:
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON: {getattr(error, 'msg', error)}") from None
        yield place, value
        first, at = False, _skip(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"{place}: not JSON: neither a comma nor the end of the array after this element")
        at += 1
    if _skip(text, at + 1) != len(text):
        raise ValueError(f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON: something follows the array")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def parse_json(text: str) -> Any:
    """JSON as it stands there: a key that is given twice in one object is an error."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"named more than once: {', '.join(map(repr, twice))}")
    return dict(pairs)

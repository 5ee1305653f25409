"""Labelled texts from files: CSV, TSV and JSON lines to classify, CoNLL to tag. Errors name the file and the line."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READERS = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Text:
    """label: a name, a number (regression), or several names (multi-label). place: FILE:LINE."""

    text: str
    text_pair: str | None
    label: str | float | tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Sentence:
    """places: FILE:LINE of each word."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    places: tuple[str, ...]


def read_texts(path: str | os.PathLike[str], problem_type: str) -> list[Text]:
    """Read `text`, `text_pair` (optional) and `label` from the columns of a CSV or TSV file or from JSON lines.

    For problem_type "regression" labels are numbers. For "multi_label_classification" they are names separated by
    semicolons, or in JSON lists; none is allowed. Raises ValueError for what cannot be read.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: must be a file of type {', '.join(READERS)}")
    records = _json_records(path) if path.suffix.startswith(".json") else _csv_records(path)
    texts = []
    for place, record in records:
        for name in ("text", "label"):
            if record.get(name) is None:
                raise ValueError(f"{place}: no {name!r}; there are {', '.join(map(repr, record)) or 'no fields'}")
        for name in ("text", "text_pair"):
            if not isinstance(record.get(name, ""), str):
                raise ValueError(f"{place}: {name!r} must be a text, got {record[name]!r:.60}")
        if not record["text"].strip():
            raise ValueError(f"{place}: the text is empty")
        texts.append(Text(record["text"], record.get("text_pair"), _label(record["label"], problem_type, place), place))
    if not texts:
        raise ValueError(f"{path}: no examples")
    return texts


def read_sentences(path: str | os.PathLike[str]) -> list[Sentence]:
    """Read CoNLL: a word a line, its label in the last column, a blank line between sentences.

    Lines that begin with -DOCSTART- are left out. Raises ValueError for a line without a label.
    """
    sentences: list[Sentence] = []
    rows: list[tuple[str, str, str]] = []

    def finish() -> None:
        if rows:
            sentences.append(Sentence(*zip(*rows, strict=True)))
            rows.clear()

    for place, line in _lines(Path(path)):
        columns = line.split()
        if not columns:
            finish()
        elif columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise ValueError(f"{place}: a word and its label are needed, got {line.strip()!r:.60}")
            rows.append((columns[0], columns[-1], place))
    finish()
    if not sentences:
        raise ValueError(f"{path}: no sentences")
    return sentences


def label_names(found: Iterable[str]) -> list[str]:
    """Each name once, in order: as numbers if all are whole numbers, "O" first."""
    names = set(found)
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names, key=lambda name: (name != "O", name))


def _label(value: Any, problem_type: str, place: str) -> str | float | tuple[str, ...]:
    if problem_type == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError(f"{place}: the label must be a number, got {value!r:.60}")
        return number
    if problem_type == "multi_label_classification":
        values = value.split(";") if isinstance(value, str) else value
        if not isinstance(values, list):
            raise ValueError(f"{place}: labels must be a list, or names separated by semicolons; got {value!r:.60}")
        return tuple(dict.fromkeys(name for name in (str(each).strip() for each in values) if name))
    if isinstance(value, (list, dict)) or not (name := str(value).strip()):
        raise ValueError(f"{place}: the label must be one name, got {value!r:.60}")
    return name


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """FILE:LINE and the line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error}") from None


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not JSON, one object a line is needed: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: must be an object with text and label, got {line.strip()!r:.60}")
        yield place, record


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not {"text", "label"} <= set(header):
            raise ValueError(f"{path}:1: the first line must name the columns text and label; got {header}")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields, the first line names {len(header)}")
            if row:
                yield f"{path}:{reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from None

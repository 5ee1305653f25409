"""Records to examples: texts with a label, and pairs of texts that belong together."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minibert.checks import check_unicode
from minibert.finetuning.files import (
    Layout,
    delimiter_of,
    find_column,
    header_of,
    is_blank,
    is_unseen,
    read_records,
)

MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"
_LABELLED = ("label", "labels", "score", "similarity", "is_duplicate", "gold_label")  # as files of pairs name them

# What Excel, its cousins and LibreOffice write where a formula has no result
_NO_RESULT = re.compile(
    r"#(N/A|REF!|VALUE!|NAME\?|DIV/0!|NUM!|NULL!|SPILL!|CALC!|FIELD!|BLOCKED!|UNKNOWN!|CONNECT!|BUSY!|GETTING_DATA)"
    r"|Err:5\d\d"
)


@dataclass(frozen=True)
class Text:
    """label: a name, a number (regression), or several names (multi-label). place: FILE:LINE."""

    text: str
    text_pair: str | None
    label: str | float | tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, and perhaps one that does not belong to the first."""

    text: str
    text_pair: str
    negative: str | None
    place: str


@dataclass(frozen=True)
class Columns:
    """What the columns are called; None: by the usual names, if they are there."""

    text: str | None = None
    label: str | None = None
    pair: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        given = [value for field in fields(self) if (value := getattr(self, field.name)) is not None]
        if len(set(given)) < len(given):
            raise ValueError(f"two of the columns are the same: {', '.join(map(repr, given))}")


def read_texts(
    path: str | os.PathLike[str], problem_type: str, columns: Columns | None = None, layout: Layout | None = None
) -> list[Text]:
    """Read texts, their second texts (where there are) and labels: by default the columns text, text_pair and label.

    For problem_type "regression" labels are finite numbers. For "multi_label_classification" they are names separated
    by semicolons, or in JSON lists of names; none is allowed. Otherwise a label is a name or a whole number.

    Raises ValueError with FILE:LINE for what cannot be read, for an empty text and for what is no label.
    """
    path, columns, layout = Path(path), columns or Columns(), layout or Layout()
    texts = []
    for place, record, names in _named(path, layout, _text_columns(columns)):
        text = _text(record, names["text"], place)
        pair = None if names["text_pair"] is None else _optional_text(record, names["text_pair"], place)
        texts.append(Text(text, pair, _label(record[names["label"]], problem_type, place), place))
    if not texts:
        raise ValueError(f"{path}: no examples")
    return texts


def read_pairs(
    path: str | os.PathLike[str], columns: Columns | None = None, layout: Layout | None = None
) -> list[Pair]:
    """Read pairs of texts that belong together: text and text_pair, or anchor and positive, and perhaps negative.

    Raises ValueError with FILE:LINE for what cannot be read, for an empty text, and for a column of labels: a pair that
    does not belong together must not be there.
    """
    path, columns, layout = Path(path), columns or Columns(), layout or Layout()
    pairs = []
    for place, record, names in _named(path, layout, _pair_columns(path, columns, layout)):
        negative = None if names["negative"] is None else _optional_text(record, names["negative"], place)
        text, pair = _text(record, names["text"], place), _text(record, names["text_pair"], place)
        if negative == pair:
            raise ValueError(f"{place}: the negative is the text that belongs to it: {pair!r:.60}")
        pairs.append(Pair(text, pair, negative, place))
    if not pairs:
        raise ValueError(f"{path}: no examples")
    return pairs


def check_texts(path: Path, columns: Columns | None = None, layout: Layout | None = None) -> None:
    """Raises ValueError if a table lacks a column that `read_texts` needs; looks at its first line only."""
    _check_header(path, layout or Layout(), _text_columns(columns or Columns()))


def check_pairs(path: Path, columns: Columns | None = None, layout: Layout | None = None) -> None:
    """The same for `read_pairs`."""
    _check_header(path, layout or Layout(), _pair_columns(path, columns or Columns(), layout or Layout()))


def _text_columns(columns: Columns) -> dict[str, tuple[str, bool]]:
    """What holds the parts of an example -> what that column is called, and whether it must be there."""
    return {
        "text": (columns.text or "text", True),
        "text_pair": (columns.pair or "text_pair", columns.pair is not None),
        "label": (columns.label or "label", True),
    }


def _pair_columns(path: Path, columns: Columns, layout: Layout) -> dict[str, tuple[str, bool]]:
    names = header_of(path, layout)
    if names is None:
        names = list(next(read_records(path, layout), ("", {}))[1])
    place = f"{path}:1"
    usual = ("text", "text_pair") if find_column(names, "anchor", place) is None else ("anchor", "positive")
    for name in _LABELLED:
        found = find_column(names, name, place)
        if found is not None and found not in (columns.text, columns.pair, columns.negative):
            raise ValueError(
                f"{place}: the column {found!r}: sentence pairs have no labels, every row is a pair that belongs "
                "together; keep those rows, and leave out this column"
            )
    return {
        "text": (columns.text or usual[0], True),
        "text_pair": (columns.pair or usual[1], True),
        "negative": (columns.negative or "negative", columns.negative is not None),
    }


def label_names(found: Iterable[str]) -> list[str]:
    """Each name once, in order: as numbers if all are whole numbers, "O" first.

    Raises ValueError for names that are one name to whoever reads them: a whole number and what a table with missing
    values makes of it (1 and 1.0), or the same characters but for what is not seen.
    """
    names = set(found)
    for one, other in _alike(names, _seen):
        raise ValueError(f"the labels {one!r} and {other!r} are spelled in two ways: write them in one")
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names, key=lambda name: (name != "O", name))


def in_two_cases(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that differ in case alone: perhaps they were meant to be one."""
    return _alike(names, str.casefold)


def _alike(names: Iterable[str], key: Callable[[str], Hashable]) -> list[tuple[str, str]]:
    first: dict[Hashable, str] = {}
    return [(first[key(name)], name) for name in sorted(names) if first.setdefault(key(name), name) != name]


def _seen(name: str) -> Hashable:
    """What a reader takes a name for: the characters that are seen, in one of the ways to encode them."""
    shown = "".join(char for char in unicodedata.normalize("NFC", name) if not is_unseen(char))
    shown = " ".join(shown.split())
    return shown.removesuffix(".0") if shown.removesuffix(".0").removeprefix("-").isdecimal() else shown


# Columns


def _named(
    path: Path, layout: Layout, wanted: dict[str, tuple[str, bool]]
) -> Iterator[tuple[str, dict[str, Any], dict[str, str | None]]]:
    """FILE:LINE, the record, and what the wanted columns are called in it (None: not there)."""
    _check_header(path, layout, wanted)
    for place, record in read_records(path, layout):
        yield place, record, _find(record, wanted, place)


def _find(record: dict[str, Any], wanted: dict[str, tuple[str, bool]], place: str) -> dict[str, str | None]:
    names = {role: find_column(record, name, place) for role, (name, _) in wanted.items()}
    for role, (name, required) in wanted.items():
        if required and names[role] is None:
            raise ValueError(f"{place}: no {name!r}; there are {', '.join(map(repr, record)) or 'no fields'}")
    return names


def _check_header(path: Path, layout: Layout, wanted: dict[str, tuple[str, bool]]) -> None:
    """Raises ValueError where the first line of a table lacks a column, with what may be the reason."""
    names = header_of(path, layout)
    if names is None:
        return
    required = [name for name, needed in wanted.values() if needed]
    if all(find_column(names, name, f"{path}:1") is not None for name in required):
        return
    what = "the first line must name the columns" if layout.header else "the columns have numbers, there must be"
    hint = ""
    for other in ",;\t|":
        if other != delimiter_of(path, layout) and layout.header:
            with suppress(ValueError):  # split there it is no table
                found = header_of(path, Layout(other)) or []
                if all(find_column(found, name, f"{path}:1") is not None for name in required):
                    hint = f"; split at {other!r} it does: give --delimiter"
    options = "" if hint else "; or say what they are called: --text-column, --label-column, --pair-column"
    raise ValueError(f"{path}:1: {what} {' and '.join(required)}; got {names}{hint or options}")


# Values


def _text(record: dict[str, Any], name: str, place: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name!r} must be a text, got {value!r:.60}")
    if is_blank(value):
        raise ValueError(f"{place}: the text is empty" + ("" if name == "text" else f" ({name!r})"))
    return _written(value, place, name)


def _optional_text(record: dict[str, Any], name: str, place: str) -> str | None:
    """None for null, and for an empty field of a table."""
    value = record[name]
    return None if value is None or value == "" else _text(record, name, place)


def _label(value: Any, problem_type: str, place: str) -> str | float | tuple[str, ...]:
    if problem_type == REGRESSION:
        return _number(value, place)
    if problem_type == MULTI_LABEL:
        if isinstance(value, str):
            if value.strip()[:1] == "[" and value.strip()[-1:] == "]":
                raise ValueError(
                    f"{place}: labels must be names separated by semicolons, or a list in JSON; {value!r:.60} is one "
                    "that was written as text"
                )
            return tuple(
                dict.fromkeys(name for name in map(str.strip, value.split(";")) if name and _name(name, place))
            )
        if not isinstance(value, list):
            raise ValueError(f"{place}: labels must be a list, or names separated by semicolons; got {value!r:.60}")
        return tuple(dict.fromkeys(_name(each, place) for each in value))
    return _name(value, place)


def _number(value: Any, place: str) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > 3e38:  # what float32 holds
        raise ValueError(f"{place}: the label must be a number, got {value!r:.60}")
    return number


def _name(value: Any, place: str) -> str:
    """A label that is a name. A whole number is one; a truth value, a fraction, a list or nothing is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # "nan" is what a missing number becomes when a table is written
    if not isinstance(value, str) or not value.strip() or value.strip().lower() == "nan":
        raise ValueError(f"{place}: the label must be one name, got {value!r:.60}; a whole number is one too")
    return _written(value.strip(), place, "label")


def _written(value: str, place: str, name: str) -> str:
    """The value itself, unless it is no Unicode text, or stands for a spreadsheet's error: nobody wrote that."""
    if _NO_RESULT.fullmatch(value.strip()):
        raise ValueError(f"{place}: {name!r} is {value.strip()!r}, a spreadsheet's mark of a formula without a result")
    return check_unicode(value, f"{place}: {name!r}")

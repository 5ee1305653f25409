"""CoNLL files to sentences: a word a line, its label in a column, a blank line between sentences.

The format has many cousins that look alike: what cannot be told apart is refused, with the line and with what the
options should say.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from minibert.checks import check_unicode
from minibert.finetuning.files import lines
from minibert.finetuning.schemes import is_entity_label

_BOUNDARY = "-DOCSTART-"
_SPACE = " \t\r\n"  # str.strip() would take no-break spaces for white space too, which are parts of words
_COMMENT = re.compile(r"#(\s|$|#|begin document|end document)")
_BEGINNINGS = {"{": "JSON", "[{": "JSON", '["': "JSON", "<?": "XML", "<!": "HTML", "<html": "HTML"}
_HEADINGS = {"label", "labels", "tag", "tags", "ner", "ner_tag", "ner_tags", "ne", "pos", "pos_tag", "upos"}
_SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".xml", ".html")


@dataclass(frozen=True)
class Sentence:
    """places: FILE:LINE of each word."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class _Line:
    """sentence: its number; first: whether only comments stand before it there."""

    place: str
    columns: list[str]
    sentence: int
    first: bool


def read_sentences(
    path: str | os.PathLike[str], word_column: int | None = None, label_column: int | None = None
) -> list[Sentence]:
    """Read words and labels; columns are counted from 1, or from the end with -1. By default the first and the last.

    Columns are parted by tabs if the first line of words has one, else by spaces. Sentences end at blank lines and at
    lines that begin with -DOCSTART-. Comments (`# ...`) are known by their number of columns, or by a last column that
    is no label anywhere else, so that "#" may be a word.

    Raises ValueError with FILE:LINE for lines with another number of columns than the first one, for an empty word or
    label, for other formats, and for files whose first column holds no words (counters, identifiers, labels) unless
    word_column says where the words are.
    """
    path = Path(path)
    if path.suffix.lower() in _SUFFIXES:
        raise ValueError(f"{path}: tagging reads CoNLL: a word and its label a line, a blank line between sentences")
    rows, width = _rows(path)
    word = 0 if word_column is None else _index("--text-column", word_column, width, path)
    label = width - 1 if label_column is None else _index("--label-column", label_column, width, path)
    if word == label:
        raise ValueError(f"{path}: words and labels are both in column {word + 1} of {width}")
    rows = _without_comments(rows, width, label)
    for row in rows:
        if len(row.columns) != width:
            one = " (a word and its label are needed)" if len(row.columns) == 1 else ""
            raise ValueError(f"{row.place}: columns: {len(row.columns)}{one}, but {rows[0].place} has {width}")
    _check_columns(rows, path, word, label, word_column is None, label_column is None)
    if _counts(rows, 0):  # CoNLL-U: 3-4 is what words 3 and 4 are written as, 3.1 a word that is not written
        rows = [row for row in rows if row.columns[0].isdecimal()]
    return [_sentence(list(group), word, label) for _, group in groupby(rows, key=lambda row: row.sentence)]


def _rows(path: Path) -> tuple[list[_Line], int]:
    """All lines but blank ones and the beginnings of documents, and how many columns the first line of words has."""
    found: list[tuple[str, str, int, bool]] = []
    sentence, first, example = 0, True, None
    for place, line in lines(path):
        text = line.rstrip("\r\n")
        if not text.strip(_SPACE) or text.startswith(_BOUNDARY):
            sentence, first = sentence + 1, True
            continue
        if "\r" in text:
            raise ValueError(f"{place}: a carriage return within the line; lines must end with a line feed")
        if not found and (kind := next((kind for mark, kind in _BEGINNINGS.items() if text.startswith(mark)), None)):
            raise ValueError(f"{place}: this looks like {kind}; tagging reads CoNLL: a word and its label a line")
        found.append((place, text, sentence, first))
        if not _COMMENT.match(text):
            first, example = False, example or (place, text)
    if example is None:
        raise ValueError(f"{path}: no sentences")
    split = _split_at_tabs if "\t" in example[1] else _split_at_spaces
    width = len(split(example[1]))
    if width == 1:
        raise ValueError(f"{example[0]}: a word and its label are needed, got {example[1].strip(_SPACE)!r:.60}")
    return [_Line(place, split(text), sentence, first) for place, text, sentence, first in found], width


def _split_at_tabs(text: str) -> list[str]:
    return [cell.strip(" ") for cell in text.split("\t")]


def _split_at_spaces(text: str) -> list[str]:
    return [cell for cell in text.strip(_SPACE).split(" ") if cell]


def _index(option: str, column: int, width: int, path: Path) -> int:
    if column == 0 or not -width <= column <= width:
        raise ValueError(f"{option} {column}: {path} has columns 1 to {width} (or -1 to {-width}, from the end)")
    return column - 1 if column > 0 else width + column


def _without_comments(rows: list[_Line], width: int, label: int) -> list[_Line]:
    """The lines of words. A line that begins like a comment is one of them if all speaks for it."""

    def maybe(row: _Line) -> bool:
        return _COMMENT.match(" ".join(row.columns)) is not None

    known = {row.columns[label] for row in rows if len(row.columns) == width and not (maybe(row) and row.first)}
    return [row for row in rows if not maybe(row) or (len(row.columns) == width and row.columns[label] in known)]


def _check_columns(
    rows: list[_Line], path: Path, word: int, label: int, default_word: bool, default_label: bool
) -> None:
    """Raises ValueError where the words, or labels, that are taken without having been asked for are none."""
    width = len(rows[0].columns)
    hint = "say where the words and labels are: --text-column and --label-column, counted from 1"
    if default_word and (width > 2 or len(rows) >= 10) and _counts(rows, word):
        raise ValueError(f"{path}: the first of {width} columns counts the words, as in CoNLL-U; {hint}")
    if default_word and width > 2 and len(rows) >= 10 and len({row.columns[word] for row in rows}) == 1:
        raise ValueError(f"{path}: the first of {width} columns is the same everywhere, as in CoNLL-2012; {hint}")
    first = rows[0].columns[label]
    if first.casefold() in _HEADINGS and all(row.columns[label] != first for row in rows[1:]):
        raise ValueError(f"{rows[0].place}: this line seems to name the columns; leave it out, CoNLL has no such line")
    if default_word or default_label:
        words, labels = ({row.columns[column] for row in rows} for column in (word, label))
        if _are_labels(words) and not _are_labels(labels):
            raise ValueError(f"{path}: the labels seem to stand in column {word + 1}, where words should be; {hint}")


def _are_labels(cells: set[str]) -> bool:
    return all(is_entity_label(cell) for cell in cells) and any("-" in cell or "_" in cell for cell in cells)


def _counts(rows: list[_Line], column: int) -> bool:
    """Whether a column numbers the words of each sentence, from 0 or 1 (parts such as 3-4 and 3.1 aside)."""
    if column != 0 or len(rows) < 2:
        return False
    longest = 0
    for _, group in groupby(rows, key=lambda row: row.sentence):
        cells = [row.columns[0] for row in group if not re.fullmatch(r"\d+(-|\.)\d+", row.columns[0])]
        if cells not in ([str(i) for i in range(len(cells))], [str(i + 1) for i in range(len(cells))]):
            return False
        longest = max(longest, len(cells))
    return longest > 1


def _sentence(rows: list[_Line], word: int, label: int) -> Sentence:
    for row in rows:
        for name, column in (("word", word), ("label", label)):
            if not row.columns[column]:
                raise ValueError(f"{row.place}: the {name} is empty")
            check_unicode(row.columns[column], f"{row.place}: {name!r}")
    return Sentence(*zip(*((row.columns[word], row.columns[label], row.place) for row in rows), strict=True))

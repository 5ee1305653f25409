"""Questions whose answers are spans of a text, from SQuAD's JSON (versions 1.1 and 2) or from flat records.

Errors name the file and the question.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minibert.checks import check_unicode
from minibert.finetuning.files import JSONS, is_blank, lines, parse_json, read_records


@dataclass(frozen=True)
class Question:
    """answers: (text, where it begins in the context, in characters), all right; none where there is no answer."""

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    place: str


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read questions with contexts and answers from a JSON file.

    Either as SQuAD has them, {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text",
    "answer_start"}], "is_impossible"}]}]}]}, or flat, as lines or an array of {"question", "context", "answers"}, where
    `answers` is a list as there or {"text": [...], "answer_start": [...]}.

    Raises ValueError, naming the question, for a missing or wrong field, an answer that does not stand where it is said
    to be, and an answer to a question that is said to have none.
    """
    path = Path(path)
    if path.suffix.lower() not in JSONS:
        raise ValueError(f"{path}: question answering reads SQuAD's JSON, a file of type {', '.join(JSONS)}")
    questions = [
        _question(question, context, place)
        for place, question, context in (_nested(path) if _is_squad(path) else _flat(path))
    ]
    if not questions:
        raise ValueError(f"{path}: no questions")
    return questions


def _is_squad(path: Path) -> bool:
    """Whether the file is one object, and not one a line."""
    start = next((line for _, line in lines(path) if line.strip()), "").strip()
    if not start.startswith("{"):
        return False
    try:
        first = parse_json(start)
    except ValueError:
        return True  # goes on in the next line
    return "data" in first or "question" not in first


def _nested(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    try:
        whole = parse_json("".join(line for _, line in lines(path)))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    for i, article in enumerate(_field(whole, "data", list, str(path))):
        for j, paragraph in enumerate(_field(article, "paragraphs", list, f"{path}: data[{i}]")):
            place = f"{path}: data[{i}].paragraphs[{j}]"
            context = _field(paragraph, "context", str, place)
            for k, question in enumerate(_field(paragraph, "qas", list, place)):
                yield f"{place}.qas[{k}]", question, context


def _flat(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    for place, record in read_records(path):
        yield place, record, _field(record, "context", str, place)


def _question(record: Any, context: str, place: str) -> Question:
    text = _field(record, "question", str, place)
    if "id" in record:
        place = f"{place} (id {record['id']!s:.60})"
    for name, value in (("question", text), ("context", context)):
        if is_blank(value):
            raise ValueError(f"{place}: the {name} is empty")
        check_unicode(value, f"{place}: {name!r}")
    answers = _answers(record, place)
    impossible = record.get("is_impossible", not answers)
    if not isinstance(impossible, bool):
        raise ValueError(f"{place}: is_impossible must be true or false, got {impossible!r:.60}")
    if impossible != (not answers):
        raise ValueError(f"{place}: is_impossible is {str(impossible).lower()}, but there are {len(answers)} answers")
    for answer, start in answers:
        if not answer.strip() or context[start : start + len(answer)] != answer:
            there = context[start : start + len(answer)]
            raise ValueError(
                f"{place}: the answer {answer!r:.60} does not begin at character {start}, where {there!r:.60} is"
            )
    return Question(text, context, answers, place)


def _answers(record: dict[str, Any], place: str) -> tuple[tuple[str, int], ...]:
    """Each answer once, in order."""
    found = record.get("answers")
    if isinstance(found, dict):
        texts, starts = (_field(found, name, list, f"{place}: answers") for name in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise ValueError(f"{place}: answers: {len(texts)} texts, but {len(starts)} beginnings")
        found = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(found, list):
        raise ValueError(f"{place}: 'answers' must be a list, got {found!r:.60}")
    answers = []
    for i, answer in enumerate(found):
        where = f"{place}: answers[{i}]"
        start = _field(answer, "answer_start", int, where)
        if start < 0:
            raise ValueError(f"{where}: answer_start is {start}, but must be at least 0")
        answers.append((check_unicode(_field(answer, "text", str, where), f"{where}: 'text'"), start))
    return tuple(dict.fromkeys(answers))


def _field(record: Any, name: str, kind: type, place: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: must be an object with {name!r}, got {record!r:.60}")
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        what = {list: "a list", str: "a text", int: "a whole number"}[kind]
        raise ValueError(f"{place}: {name!r} must be {what}, got {value!r:.60}")
    return value

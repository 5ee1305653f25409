"""Scores of answers that are spans of a text, as SQuAD defines them (Rajpurkar et al. 2016, section 6.1; 2018).

Answers are compared without case, punctuation, articles and white space: exact match asks for equal texts, F1 is the
harmonic mean of the shares of words in common. Of several right answers the one that fits best counts; a question
without an answer is answered rightly by saying nothing. All scores are percentages, as there.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = frozenset(string.punctuation)


def normalize(answer: str) -> str:
    """Lower case, no (ASCII) punctuation, no articles, single spaces."""
    letters = "".join(character for character in answer.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def exact_match(answer: str, right: str) -> float:
    """1.0 if both answers are the same words, else 0.0."""
    return float(normalize(answer) == normalize(right))


def f1(answer: str, right: str) -> float:
    """Of the words in common; where one of both is empty, whether both are."""
    ours, theirs = normalize(answer).split(), normalize(right).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def best_threshold(
    answers: Sequence[str], differences: Sequence[float], right: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """The highest F1, in percent, of leaving out the answers whose difference is above a threshold; and the lowest of
    the thresholds that reach it.

    As SQuAD 2's evaluation finds best_f1 and best_f1_thresh: a threshold is the difference of the last answer that is
    kept. Unlike there answers of equal differences are kept or left out together, since no threshold tells them apart,
    and where it is best to keep none the threshold is below all differences (there 0, which may keep some).
    """
    golds = _golds(right)
    gains = [max(f1(answer, text) for text in texts) - max(f1("", text) for text in texts)
             for answer, texts in zip(answers, golds, strict=True)]  # fmt: skip
    order = sorted(range(len(answers)), key=lambda i: differences[i])
    total = best = 0.0  # above that of no answer at all
    threshold = differences[order[0]] - 1
    for number, i in enumerate(order):
        total += gains[i]
        is_last = number + 1 == len(order) or differences[order[number + 1]] > differences[i]
        if is_last and total > best + 1e-9:  # more than sums of the same in another order
            best, threshold = total, differences[i]
    nothing = sum(max(f1("", text) for text in texts) for texts in golds)
    return 100 * (nothing + best) / len(answers), threshold


def answer_scores(answers: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 in percent; `right` holds the right answers of each question, none where there is none.

    Where some questions have none, also those of the questions that have answers (has_answer_...), and the share of
    the others that were left unanswered (no_answer).
    """
    golds = _golds(right)
    exact = [max(exact_match(answer, text) for text in texts) for answer, texts in zip(answers, golds, strict=True)]
    parts = [max(f1(answer, text) for text in texts) for answer, texts in zip(answers, golds, strict=True)]
    scores = {"exact_match": _percent(exact), "f1": _percent(parts)}
    answered = [bool(texts) for texts in right]
    if all(answered):
        return scores
    kept = [i for i, has in enumerate(answered) if has]
    none = [exact[i] for i, has in enumerate(answered) if not has]
    with_answer = {"has_answer_exact_match": [exact[i] for i in kept], "has_answer_f1": [parts[i] for i in kept]}
    return (
        scores
        | {name: _percent(values) for name, values in with_answer.items() if kept}
        | {"no_answer": _percent(none)}
    )


def _golds(right: Sequence[Sequence[str]]) -> list[list[str]]:
    """The right answers of each question; "" where it has none, or none that holds a word."""
    return [[text for text in texts if normalize(text)] or [""] for texts in right]


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)

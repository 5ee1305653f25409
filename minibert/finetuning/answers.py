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


def answer_scores(answers: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 in percent; `right` holds the right answers of each question, none where there is none.

    Where some questions have none, also those of the questions that have answers (has_answer_...), and the share of
    the others that were left unanswered (no_answer).
    """
    golds = [[text for text in texts if normalize(text)] or [""] for texts in right]
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


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)

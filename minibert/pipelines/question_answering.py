"""Answers that are spans of a text (section 4.2).

transformers had this pipeline until 4.57, and not since 5.0. What is computed here are its definitions (its
pipelines/question_answering.py with a fast tokenizer): windows, probabilities, words, sums over equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import numpy as np
from torch import nn

from minibert.checks import check_count, check_text, shown
from minibert.heads import BertForQuestionAnswering
from minibert.pipelines.base import Pipeline, rows_of, windows
from minibert.pipelines.items import place
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

Pair = tuple[str, str]  # question, context

LONGEST_WINDOW = 384  # tokens of a window, unless a call says otherwise
_NO_COUNTS = ("handle_impossible_answer", "align_to_words", "null_score_diff_threshold")
_LEAST = 2.0**-150  # below every product of two probabilities in float32 that is not 0


@dataclass(frozen=True)
class SpanRules:
    """What an answer may be, and how long contexts are cut; lengths in tokens.

    top_k: answers. max_answer_len: of an answer. max_seq_len: of a window with its question (default 384, or what the
    model takes if that is less). doc_stride: what a window repeats of the one before (default 128, or half of
    max_seq_len if that is less). max_question_len: cuts longer questions (default: none is cut).
    handle_impossible_answer: let "" compete, with the probability that no answer is there. null_score_diff_threshold:
    "" stands before the answers that it surpasses by more than this, as a difference of logarithms (see
    `null_score_difference`); fine-tuning reports the best one as best_f1_thresh. align_to_words: extend answers to
    whole words. Raises ValueError for what is out of range, and for a threshold where "" does not compete.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name not in _NO_COUNTS:
                check_count(field.name, value, 0 if field.name == "doc_stride" else 1)
        threshold = self.null_score_diff_threshold
        if not isinstance(threshold, Real) or isinstance(threshold, bool) or not math.isfinite(threshold):
            raise ValueError(f"null_score_diff_threshold must be a finite number, got {threshold!r:.60}")
        if threshold and not self.handle_impossible_answer:
            raise ValueError(
                f"null_score_diff_threshold={threshold} says nothing without handle_impossible_answer=True"
            )


RULES = tuple(field.name for field in fields(SpanRules))


class QuestionAnsweringPipeline(Pipeline):
    """Where a context answers a question.

    >>> answer = pipeline("question-answering", "directory-or-name")
    >>> answer(question="Where do I live?", context="My name is Sarah and I live in London.")
    {'score': 0.92, 'start': 31, 'end': 37, 'answer': 'London'}
    """

    task = "question-answering"
    model_class = BertForQuestionAnswering
    takes_tokenizer_kwargs = False
    item = "a dict with question and context"

    def __init__(self, model: nn.Module, tokenizer: BertTokenizer, **options: Any):
        """options: those of every pipeline, and fields of SpanRules as the defaults of calls."""
        rules = {name: options.pop(name) for name in RULES if name in options}
        super().__init__(model, tokenizer, **options)
        self.rules = self._checked(SpanRules(), rules)

    @classmethod
    def options(cls) -> list[str]:
        return [*RULES, *super().options()]

    def __call__(
        self,
        inputs: Any = None,
        context: str | Sequence[str] | None = None,
        *,
        question: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **rules: Any,
    ) -> Any:
        """For one question the best answer: a dict of its score, its start and end in the context, and its text. With
        top_k a list of the best ones, but as in transformers a dict where only one is left.

        Questions come as question= and context= (each one or a list; one context serves a list of questions), as two
        arguments, as a dict with these keys, a list of such dicts or an iterator. rules: fields of SpanRules. An answer
        found in several windows, or in several places, counts once, with the sum of its scores.

        Raises TypeError for input of another kind, ValueError for an empty question or context, and for a question that
        leaves no room for the context.
        """
        unknown = {name: value for name, value in rules.items() if name not in RULES}
        self._refuse(unknown, ["question", "context", "batch_size", *RULES])
        checked = self._checked(self.rules, rules)
        if question is not None or context is not None:
            if (inputs is None) == (question is None):
                raise TypeError("give a question and a context: question=..., context=...")
            inputs = _paired(inputs if question is None else question, context)
        results = self._answer(inputs, rules=checked, batch_size=batch_size)
        return results[0] if isinstance(inputs, (list, tuple)) and len(inputs) == 1 else results

    def _checked(self, defaults: SpanRules, given: Mapping[str, Any]) -> SpanRules:
        rules = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        if rules.max_seq_len is not None and rules.max_seq_len > self.longest:
            raise ValueError(f"max_seq_len={rules.max_seq_len}, but the model takes {self.longest} tokens")
        if rules.doc_stride is not None and rules.doc_stride >= self._longest_row(rules):
            raise ValueError(f"doc_stride={rules.doc_stride} must be below max_seq_len={self._longest_row(rules)}")
        return rules

    def _longest_row(self, rules: SpanRules) -> int:
        return rules.max_seq_len or min(self.longest, LONGEST_WINDOW)

    def _check(self, item: Any, name: str) -> Pair:
        if isinstance(item, Mapping) and item.keys() == {"question", "context"}:
            item = (item["question"], item["context"])
        if not isinstance(item, tuple) or len(item) != 2:
            raise TypeError(f"{name} must be {self.item}, got {shown(item)}")
        for value, part in zip(item, ("question", "context"), strict=True):
            if not check_text(value, f"{name}: {part}"):
                raise ValueError(f"{name}: {part} is empty")
        return item

    def _is_one(self, inputs: Any) -> bool:
        return isinstance(inputs, (Mapping, str))

    def _results(self, items: list[Pair], first: int | None, *, rules: SpanRules, batch_size: int | None) -> list:
        candidates = self.candidates(items, first, rules=rules, batch_size=batch_size)
        return [_chosen(answers, null_score, rules) for answers, null_score in candidates]

    def candidates(
        self,
        items: list[Pair],
        first: int | None = None,
        *,
        rules: SpanRules | None = None,
        batch_size: int | None = None,
    ) -> list[tuple[list[dict[str, Any]], float]]:
        """What a call chooses from, for each question with its context: the answers found, best first and none of them
        "", and the probability that there is none. rules: by default the pipeline's. Errors name items from `first` on.
        """
        rules = self.rules if rules is None else rules
        questions = self.tokenizer([q for q, _ in items], add_special_tokens=False, truncation=False)["input_ids"]
        texts = {text: i for i, text in enumerate(dict.fromkeys(context for _, context in items))}
        contexts = self.tokenizer(list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True)
        numbers = [texts[context] for _, context in items]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows, types, parts = [], [], []
        for i, (question, number) in enumerate(zip(questions, numbers, strict=True)):
            head = [cls, *question[: rules.max_question_len], sep]
            ids = contexts["input_ids"][number]
            parts.append(self._windows(len(head), len(ids), rules, place(i, first)))
            for start, end in parts[-1]:
                rows.append([*head, *ids[start:end], sep])
                types.append([0] * len(head) + [1] * (end - start + 1))
        logits = iter(self._run({"input_ids": rows, "token_type_ids": types}, _span_logits, batch_size))
        results = []
        for (_, context), number, spans in zip(items, numbers, parts, strict=True):
            words, offsets = contexts.word_ids(number), contexts["offset_mapping"][number]
            results.append(_answers(context, words, offsets, [(span, *next(logits)) for span in spans], rules))
        return results

    def _windows(self, head: int, length: int, rules: SpanRules, name: str) -> list[tuple[int, int]]:
        longest = self._longest_row(rules)
        room, overlap = room_and_overlap(longest, head, rules.doc_stride)
        if 0 < length <= room:
            return [(0, length)]
        if room <= max(0, overlap):
            raise ValueError(
                f"{name}: a question of {head - 2} tokens leaves {max(0, room)} of max_seq_len={longest} to the "
                f"context, and doc_stride={overlap} of them are repeated: shorten it, or pass max_question_len"
            )
        return windows(length, room, overlap)


def room_and_overlap(longest: int, head: int, doc_stride: int | None) -> tuple[int, int]:
    """Of a window of `longest` tokens that begins with `head` others: how many are left to the context before [SEP],
    and how many of these the window before had too, `doc_stride` or by default 128, or half if that is less.
    """
    room = longest - head - 1
    if doc_stride is not None:
        return room, doc_stride
    overlap = min(longest // 2, 128)
    return room, overlap if overlap < room else room // 2


def _span_logits(runner: nn.Module, batch: BatchEncoding, spans: list[slice]) -> list[tuple[np.ndarray, np.ndarray]]:
    output = runner(**batch)
    return list(zip(rows_of(output.start_logits, spans), rows_of(output.end_logits, spans), strict=True))


def null_score_difference(null_score: float, score: float) -> float:
    """How far the probability of no answer surpasses an answer's: the difference of their logarithms, above 0 exactly
    where null_score > score, and always finite.

    For an answer that was found once, in a context of one window, this is BERT's null score difference (section 4.3),
    of sums of logits: what both probabilities were divided by is the same.
    """
    return math.log(max(null_score, _LEAST) / max(score, _LEAST))


def _answers(
    context: str,
    words: list[int | None],
    offsets: list[tuple[int, int]],
    scored: list[tuple[tuple[int, int], np.ndarray, np.ndarray]],
    rules: SpanRules,
) -> tuple[list[dict[str, Any]], float]:
    """The answers in one context, and the score of none; `scored` has each window's first and last token in it, and its
    logits (T,) twice.
    """
    found: dict[str, dict[str, Any]] = {}
    null_score = 1.0
    count = 2 * rules.top_k + 10 if rules.align_to_words else rules.top_k  # extended to words, some become the same
    for (start, end), starts, ends in scored:
        starts, ends = _probabilities(starts, end - start), _probabilities(ends, end - start)
        null_score = min(null_score, float(starts[0] * ends[0]))
        for first, last, score in _spans(starts[1:], ends[1:], count, rules.max_answer_len):
            first, last = first + start, last + start
            if rules.align_to_words:
                while first > start and words[first - 1] == words[first]:
                    first -= 1
                while last + 1 < end and words[last + 1] == words[last]:
                    last += 1
            begin, stop = offsets[first][0], offsets[last][1]
            text = context[begin:stop]
            answer = found.setdefault(text.lower(), {"score": 0.0, "start": begin, "end": stop, "answer": text})
            answer["score"] += score
    return sorted(found.values(), key=lambda answer: answer["score"], reverse=True), null_score


def _chosen(
    answers: list[dict[str, Any]], null_score: float, rules: SpanRules
) -> dict[str, Any] | list[dict[str, Any]]:
    if rules.handle_impossible_answer or not answers:
        score, threshold = (null_score if rules.handle_impossible_answer else 0.0), rules.null_score_diff_threshold
        before = sum(null_score_difference(score, answer["score"]) <= threshold for answer in answers)
        answers = [*answers[:before], {"score": score, "start": 0, "end": 0, "answer": ""}, *answers[before:]]
    answers = answers[: rules.top_k]
    return answers[0] if len(answers) == 1 else answers


def _probabilities(logits: np.ndarray, length: int) -> np.ndarray:
    """(1 + length,): of [CLS], which stands for no answer, and of the context's tokens. The last token is [SEP]."""
    logits = np.concatenate([logits[:1], logits[len(logits) - 1 - length : -1]])
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _spans(starts: np.ndarray, ends: np.ndarray, count: int, longest: int) -> list[tuple[int, int, float]]:
    """The likeliest spans: first token, last token, the product of their probabilities."""
    length = len(starts)
    offsets = np.arange(min(longest, length))
    last = np.arange(length)[:, None] + offsets  # (T, L): a span of each length from each token
    scores = np.where(last < length, starts[:, None] * ends[np.minimum(last, length - 1)], -1.0).ravel()
    best = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    best = best[np.argsort(-scores[best], kind="stable")]
    return [
        (int(i) // len(offsets), int(i) // len(offsets) + int(i) % len(offsets), float(scores[i]))
        for i in best
        if scores[i] >= 0
    ]


def _paired(questions: Any, contexts: Any) -> Any:
    """A question and its context as a dict, or as a list of dicts; one context may serve several questions."""
    if isinstance(questions, (list, tuple)) and isinstance(contexts, str):
        contexts = [contexts] * len(questions)
    if isinstance(questions, (list, tuple)) and isinstance(contexts, (list, tuple)):
        if len(questions) != len(contexts):
            raise ValueError(f"{len(questions)} questions and {len(contexts)} contexts: they must match")
        return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
    return {"question": questions, "context": contexts}

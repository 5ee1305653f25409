"""Answers that are spans of a text: windows, targets and scores (section 4.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from minibert.finetuning.answers import answer_scores, best_threshold
from minibert.finetuning.squad import Question, read_questions
from minibert.finetuning.tasks import Rows, Task, batch_of
from minibert.heads import BertForQuestionAnswering
from minibert.pipelines.base import windows
from minibert.pipelines.question_answering import (
    LONGEST_WINDOW,
    QuestionAnsweringPipeline,
    null_score_difference,
    room_and_overlap,
)
from minibert.text.tokenizer import BertTokenizer

_ASKED_AT = 64  # questions that the pipeline is asked at once


class QuestionAnswering(Task):
    """Where in its context a question's answer begins and ends; [CLS] stands for "not in this window".

    Contexts are cut into overlapping windows as the pipeline cuts them, and validation is done by the pipeline itself,
    so that scores are of what users will get. Where questions without an answer were learnt, "" competes.
    """

    model_class = BertForQuestionAnswering
    best = "f1"

    def __init__(self, doc_stride: int | None = None):
        self.doc_stride, self.max_length = doc_stride, 0
        self.impossible = False

    def read(self, path: str | os.PathLike[str]) -> list[Question]:
        return read_questions(path)

    def labels(self, examples: Sequence[Question]) -> None:
        unanswered = sum(not question.answers for question in examples)
        if unanswered == len(examples):
            file = examples[0].place.partition(":")[0]
            raise ValueError(f"{file}: no question has an answer, nothing to learn")
        self.impossible = unanswered > 0

    def describe(self) -> str:
        return "questions may have no answer" if self.impossible else "every question has an answer"

    def group(self, example: Question) -> Hashable:
        return example.context

    def encode(
        self, examples: Sequence[Question], tokenizer: BertTokenizer, ids: dict[str, int], max_length: int
    ) -> Rows:
        """A row for each window: [CLS] question [SEP] part of the context [SEP]; targets: first and last token."""
        self.max_length = min(max_length, LONGEST_WINDOW)
        questions = tokenizer([each.question for each in examples], add_special_tokens=False, truncation=False)
        texts = {text: i for i, text in enumerate(dict.fromkeys(each.context for each in examples))}
        contexts = tokenizer(list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True)
        rows = Rows([], [], [], examples)
        for example, question in zip(examples, questions["input_ids"], strict=True):
            number = texts[example.context]
            answer = _tokens(example, contexts["offset_mapping"][number])
            head = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
            context = contexts["input_ids"][number]
            for start, end in self._windows(len(head), len(context), example.place):
                row = [*head, *context[start:end], tokenizer.sep_token_id]
                rows.input_ids.append(row)
                rows.token_type_ids.append([0] * len(head) + [1] * (len(row) - len(head)))
                inside = answer is not None and start <= answer[0] and answer[1] < end
                rows.targets.append([len(head) + token - start for token in answer] if inside else [0, 0])
        return rows

    def _windows(self, head: int, length: int, place: str) -> list[tuple[int, int]]:
        room, overlap = room_and_overlap(self.max_length, head, self.doc_stride)
        if 0 < length <= room:
            return [(0, length)]
        if room <= max(0, overlap):
            raise ValueError(
                f"{place}: a question of {head - 2} tokens leaves {max(0, room)} of {self.max_length} to the context, "
                f"of which {overlap} are repeated: shorten it, or change --max-length or --doc-stride"
            )
        return windows(length, room, overlap)

    def loss(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows, numbers: list[int]) -> Tensor:
        start, end = torch.tensor([rows.targets[i] for i in numbers], device=model.device).unbind(1)
        return model(**batch_of(model, tokenizer, rows, numbers), start_positions=start, end_positions=end).loss

    def validate(self, model: nn.Module, tokenizer: BertTokenizer, rows: Rows) -> dict[str, float]:
        """The scores of the pipeline's answers. Where some questions have none, best_f1_thresh is also the
        null_score_diff_threshold that would have been best on them, and best_f1... are the scores with it.
        """
        rules = {"max_seq_len": self.max_length, "doc_stride": self.doc_stride}
        ask = QuestionAnsweringPipeline(model, tokenizer, fast=False, **rules)
        found: list[tuple[str, float]] = []  # the best answer, and how far the probability of none surpasses it
        for start in range(0, len(rows.examples), _ASKED_AT):
            some = rows.examples[start : start + _ASKED_AT]
            for answers, null_score in ask.candidates([(each.question, each.context) for each in some]):
                answer, score = (answers[0]["answer"], answers[0]["score"]) if answers else ("", 0.0)
                found.append((answer, null_score_difference(null_score, score)))
        right = [[text for text, _ in each.answers] for each in rows.examples]
        unanswered = any(not texts for texts in right)
        scores = answer_scores(_kept(found, 0.0 if self.impossible or unanswered else math.inf), right)
        if unanswered:
            _, threshold = best_threshold([answer for answer, _ in found], [above for _, above in found], right)
            best_scores = answer_scores(_kept(found, threshold), right)
            scores |= {"best_f1": best_scores.pop("f1"), "best_f1_thresh": threshold}
            scores |= {f"best_f1_{name}": value for name, value in best_scores.items()}
        return scores


def _kept(found: Sequence[tuple[str, float]], threshold: float) -> list[str]:
    """The answers, "" in the place of those whose difference is above the threshold."""
    return [answer if difference <= threshold else "" for answer, difference in found]


def _tokens(question: Question, offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last token of the (first) answer in the context."""
    if not question.answers:
        return None
    text, begin = question.answers[0]
    inside = [i for i, (first, last) in enumerate(offsets) if last > begin and first < begin + len(text)]
    if not inside:
        raise ValueError(f"{question.place}: no token stands for the answer {text!r:.60}")
    return inside[0], inside[-1]

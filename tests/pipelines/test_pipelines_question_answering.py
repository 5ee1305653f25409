"""Question answering as transformers 4.57 defined it: data/question_answering.json has its results on a tiny model."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pipeline_case
import pytest
import torch
from reference import rounding

import minibert
from minibert import cli, pipeline
from minibert.pipelines.question_answering import SpanRules, null_score_difference

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "question_answering.json").read_text())
CONTEXTS, QUESTIONS, OPTIONS = (REFERENCE[name] for name in ("contexts", "questions", "options"))


def make(**settings):
    """The model that the reference ran; the fixture's `source` says how its parameters are drawn."""
    model = minibert.BertForQuestionAnswering(minibert.BertConfig(**REFERENCE["config"])).eval()
    draw = np.random.RandomState(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.from_numpy(draw.standard_normal(parameter.shape).astype(np.float32))
            parameter.copy_(1 + 0.1 * value if name.endswith("LayerNorm.weight") else 0.4 * value)
    vocab = {token: index for index, token in enumerate(REFERENCE["vocab"])}
    return pipeline("question-answering", model, minibert.BertTokenizer(vocab, model_max_length=512), **settings)


@functools.cache
def tolerance() -> float:
    """Of a score, the product of two probabilities, which moves by at most what the logits of both move by together.

    The results of the reference were rounded on one machine, ours are on another: four times what it costs there.
    """
    return 4 * rounding(make().model)


def same(ours, theirs) -> bool:
    return pipeline_case.same(ours, theirs, tolerance())


@pytest.fixture(scope="module")
def answer():
    return make()


def without_impossible(result):
    """The reference fills up a list that is too short with spans that end before they start, of score 0."""
    if isinstance(result, dict):
        return result
    kept = [each for each in result if each["score"] > 0]
    return kept[0] if len(kept) == 1 else kept


@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda number: str(OPTIONS[number]))
def test_answers_are_those_of_transformers_4(answer, number):
    cases = [case for case in REFERENCE["cases"] if case[0] == number]
    assert len(cases) >= 18
    inputs = [{"question": QUESTIONS[question], "context": CONTEXTS[context]} for _, context, question, _ in cases]
    for fast in (answer, make(fast=False)):
        for result, case in zip(fast(inputs, **OPTIONS[number]), cases, strict=True):
            assert same(result, without_impossible(case[3])), case
    assert any(len(answer.tokenizer(CONTEXTS[case[1]])["input_ids"]) > 512 for case in cases)


def test_offsets_are_of_the_original_text(answer):
    for context in CONTEXTS:
        for found in answer({"question": QUESTIONS[3], "context": context}, top_k=20, max_answer_len=4):
            assert isinstance(found, str) or context[found["start"] : found["end"]] == found["answer"]


def test_forms_of_input(answer):
    question, context = QUESTIONS[0], CONTEXTS[0]
    one = answer(question=question, context=context)
    assert same(answer(question, context), one)
    assert same(answer({"question": question, "context": context}), one)
    assert same(answer([{"question": question, "context": context}]), one)
    assert same(answer(question, context=context), one)
    assert same(answer(question=[question] * 2, context=context), [one, one])
    assert same(answer(question=[question] * 2, context=[context] * 2), [one, one])
    items = ({"question": question, "context": context} for _ in range(3))
    stream = answer(items)
    assert not isinstance(stream, list)
    assert same(list(stream), [one] * 3)
    assert answer([]) == []


def test_the_command(answer, tmp_path, capsys):
    answer.model.save_pretrained(tmp_path)
    answer.tokenizer.save_pretrained(tmp_path)
    assert cli.main(["answer", QUESTIONS[0], CONTEXTS[0], "--top-k", "2", "--model", str(tmp_path)]) == 0
    expected = answer(QUESTIONS[0], CONTEXTS[0], top_k=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == [each["answer"] for each in expected]


def test_defaults_may_be_set(answer):
    again = make(top_k=2, max_answer_len=2)
    asked = {"question": QUESTIONS[0], "context": CONTEXTS[0]}
    assert same(again(asked), answer(asked, top_k=2, max_answer_len=2))


def test_long_questions(answer):
    long, context = "when " * 400, CONTEXTS[0]
    with pytest.raises(ValueError, match=r"inputs: a question of 400 tokens leaves 0 of max_seq_len=384"):
        answer(long, context)
    assert same(answer(long, context, max_question_len=10), answer("when " * 10, context))


def test_nothing_to_find(answer):
    nothing = {"start": 0, "end": 0, "answer": ""}
    assert answer("who?", "  \n ") == {"score": 0.0, **nothing}
    assert answer("who?", " ", handle_impossible_answer=True) == {"score": 1.0, **nothing}


def test_the_threshold_of_no_answer(answer):
    """It decides at the difference of logarithms: "" stands before an answer where it surpasses it by more."""
    above, options = set(), {"handle_impossible_answer": True}
    for question, context in itertools.product(QUESTIONS[:3], CONTEXTS):
        asked = {"question": question, "context": context}
        ((answers, null_score),) = answer.candidates([(question, context)])
        difference = null_score_difference(null_score, answers[0]["score"])
        assert (difference > 0) == (null_score > answers[0]["score"])
        assert answer(asked, **options) == answer(asked, null_score_diff_threshold=0, **options)
        for threshold, expected in ((difference, answers[0]["answer"]), (difference - 1e-6, ""),
                                    (difference + 1e-6, answers[0]["answer"])):  # fmt: skip
            found = answer(asked, null_score_diff_threshold=threshold, **options)
            assert found["answer"] == expected
            assert found["score"] == (answers[0]["score"] if expected else null_score)
        several = answer(asked, top_k=5, null_score_diff_threshold=-1000, **options)
        assert several[0] == {"score": null_score, "start": 0, "end": 0, "answer": ""}
        several = answer(asked, top_k=5, null_score_diff_threshold=1000, **options)
        assert all(each["answer"] for each in several[:-1])  # a short context has less than 5, and "" is the last
        above.add(difference > 0)
    assert len(above) == 2  # both happen


def test_the_difference_is_that_of_the_logits(answer):
    """In one window: sums of logits at [CLS] and at the best span (section 4.3)."""
    question, context = QUESTIONS[0], CONTEXTS[0]
    encoded = answer.tokenizer(question, context, return_tensors="pt")
    with torch.no_grad():
        output = answer.model(**encoded)
    starts, ends = output.start_logits[0].double(), output.end_logits[0].double()
    inside = [i for i, kind in enumerate(encoded["token_type_ids"][0].tolist()) if kind == 1][:-1]
    best = max(starts[i] + ends[j] for i in inside for j in inside if i <= j < i + 15)
    ((answers, null_score),) = answer.candidates([(question, context)], rules=SpanRules(align_to_words=False))
    difference = null_score_difference(null_score, answers[0]["score"])
    assert difference == pytest.approx(float(starts[0] + ends[0] - best), abs=tolerance())


def test_null_score_difference_is_finite_and_orders():
    assert null_score_difference(0.0, 0.0) == null_score_difference(0.5, 0.5) == 0
    assert null_score_difference(np.nextafter(0.3, 1), 0.3) > 0 > null_score_difference(0.3, np.nextafter(0.3, 1))
    assert -200 < null_score_difference(0.0, 2.0**-149) < 0 < null_score_difference(2.0**-149, 0.0) < 200
    assert null_score_difference(np.e * 0.1, 0.1) == pytest.approx(1)


def test_a_long_word_and_a_long_text(answer):
    assert answer("who?", "a" * 100_000)["end"] == 100_000  # one [UNK]
    assert answer("who?", "the king of paris " * 2000)["answer"] in "the king of paris the king of paris " * 9


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, TypeError, "inputs must be a dict with question and context, or a list or an iterator"),
        (("who?",), {}, TypeError, "inputs must be a dict with question and context, got str 'who"),
        (({"question": "who?"},), {}, TypeError, "inputs must be a dict with question and context, got dict"),
        (([{"question": "a", "context": "b"}, 5],), {}, TypeError, r"inputs\[1\] must be a dict.*got int 5"),
        (({"question": None, "context": "b"},), {}, TypeError, "inputs: question must be a str, got None"),
        (("a", b"b"), {}, TypeError, "inputs: context must be a str, got bytes"),
        (("", "b"), {}, ValueError, "inputs: question is empty"),
        (("a", ""), {}, ValueError, "inputs: context is empty"),
        ((["a", "b"], ["c", "\ud800"]), {}, ValueError, r"inputs\[1\]: context is not Unicode text"),
        ((["a", "b"], ["c"]), {}, ValueError, "2 questions and 1 contexts: they must match"),
        (("a", "b"), {"top_k": 0}, ValueError, "top_k must be a whole number from 1 up, got 0"),
        (("a", "b"), {"max_answer_len": 0}, ValueError, "max_answer_len must be a whole number from 1 up, got 0"),
        (("a", "b"), {"max_seq_len": 513}, ValueError, "max_seq_len=513, but the model takes 512 tokens"),
        (("a", "b"), {"doc_stride": 384}, ValueError, "doc_stride=384 must be below max_seq_len=384"),
        (
            ("a", "b " * 400),
            {"doc_stride": 381},
            ValueError,
            r"leaves 380 of max_seq_len=384 to the context, and doc_str",
        ),
        (
            ("a", "b"),
            {"null_score_diff_threshold": 1.5},
            ValueError,
            "=1.5 says nothing without handle_impossible_answer",
        ),
        *(
            (
                ("a", "b"),
                {"null_score_diff_threshold": bad, "handle_impossible_answer": True},
                ValueError,
                "null_score_diff_threshold must be a finite number, got",
            )
            for bad in (float("nan"), float("inf"), "1", True)
        ),
        (("a", "b"), {"topk": 2}, TypeError, "topk"),
        ((), {"context": "b"}, TypeError, "give a question and a context"),
    ],
    ids=ascii,
)
def test_errors(answer, arguments, options, error, message):
    with pytest.raises(error, match=message):
        answer(*arguments, **options)

"""Question answering as transformers 4.57 defined it: data/question_answering.json has its results on a tiny model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pipeline_case
import pytest
import torch
from reference import rounding

import minibert
from minibert import cli, pipeline

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
        (("a", "b"), {"topk": 2}, TypeError, "topk"),
        ((), {"context": "b"}, TypeError, "give a question and a context"),
    ],
    ids=ascii,
)
def test_errors(answer, arguments, options, error, message):
    with pytest.raises(error, match=message):
        answer(*arguments, **options)

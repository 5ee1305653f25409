"""Classifying texts: results in transformers' shape and with its numbers; streams, errors, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from pipeline_case import pipelines, same, tiny
from reference import assert_as_exact, realign
from torch import Tensor

from minibert import pipeline

NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
TEXTS = ["A fine day.", "", "Café 😀 naïve, don't!", "word " * 50, "x"]
PAIR = {"text": "a query", "text_pair": "the passage that answers it"}


@pytest.fixture(scope="module")
def classifiers(minilm_dir):
    return pipelines("text-classification", "BertForSequenceClassification", minilm_dir, **NAMES)


@pytest.fixture(scope="module")
def classify(classifiers):
    return classifiers[0]


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, TEXTS[:1], PAIR, [PAIR, PAIR], [PAIR, "a"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}, {"top_k": 9}], ids=str)
def test_results_are_those_of_transformers(classifiers, inputs, options):
    ours, theirs = classifiers
    assert same(ours(inputs, **options), theirs(inputs, **options))


@pytest.mark.parametrize("function", ["none", "sigmoid", "softmax", "SOFTMAX"])
def test_functions(classifiers, function):
    ours, theirs = classifiers
    assert same(
        ours(TEXTS, function_to_apply=function, top_k=None), theirs(TEXTS, function_to_apply=function, top_k=None)
    )


@pytest.mark.parametrize(
    "config",
    [{"problem_type": "multi_label_classification", **NAMES}, {"problem_type": "regression", "num_labels": 1},
     {"num_labels": 1}, {"problem_type": "regression", "num_labels": 3}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 2}, {"function_to_apply": "softmax"}], ids=str)
def test_defaults_follow_the_problem(minilm_dir, config, options):
    """Given to the pipeline or to the call."""
    kind = ("sentiment-analysis", "BertForSequenceClassification", minilm_dir, 1)
    ours, theirs = pipelines(*kind, **config)
    set_ours, set_theirs = pipelines(*kind, options, **config)
    for inputs in (TEXTS[0], TEXTS, PAIR):
        assert same(ours(inputs, **options), theirs(inputs, **options))
        assert same(set_ours(inputs), set_theirs(inputs))


def test_truncation(classifiers):
    ours, theirs = classifiers
    long = "word " * 100
    cut = {"truncation": True, "max_length": 32}
    assert same(ours([long, "b"], **cut), theirs([long, "b"], **cut))
    assert same(ours(long, truncation=True, padding=True), theirs(long, truncation=True))
    again = pipeline("text-classification", ours.model, ours.tokenizer, truncation=True)
    assert same(again(long), ours(long, truncation=True))


def test_fifty_classes_of_reactions(rxnfp_dir):
    """A real classifier: probabilities as close to those in float64 as the reference's, on either path."""
    directory = rxnfp_dir / "bert_ft_10k_25s"
    model = realign(transformers.BertForSequenceClassification.from_pretrained(directory))
    tokenizer = transformers.BertTokenizer.from_pretrained(directory, do_lower_case=False)
    reactions = ["C C ( = O ) O . N C C > > C C ( = O ) N C C", "c 1 c c c c c 1 Br . B ( O ) O", "N", "C C O " * 60]

    def scores(pipe: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        answers = [{answer["label"]: answer["score"] for answer in text} for text in pipe(reactions, top_k=None)]
        return torch.tensor([[answer[label] for label in model.config.label2id] for answer in answers], dtype=dtype)

    theirs = scores(transformers.pipeline("text-classification", model=model, tokenizer=tokenizer))
    ours = [scores(pipeline("text-classification", directory, fast=fast)) for fast in (True, False)]
    exact = scores(
        transformers.pipeline("text-classification", model=model.double(), tokenizer=tokenizer), torch.float64
    )
    assert exact.shape == (4, 50)
    for found in ours:
        assert_as_exact(found, theirs, exact)


def test_pairs_in_every_form(classify):
    one = classify(PAIR)
    pair = tuple(PAIR.values())
    assert classify(pair) == one
    assert same(classify([pair, PAIR, list(pair)]), [one] * 3)
    assert classify({"text": TEXTS[0]}) == classify(TEXTS[0])[0]


def test_fast_and_plain_agree_and_fast_is_the_default(classify):
    plain = pipeline("text-classification", classify.model, classify.tokenizer, fast=False)
    assert classify.fast
    assert classify.runner is not classify.model
    assert plain.runner is plain.model
    assert same(classify(TEXTS), plain(TEXTS))


def test_what_is_fast_by_default(minilm_dir):
    model, tokenizer = tiny("BertForSequenceClassification", minilm_dir, 0)[0]
    assert not pipeline("text-classification", model.train(), tokenizer).fast
    assert not pipeline("text-classification", model.bfloat16(), tokenizer).fast
    assert pipeline("text-classification", model.float().eval(), tokenizer).fast


def test_a_model_that_changes(minilm_dir):
    """Training goes on after the pipeline was made: it answers with the parameters of the moment."""
    model, tokenizer = tiny("BertForSequenceClassification", minilm_dir, 0)[0]
    classify = pipeline("text-classification", model, tokenizer)
    before = classify(TEXTS[0], top_k=None)
    with torch.no_grad():
        model.classifier.bias[0] += 3
        model.bert.encoder.layer[0].output.dense.weight *= 0.5
    after = classify(TEXTS[0], top_k=None)
    assert after != before
    assert same(after, pipeline("text-classification", model, tokenizer, fast=False)(TEXTS[0], top_k=None))


def test_a_model_that_changes_during_a_call(minilm_dir):
    """No call's results are of two models, nor of one that is gone."""
    model, tokenizer = tiny("BertForSequenceClassification", minilm_dir, 0)[0]
    classify = pipeline("text-classification", model, tokenizer)
    seen = []

    def answer(runner, batch, spans):
        seen.append(len(spans))
        if len(seen) == 2:
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight *= 0.5
        return runner(**batch).logits.tolist()

    rows = classify._encode(TEXTS[:4], 0, None)
    results = classify._run(rows, answer, 1)
    assert len(seen) == 6
    assert results == classify._run(rows, answer, 1)
    again = pipeline("text-classification", model, tokenizer)
    assert results == again._run(rows, answer, 1)


def test_threads(classify):
    texts = [" ".join(["word"] * n) for n in range(1, 33)]
    expected = [classify(text) for text in texts]
    fresh = pipeline("text-classification", classify.model, classify.tokenizer)
    with ThreadPoolExecutor(8) as pool:
        assert same(list(pool.map(fresh, texts)), expected)


# Streams


def test_a_stream_gives_what_a_list_gives(classify):
    texts = [f"{text} {i}"[:200] for i in range(3) for text in TEXTS]
    results = classify(iter(texts))
    assert not isinstance(results, list)
    assert same(list(results), classify(texts))
    assert same(list(classify((text for text in texts), batch_size=4)), classify(texts))
    assert list(classify(iter([]))) == []


def test_a_stream_is_read_as_it_is_used(classify):
    read = []
    results = classify((read.append(i) or "text" for i in range(1000)), batch_size=5)
    assert read == []
    for _ in range(6):
        next(results)
    assert len(read) == 10


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (None, TypeError, r"inputs\[7\] must be a str, got None"),
        (b"bytes", TypeError, r"inputs\[7\] must be a str, got bytes b'bytes'"),
        (5, TypeError, r"inputs\[7\] must be a str, got int 5"),
        ("\ud800", ValueError, r"inputs\[7\] is not Unicode text: lone surrogate '\\ud800' at character 0"),
        ("word " * 100, ValueError, r"inputs\[7\] has 102 tokens, the model takes 64"),
        (("a", None), TypeError, r"inputs\[7\] must be a pair"),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_nothing_is_lost_before_a_bad_item(classify, bad, error, message, batch_size):
    texts = ["good"] * 7 + [bad, "good"]
    results = []
    with pytest.raises(error, match=message):
        results.extend(classify(iter(texts), batch_size=batch_size))
    assert same(results, classify(["good"] * 7))
    with pytest.raises(error, match=message):
        classify(texts)


def test_an_iterator_that_fails(classify):
    def texts():
        yield from ["a", "b"]
        raise OSError("the disk is gone")

    results = []
    with pytest.raises(OSError, match="the disk is gone"):
        results.extend(classify(texts()))
    assert same(results, classify(["a", "b"]))


# Bad input


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (None, {}, TypeError, "inputs must be a str, a pair .*or a list or an iterator of them; got None"),
        (b"x", {}, TypeError, "inputs must be .*got bytes b'x'"),
        ({"a"}, {}, TypeError, "inputs must be .*got set"),
        ({"text": "a", "pair": "b"}, {}, TypeError, r"inputs must be a pair \(text, text_pair\), got dict"),
        (["a", 1.5], {}, TypeError, r"inputs\[1\] must be a str, got float 1.5"),
        (["a", ["b"]], {}, TypeError, r"inputs\[1\] must be a pair"),
        ([("a", "\udfff")], {}, ValueError, r"inputs\[0\]: text_pair is not Unicode"),
        ("a", {"top_k": 0}, ValueError, "top_k must be a whole number from 1 up, got 0"),
        ("a", {"top_k": "all"}, ValueError, "top_k must be a whole number from 1 up, got 'all'"),
        ("a", {"function_to_apply": "relu"}, ValueError, "function_to_apply must be one of 'none', 'sig"),
        ("a", {"truncate": True}, TypeError, "truncate"),
        ("a", {"batch_size": 0}, ValueError, "batch_size must be a whole number from 1 up, got 0"),
        pytest.param(iter("ab"), {"batch_size": 0}, ValueError, "batch_size", id="iterator"),
    ],
    ids=ascii,
)  # fmt: skip
def test_errors(classify, inputs, options, error, message):
    with pytest.raises(error, match=message):
        classify(inputs, **options)


def test_long_words_and_long_texts(classify):
    assert same(classify("a" * 100_000), classify("[UNK]"))
    assert same(classify("word " * 200_000, truncation=True), classify("word " * 62))


def test_no_texts(classify):
    assert classify([]) == []


def test_a_fine_tuned_model_is_needed():
    with pytest.raises(ValueError, match="text-classification needs a fine-tuned model: pass its directory"):
        pipeline("text-classification")

"""Tagging: every strategy of transformers' token-classification pipeline, its word grouping, windows, offsets."""

from __future__ import annotations

import random

import pytest
from pipeline_case import pipelines, same

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
STRATEGIES = ["none", "simple", "first", "average", "max"]
TEXTS = [
    "Sarah lives in New York, near José's café.",
    "naïve Zoë\u0308 e\u0301te\u0301 😀 \u200d 👩‍🚀 ok",
    "unbelievably tokenizations — “quoted” don't 3.14 中国人 ﬁne",
    "",
    " \t\n spaced \u00a0 out  ",
    "[SEP] in the [MASK] text [UNK]",
    "supercalifragilistic" * 12 + " after",
]
WORDS = ["Sarah", "lives", "don't", "naïve", "😀", "New", "York", ",", "unbelievably", "U.S.", "日本"]


@pytest.fixture(scope="module", params=[0, 1])
def taggers(request, minilm_dir):
    kind = ("ner", "BertForTokenClassification", minilm_dir, request.param)
    return pipelines(*kind, positions=64 if request.param else 512, **NAMES)


@pytest.fixture(scope="module")
def tag(minilm_dir):
    return pipelines("ner", "BertForTokenClassification", minilm_dir, 1, **NAMES)[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_are_those_of_transformers(taggers, strategy):
    ours, theirs = taggers
    options = {"aggregation_strategy": strategy}
    texts = [text for text in TEXTS if len(text) < 100 or ours.longest == 512]
    assert same(ours(texts, **options), [theirs(text, **options) for text in texts])
    assert same(ours(texts[0], **options), theirs(texts[0], **options))
    labels = {**options, "ignore_labels": ["MISC", "I-PER", "LOC"]}
    assert same(ours(texts, **labels), [theirs(text, **labels) for text in texts])
    assert same(ours(texts[0], ignore_labels=[], **options), theirs(texts[0], ignore_labels=[], **options))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_texts(taggers, strategy):
    ours, theirs = taggers
    draw = random.Random(STRATEGIES.index(strategy))
    texts = ["".join(draw.choice(" abcdé😀ßI,.-'\u0301中#") for _ in range(draw.randint(1, 50))) for _ in range(20)]
    texts = [text for text in texts if len(ours.tokenizer(text)["input_ids"]) <= 64]
    assert same(ours(texts, aggregation_strategy=strategy), theirs(texts, aggregation_strategy=strategy))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("stride", [0, 16, 40])
def test_long_texts_in_windows(taggers, strategy, stride):
    ours, theirs = taggers
    draw = random.Random(stride)
    texts = [" ".join(draw.choices(WORDS, k=length)) for length in (350, 30, 5)]
    options = {"aggregation_strategy": strategy, "stride": stride}
    assert same(ours(texts, **options), [theirs(text, **options) for text in texts])


def test_a_long_text_is_cut_with_a_warning(tag):
    with pytest.warns(UserWarning, match=r"inputs\[1\] has 102 tokens and is cut to 64: pass stride= to tag all of it"):
        long = tag(["a", "word " * 100], ignore_labels=[])[1]
    assert len(long) == 62


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_words(taggers, strategy):
    ours, theirs = taggers
    options = {"aggregation_strategy": strategy, "is_split_into_words": True, "ignore_labels": []}
    for more in ({}, {"delimiter": ""}, {"delimiter": " - "}):
        assert same(ours(WORDS, **options, **more), theirs(WORDS, **options, **more))
        assert same(ours([WORDS, ["x"]], **options, **more), theirs([WORDS, ["x"]], **options, **more))


def test_a_stream_and_settings(tag, minilm_dir):
    again = pipelines("ner", "BertForTokenClassification", minilm_dir, 1,
                      {"aggregation_strategy": "first", "ignore_labels": ["MISC"]}, **NAMES)[0]  # fmt: skip
    expected = tag(TEXTS[:5], aggregation_strategy="first", ignore_labels=["MISC"])
    assert same(list(again(iter(TEXTS[:5]))), expected)
    assert same(list(again((list(text.split()) for text in TEXTS[:2]), is_split_into_words=True)),
                again([text.split() for text in TEXTS[:2]], is_split_into_words=True))  # fmt: skip
    assert tag([]) == []
    assert tag("") == []


def test_offsets_are_of_the_original_text(tag):
    for entity in tag(TEXTS[0], aggregation_strategy="first", ignore_labels=[]):
        assert TEXTS[0][entity["start"] : entity["end"]].strip() == TEXTS[0][entity["start"] : entity["end"]] != ""


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (None, {}, TypeError, "inputs must be a str, or a list or an iterator of them; got None"),
        (["a", b"b"], {}, TypeError, r"inputs\[1\] must be a str, got bytes"),
        (["a", ["b"]], {}, TypeError, r"inputs\[1\] must be a str; got list"),
        (
            "a b",
            {"is_split_into_words": True},
            TypeError,
            "inputs must be a list of words, as is_split_into_words=True",
        ),
        ([["a"], ["b", 3]], {"is_split_into_words": True}, TypeError, r"inputs\[1\]\[1\] must be a str, got int 3"),
        ("\udc80", {}, ValueError, "inputs is not Unicode text: lone surrogate"),
        (
            "a",
            {"aggregation_strategy": "best"},
            ValueError,
            "aggregation_strategy must be one of 'none', 'simple'.*'best'",
        ),
        ("a", {"stride": 4}, ValueError, "stride needs an aggregation_strategy"),
        (
            "a",
            {"stride": 62, "aggregation_strategy": "simple"},
            ValueError,
            "stride must be a whole number from 0 to 61",
        ),
        ("a", {"grouped_entities": True}, TypeError, "grouped_entities"),
    ],
    ids=ascii,
)
def test_errors(tag, inputs, options, error, message):
    with pytest.raises(error, match=message):
        tag(inputs, **options)

"""Feature extraction: the states of transformers, in its shapes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from pipeline_case import pipelines, tiny
from reference import assert_as_exact

from minibert import pipeline

TEXTS = ["A text.", "", "Another one, longer, with naïve 😀 words."]


@pytest.fixture(scope="module")
def extractors(minilm_dir):
    return pipelines("feature-extraction", "BertModel", minilm_dir, 0)


@pytest.fixture(scope="module")
def exact(minilm_dir):
    """transformers' in float64: the two orders of the same sums are each so far from it."""
    _, (model, tokenizer) = tiny("BertModel", minilm_dir, 0)
    return transformers.pipeline("feature-extraction", model=model.double(), tokenizer=tokenizer)


def as_exact(found, expected, exact) -> None:
    """Lists of one shape, whose numbers are as exact as the reference's."""
    if isinstance(expected, list) and isinstance(expected[0], list) and not isinstance(expected[0][0], float):
        assert len(found) == len(expected) == len(exact)
        for parts in zip(found, expected, exact, strict=True):
            as_exact(*parts)
        return
    found, expected, exact = torch.tensor(found), torch.tensor(expected), torch.tensor(exact, dtype=torch.float64)
    assert found.shape == expected.shape
    assert_as_exact(found, expected, exact)


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, TEXTS[:1]], ids=str)
def test_states_are_those_of_transformers(extractors, exact, inputs):
    ours, theirs = extractors
    as_exact(ours(inputs), theirs(inputs), exact(inputs))
    results = [pipe(inputs, return_tensors=True) for pipe in (ours, theirs, exact)]
    for a, b, c in zip(*([x] if isinstance(inputs, str) else x for x in results), strict=True):
        assert a.shape == b.shape
        assert_as_exact(a, b, c)


def test_truncation_and_streams(extractors, exact):
    ours, theirs = extractors
    long = "word " * 100
    as_exact(*(pipe(long, truncation=True) for pipe in (ours, theirs, exact)))
    cut = {"tokenize_kwargs": {"truncation": True, "max_length": 8}}
    as_exact(*(pipe(long, **cut) for pipe in (ours, theirs, exact)))
    as_exact(list(ours(iter(TEXTS))), ours(TEXTS), exact(TEXTS))
    with pytest.raises(ValueError, match="inputs has 102 tokens, the model takes 64"):
        ours(long)


def test_a_model_with_a_head_gives_the_states_of_its_encoder(minilm_dir):
    model, tokenizer = tiny("BertForMaskedLM", minilm_dir, 0)[0]
    found = pipeline("feature-extraction", model, tokenizer)(TEXTS[0], return_tensors=True)
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        expected = model.bert(**batch).last_hidden_state
        assert_as_exact(found, expected, copy.deepcopy(model.bert).double()(**batch).last_hidden_state)


def test_a_real_encoder(minilm_dir):
    """Which has no pooler's weights to miss, since none are asked for."""
    assert pipeline("feature-extraction", minilm_dir)("A text.", return_tensors=True).shape == (1, 5, 384)

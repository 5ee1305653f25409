"""Feature extraction: the states of transformers, in its shapes."""

from __future__ import annotations

import pytest
import torch
from pipeline_case import pipelines, same, tiny

from minibert import pipeline

TEXTS = ["A text.", "", "Another one, longer, with naïve 😀 words."]


@pytest.fixture(scope="module")
def extractors(minilm_dir):
    return pipelines("feature-extraction", "BertModel", minilm_dir, 0)


@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, TEXTS[:1]], ids=str)
def test_states_are_those_of_transformers(extractors, inputs):
    ours, theirs = extractors
    assert same(ours(inputs), theirs(inputs), 1e-4)
    found, expected = ours(inputs, return_tensors=True), theirs(inputs, return_tensors=True)
    if isinstance(inputs, str):
        found, expected = [found], [expected]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-4)


def test_truncation_and_streams(extractors):
    ours, theirs = extractors
    long = "word " * 100
    assert same(ours(long, truncation=True), theirs(long, truncation=True), 1e-4)
    cut = {"tokenize_kwargs": {"truncation": True, "max_length": 8}}
    assert same(ours(long, **cut), theirs(long, **cut), 1e-4)
    assert same(list(ours(iter(TEXTS))), ours(TEXTS), 1e-4)
    with pytest.raises(ValueError, match="inputs has 102 tokens, the model takes 64"):
        ours(long)


def test_a_model_with_a_head_gives_the_states_of_its_encoder(minilm_dir, extractors):
    model, tokenizer = tiny("BertForMaskedLM", minilm_dir, 0)[0]
    found = pipeline("feature-extraction", model, tokenizer)(TEXTS[0], return_tensors=True)
    with torch.no_grad():
        expected = model.bert(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_real_encoder(minilm_dir):
    """Which has no pooler's weights to miss, since none are asked for."""
    assert pipeline("feature-extraction", minilm_dir)("A text.", return_tensors=True).shape == (1, 5, 384)

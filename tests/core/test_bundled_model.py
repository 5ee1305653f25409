"""The English model that comes with the package: small, whole, the default, and it has learned something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minibert import BertForPreTraining, BertTokenizer, pipeline
from minibert.weights import hub

NAME = "minibert-english-uncased"
A = "The whale is the largest of all animals that live in the sea."
B = "It feeds on small fish, and comes up to the surface to breathe."
ELSEWHERE = "Interest rates rose when the central bank sold its bonds."


def test_it_is_the_default_and_small():
    directory = Path(hub.default_model())
    assert directory.name == NAME
    assert sum(file.stat().st_size for file in directory.iterdir()) < 16e6
    assert "CC BY 4.0" in (directory / "README.md").read_text()
    assert BertForPreTraining.from_pretrained(NAME).dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("She opened the [MASK] and went into the house.", "door"),
        ("If you don't [MASK] at the sign, you will get a ticket.", "look"),
        ("He studied at the [MASK] of London.", "university"),
        ("They have not [MASK] him since that day.", "seen"),
    ],
)
def test_masked_words(text, word):
    answers = pipeline("fill-mask")(text)
    assert word in [answer["token_str"] for answer in answers]


def test_next_sentence():
    judge = pipeline("next-sentence-prediction")
    follows, other = (judge((A, second))["probabilities"]["IS_NEXT"] for second in (B, ELSEWHERE))
    assert follows > 0.8
    assert other < 0.2


def test_text_that_is_too_long():
    tokenizer, model = BertTokenizer.from_pretrained(NAME), BertForPreTraining.from_pretrained(NAME)
    assert tokenizer("word " * 300, truncation=True, return_tensors="pt")["input_ids"].shape == (1, 128)
    with pytest.raises(ValueError, match="max_position_embeddings allows 128"):
        model(torch.ones(1, 129, dtype=torch.long))

"""A small random sentence encoder with a real tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minibert
from minibert import SentenceEncoder

TINY = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_dir(minilm_dir, tmp_path_factory) -> Path:
    """A small random BERT with a real, cased tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    minibert.BertModel(minibert.BertConfig(**TINY)).save_pretrained(directory)
    minibert.BertTokenizer(minilm_dir / "vocab.txt", do_lower_case=False).save_pretrained(directory)
    return directory


@pytest.fixture
def tiny(tiny_dir) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(tiny_dir, device="cpu")

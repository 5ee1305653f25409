"""Sentence embeddings: `SentenceEncoder`, `semantic_search`, and `embed_file` for files larger than memory."""

from __future__ import annotations

from minibert.embedding.encoder import SentenceEncoder
from minibert.embedding.files import embed_file
from minibert.embedding.similarity import semantic_search

__all__ = ["SentenceEncoder", "embed_file", "semantic_search"]

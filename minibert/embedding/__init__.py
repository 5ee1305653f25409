"""Sentence embeddings: `SentenceEncoder`, and `embed_file` for files larger than memory."""

from __future__ import annotations

from minibert.embedding.encoder import SentenceEncoder
from minibert.embedding.files import embed_file

__all__ = ["SentenceEncoder", "embed_file"]

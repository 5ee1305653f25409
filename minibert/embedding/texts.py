"""Texts and pairs of texts as they come, checked one by one and gathered in chunks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from minibert.checks import check_text, shown

Text = str | tuple[str, str]  # a pair is two texts in one sequence: [CLS] a [SEP] b [SEP]

CHUNK_TEXTS = 512  # enough to sort by length; a progress bar moves, and a Ctrl-C loses, so many
CHUNK_CHARACTERS = 1 << 22  # of all texts of a chunk together


def as_texts(inputs: Any) -> tuple[Iterable[Any], bool]:
    """The texts one after another, and whether they were a single one, given without a list around it.

    An array of strings is a text a row, one of shape (n, 2) a pair a row. Raises TypeError for what cannot be texts
    in some order.
    """
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "UO":
        inputs = inputs.tolist()  # one str if it has no dimension
    if isinstance(inputs, str):
        return [inputs], True
    # Of sets and mappings the order is nobody's, and bytes and numbers are no texts
    unordered = isinstance(inputs, (bytes, bytearray, Mapping, set, frozenset, np.ndarray))
    if unordered or not isinstance(inputs, Iterable):
        raise TypeError(f"texts must be a str or an iterable of str, got {shown(inputs)}")
    return inputs, False


def checked(text: Any, where: str) -> Text:
    """A text, or a pair of texts as a tuple. Raises as `check_text` does."""
    if isinstance(text, (tuple, list)):
        if len(text) != 2:
            raise TypeError(f"{where} must be a str or a pair of them, got {shown(text)}")
        for number, part in enumerate(text):
            check_text(part, f"{where}[{number}]")
        return text[0], text[1]
    check_text(text, where)
    return text


def characters(text: Text) -> int:
    """How long a text is, both parts of a pair counted."""
    return len(text) if isinstance(text, str) else len(text[0]) + len(text[1])


def chunks(texts: Iterable[Any], size: int) -> Iterator[list[Text]]:
    """Lists of at most `size` texts (fewer if they are long), in order.

    What comes before a wrong text, or before a failure of the iterable itself, is given before the error is raised.
    """
    chunk, total = [], 0
    try:
        for number, text in enumerate(texts):
            chunk.append(checked(text, f"texts[{number}]"))
            total += characters(chunk[-1])
            if len(chunk) == size or total >= CHUNK_CHARACTERS:
                yield chunk
                chunk, total = [], 0
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk

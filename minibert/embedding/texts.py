"""Texts as they come, checked one by one and gathered in chunks that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

CHUNK_TEXTS = 512  # enough to sort by length; a progress bar moves, and a Ctrl-C loses, so many
CHUNK_CHARACTERS = 1 << 22  # of all texts of a chunk together


def check_iterable(texts: Any) -> None:
    """Raise TypeError for what cannot be texts in some order."""
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or an iterable of str, got {_show(texts)}")


def check_text(text: Any, where: str) -> None:
    """Raise TypeError for what is no str, ValueError for a str that is not Unicode (a lone surrogate)."""
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a str, got {_show(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"lone surrogate {text[error.start]!r} at character {error.start}"
        raise ValueError(f"{where} is not Unicode text: {what}") from None


def chunks(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most `size` texts (fewer if they are long), in order.

    What comes before a wrong text, or before a failure of the iterable itself, is given before the error is raised.
    """
    failure, chunk, characters = None, [], 0
    try:
        for number, text in enumerate(texts):
            check_text(text, f"texts[{number}]")
            chunk.append(text)
            characters += len(text)
            if len(chunk) == size or characters >= CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except Exception as error:
        failure = error
    if chunk:
        yield chunk
    if failure is not None:
        raise failure


def _show(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"

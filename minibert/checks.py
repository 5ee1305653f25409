"""What comes from outside, checked: the value itself, or an error that names it, says what came and what is allowed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def shown(value: Any) -> str:
    """A value in an error: its type, and how it begins."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"


def check_text(value: Any, name: str) -> str:
    """The text itself. TypeError for anything else, ValueError for what is not Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {shown(value)}")
    return check_unicode(value, name)


def check_unicode(text: str, name: str) -> str:
    """The text itself. ValueError for what is not Unicode: half of a surrogate pair, as cut JSON or file names have."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not Unicode text: lone surrogate {text[error.start]!r} at character {error.start}"
        ) from None
    return text


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`, else ValueError."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        upper = "up" if most is None else f"to {most}"
        raise ValueError(f"{name} must be a whole number from {least} {upper}, got {value!r}")
    return value


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """The one of `allowed` that the value is, else ValueError."""
    for choice in allowed:
        if isinstance(value, type(choice)) and value == choice:  # by type too, since 1 == True
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def read_json(path: Path, kind: type = dict) -> Any:
    """The object, or list, in a JSON file. ValueError, with the path, for what is not JSON in UTF-8 or another kind."""
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kind):
        wanted = "object" if kind is dict else "list"
        raise ValueError(f"{path} must hold a JSON {wanted}, got {type(content).__name__}")
    return content

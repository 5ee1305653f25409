"""What users hand in, checked item by item; errors name the item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Pair = tuple[str, str]


def check_text(value: Any, name: str) -> str:
    """The text itself. TypeError for anything else, ValueError for what is not Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {shown(value)}")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not Unicode text: lone surrogate {value[error.start]!r} at character {error.start}"
        ) from None
    return value


def check_pair(value: Any, name: str) -> Pair:
    """(text, text_pair) from such a tuple or list, or from a dict with these keys."""
    pair = as_pair(value)
    if pair is None:
        raise TypeError(f"{name} must be a pair (text, text_pair), got {shown(value)}")
    return check_text(pair[0], f"{name}: text"), check_text(pair[1], f"{name}: text_pair")


def as_pair(value: Any) -> Pair | None:
    """The two texts of what has the form of a pair; None for anything else."""
    if isinstance(value, Mapping) and value.keys() == {"text", "text_pair"}:
        value = (value["text"], value["text_pair"])
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)
    return tuple(value) if is_pair else None


def is_stream(inputs: Any) -> bool:
    """Whether items are to be taken one by one: an iterator, a dataset; not a list, nor what could be one item."""
    if isinstance(inputs, (str, bytes, bytearray, Mapping, set, frozenset, list, tuple)):
        return False
    return isinstance(inputs, Iterable) or (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"))


def shown(value: Any) -> str:
    """A value in an error: its type, and how it begins."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"


def place(number: int, first: int | None) -> str:
    """The name of an item in errors: `first` is the number of the first one, None where there is only one."""
    return "inputs" if first is None else f"inputs[{first + number}]"


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`, else ValueError."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        upper = "up" if most is None else f"to {most}"
        raise ValueError(f"{name} must be a whole number from {least} {upper}, got {value!r}")
    return value


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """One of `allowed`, else ValueError."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value

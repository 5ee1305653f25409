"""What users hand in, item by item: a text, a pair of texts, or several of them; errors name the item."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from minibert.checks import check_text, shown

Pair = tuple[str, str]


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


def place(number: int, first: int | None) -> str:
    """The name of an item in errors: `first` is the number of the first one, None where there is only one."""
    return "inputs" if first is None else f"inputs[{first + number}]"

"""How equal two implementations of BERT are, with evidence that someone else can check."""

from importlib import import_module
from typing import Any

__all__ = ["Report", "compare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"minibert.parity has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module("minibert.parity.comparison"), name)

"""Embeddings in fewer bytes: a byte or a bit for each number, as sentence-transformers stores them."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def check_precision(precision: str | None) -> str:
    """One of `PRECISIONS`; None is float32. Raises ValueError for any other."""
    precision = "float32" if precision is None else precision
    if precision not in PRECISIONS:
        raise ValueError(f"Precision {precision!r} is not supported: precision must be one of {', '.join(PRECISIONS)}")
    return precision


def quantize(embeddings: np.ndarray, precision: str) -> np.ndarray:
    """float32 (n, D) to int8 or uint8 (n, D), or to "binary" or "ubinary" (n, D / 8).

    int8 and uint8: each column's range in these n rows, in 256 steps; so vectors can be compared only with vectors
    that were quantized together with them. binary: a bit for each number that is above 0, eight in an int8 (less 128)
    or, for ubinary, in a uint8.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        bits = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if not len(embeddings):
        return embeddings.astype(precision)
    low, high = embeddings.min(0), embeddings.max(0)
    step = (high - low) / np.float32(255)
    numbers = np.clip(np.floor((embeddings - low) / np.where(step == 0, np.float32(1), step)), 0, 255)
    return (numbers - (128 if precision == "int8" else 0)).astype(precision)

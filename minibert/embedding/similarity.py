"""How alike embeddings are; more is more alike. The four functions of sentence-transformers, by its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.checks import check_count

Function = Callable[[Tensor, Tensor], Tensor]

MATRIX: dict[str, Function] = {  # (n, D), (m, D) -> (n, m)
    "cosine": lambda a, b: F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T,
    "dot": lambda a, b: a @ b.T,
    "euclidean": lambda a, b: -torch.cdist(a, b),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1.0),
}
PAIRWISE: dict[str, Function] = {  # (n, D), (n, D) -> (n,)
    "cosine": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1),
    "dot": lambda a, b: (a * b).sum(-1),
    "euclidean": lambda a, b: -torch.linalg.vector_norm(a - b, dim=-1),
    "manhattan": lambda a, b: -(a - b).abs().sum(-1),
}


def check_name(name: Any) -> str:
    """The name of a function, also as a member of sentence-transformers' enum; ValueError for any other."""
    name = getattr(name, "value", name)
    if name not in MATRIX:
        raise ValueError(f"similarity_fn_name must be one of {', '.join(MATRIX)}; got {name!r}")
    return name


def matrix(name: str, embeddings1: Any, embeddings2: Any) -> Tensor:
    """How alike each of n vectors is to each of m, (n, m)."""
    return MATRIX[name](*_alike(as_rows(embeddings1, "embeddings1"), as_rows(embeddings2, "embeddings2")))


def pairwise(name: str, embeddings1: Any, embeddings2: Any) -> Tensor:
    """How alike n vectors are to n others, pair by pair, (n,). Raises ValueError if they are not as many."""
    first, second = as_rows(embeddings1, "embeddings1"), as_rows(embeddings2, "embeddings2")
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise ValueError(f"embeddings1 are {len(first)} vectors and embeddings2 {len(second)}: no pairs")
    return PAIRWISE[name](*_alike(first, second))


def semantic_search(
    query_embeddings: Any,
    corpus_embeddings: Any,
    query_chunk_size: int = 100,
    corpus_chunk_size: int = 500_000,
    top_k: int = 10,
    score_function: str | Function = "cosine",
) -> list[list[dict[str, int | float]]]:
    """The vectors of a corpus that are most alike to each query, best first.

    Args:
        query_embeddings: (n, D), or one vector (D,); arrays, tensors or lists.
        corpus_embeddings: (m, D).
        query_chunk_size, corpus_chunk_size: so many scores are computed at a time.
        top_k: how many to find for a query; fewer if the corpus is smaller.
        score_function: "cosine", "dot", "euclidean" or "manhattan", or a function of (n, D) and (m, D) to (n, m).

    Returns a list for each query of {"corpus_id": row of the corpus, "score": float}. Raises ValueError for vectors
    of different widths.
    """
    for name, value in (("query_chunk_size", query_chunk_size), ("corpus_chunk_size", corpus_chunk_size)):
        check_count(name, value)
    check_count("top_k", top_k)
    score = score_function if callable(score_function) else MATRIX[check_name(score_function)]
    queries, corpus = _alike(
        as_rows(query_embeddings, "query_embeddings"), as_rows(corpus_embeddings, "corpus_embeddings")
    )
    results: list[list[dict[str, int | float]]] = []
    for some in queries.split(query_chunk_size) if len(queries) else ():
        values, places = some.new_empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        for start in range(0, len(corpus), corpus_chunk_size):
            found = score(some, corpus[start : start + corpus_chunk_size])
            numbers = torch.arange(start, start + found.shape[1], device=found.device).expand(len(some), -1)
            values, places = torch.cat([values, found], 1), torch.cat([places, numbers], 1)
            values, best = values.topk(min(top_k, values.shape[1]), dim=1)
            places = places.gather(1, best)
        for ids, scores in zip(places.tolist(), values.tolist(), strict=True):
            results.append([{"corpus_id": i, "score": value} for i, value in zip(ids, scores, strict=True)])
    return results


def as_rows(embeddings: Any, name: str) -> Tensor:
    """One vector or several, as arrays, tensors or lists, as a tensor (n, D) in float32 or float64.

    Raises TypeError for what are no real numbers, ValueError for another number of dimensions.
    """
    if isinstance(embeddings, (list, tuple)) and embeddings and isinstance(embeddings[0], Tensor):
        embeddings = torch.stack(list(embeddings))
    if not isinstance(embeddings, Tensor):
        embeddings = torch.from_numpy(_as_array(embeddings, name))
    if embeddings.is_complex():
        raise TypeError(f"{name} must be vectors of real numbers, got {embeddings.dtype}")
    # Sums of products in half precision or in whole numbers would be wrong, and some do not exist on a CPU
    rows = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ValueError(f"{name} must be one vector or several, got shape {tuple(rows.shape)}")
    return rows


def _as_array(embeddings: Any, name: str) -> np.ndarray:
    """An array that torch takes: in this machine's order of bytes, no axis of it backwards, and writeable."""
    array = np.asarray(embeddings)
    if array.dtype.kind not in "biufc":  # bool, whole, real and complex numbers
        raise TypeError(f"{name} must be vectors of numbers, got {type(embeddings).__name__} of {array.dtype}")
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return array if array.flags.writeable else array.copy()


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, on the device of the second (which may be a large corpus)."""
    if first.shape[1] != second.shape[1] and len(first) and len(second):
        raise ValueError(f"vectors of {first.shape[1]} numbers cannot be compared with vectors of {second.shape[1]}")
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(second.device, dtype), second.to(dtype)

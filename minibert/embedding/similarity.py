"""How alike embeddings are; more is more alike. The four functions of sentence-transformers, by its names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def check_name(name: str) -> str:
    if name not in MATRIX:
        raise ValueError(f"similarity_fn_name must be one of {', '.join(MATRIX)}; got {name!r}")
    return name


def as_rows(embeddings: Any, name: str) -> Tensor:
    """One vector or several, as arrays, tensors or lists, as a floating-point tensor (n, D)."""
    if isinstance(embeddings, (list, tuple)) and embeddings and isinstance(embeddings[0], Tensor):
        embeddings = torch.stack(list(embeddings))
    rows = torch.as_tensor(embeddings)
    rows = rows if rows.is_floating_point() else rows.float()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2:
        raise ValueError(f"{name} must be one vector or several, got shape {tuple(rows.shape)}")
    return rows

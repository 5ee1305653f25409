"""Attention over packed tokens: each text attends to itself alone."""

from __future__ import annotations

import torch
from torch import Tensor

from minibert.fast.padding import Packing


def attend(
    qkv_N3D: Tensor,
    packing: Packing,
    heads: int,
    wanted: list[Tensor] | None = None,
    maps_BHTT: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of each row of the batch, (N, 3 * D) -> (N, D).

    wanted: only these tokens of each row ask, and the result has only them. maps_BHTT, zeros, is filled with the
    attention probabilities if given.

    Two batched matrix products and a softmax: on CPU this beats `scaled_dot_product_attention`'s tiles up to 512
    tokens, because q, k and v are read where the fused projection left them and one row's scores fit the cache.
    """
    D, longest = qkv_N3D.shape[1] // 3, max(packing.lengths)
    K = D // heads
    counts = packing.lengths if wanted is None else [len(tokens) for tokens in wanted]
    context_ND = qkv_N3D.new_empty(sum(counts), D)
    # One workspace for all rows; allocated anew in each call, so that calls may run at the same time
    scores_buffer = qkv_N3D.new_empty(heads * longest * max(counts))
    context_buffer = qkv_N3D.new_empty(heads * max(counts) * K)
    end = done = 0
    for row, (n, m) in enumerate(zip(packing.lengths, counts, strict=True)):
        start, end = end, end + n
        query, key, value = qkv_N3D[start:end].view(n, 3, heads, K).unbind(1)  # (n, 3D) -> 3 times (n, H, K)
        if wanted is not None:
            query = query.index_select(0, wanted[row])  # (n, H, K) -> (m, H, K)
        scores = scores_buffer[: heads * m * n].view(heads, m, n)
        # beta=0: what the buffer held is not read
        torch.baddbmm(scores, query.transpose(0, 1), key.permute(1, 2, 0), beta=0, alpha=K**-0.5, out=scores)
        probabilities = _softmax(scores, packing.masks.get(row), None if wanted is None else wanted[row])
        if maps_BHTT is not None:
            _keep_map(maps_BHTT[row], probabilities, packing, row)
        context = context_buffer[: heads * m * K].view(heads, m, K)
        torch.bmm(probabilities, value.transpose(0, 1), out=context)
        context_ND[done : done + m].view(m, heads, K).copy_(context.transpose(0, 1))  # (H, m, K) -> (m, H, K)
        done += m
    return context_ND


def _softmax(scores: Tensor, mask: Tensor | None, wanted: Tensor | None) -> Tensor:
    """In place, over the last dimension; a token that may attend to nothing gets zeros, as from torch's kernel."""
    if mask is None:
        return torch.softmax(scores, -1, out=scores)
    if wanted is not None and mask.shape[1] > 1:
        mask = mask.index_select(1, wanted)
    scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1, out=scores).masked_fill_(nothing, 0.0)


def _keep_map(map_HTT: Tensor, probabilities: Tensor, packing: Packing, row: int) -> None:
    """Write one row's probabilities (H, n, n) where its computed tokens stand among the T columns."""
    places = packing.columns(row)
    map_HTT[:, places[:, None], places[None]] = probabilities

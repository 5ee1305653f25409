"""y = LayerNorm(word + segment + position), read from the three tables in one pass (section 3, figure 2)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import check_floats, check_size, row_tile
from minibert.fast.triton.layer_norm import layer_norm_backward, normalise


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    ids,  # (3, N) int64: word, segment and position of each token
    words,  # (V, D)
    segments,  # (S, D)
    positions,  # (P, D)
    weight,  # (D,)
    shift,  # (D,)
    total,  # (N, D) float32, written if TOTAL: the sum before the norm
    y,  # (N, D), written
    N,
    eps,
    D: tl.constexpr,
    TOTAL: tl.constexpr,
    ROWS: tl.constexpr,  # rows a program
    BLOCK: tl.constexpr,  # D, rounded up to a power of 2
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    word = tl.load(ids + rows, mask=rows < N, other=0)
    segment = tl.load(ids + N + rows, mask=rows < N, other=0)
    position = tl.load(ids + 2 * N + rows, mask=rows < N, other=0)
    # In the order of the plain model: floating-point sums depend on it
    z = tl.load(words + word[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    z += tl.load(segments + segment[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    z += tl.load(positions + position[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    at = rows[:, None] * D + columns[None, :]
    if TOTAL:
        tl.store(total + at, z, mask=inside)
    normalised, _ = normalise(z, inside, eps, D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + at, (normalised * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        words: Tensor,
        segments: Tensor,
        positions: Tensor,
        weight: Tensor,
        shift: Tensor,
        eps: float,
        padding: int,
        dtype: torch.dtype,
        keep: bool,
    ) -> Tensor:
        N, D = ids.shape[1], words.shape[1]
        y = torch.empty(N, D, dtype=dtype, device=words.device)
        total = torch.empty(N, D, dtype=torch.float32, device=words.device) if keep else y
        tile = row_tile(D)
        forward_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            ids, words, segments, positions, weight, shift, total, y, N, eps, D=D, TOTAL=keep, **tile
        )
        if keep:
            ctx.save_for_backward(ids, total, weight)
            ctx.eps, ctx.padding = eps, padding
            ctx.tables = [(len(table), table.dtype) for table in (words, segments, positions)]
            ctx.dtypes = weight.dtype, shift.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, total, weight = ctx.saved_tensors
        dz, _, d_weight, d_shift = layer_norm_backward(total, None, None, weight, dy.contiguous(), ctx.eps)
        # torch's own: sorted by row, without atomic additions for long tables. Row `padding` of the words has none
        grads = [
            torch.ops.aten.embedding_dense_backward(dz, ids[i], rows, ctx.padding if i == 0 else -1, False).to(dtype)
            for i, (rows, dtype) in enumerate(ctx.tables)
        ]
        weight_dtype, shift_dtype = ctx.dtypes
        return None, *grads, d_weight.to(weight_dtype), d_shift.to(shift_dtype), None, None, None, None


def embedding(
    ids: Tensor,
    words: Tensor,
    segments: Tensor,
    positions: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    padding: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(words[ids[0]] + segments[ids[1]] + positions[ids[2]]), (N, D), in `dtype` (None: that of words).

    ids (3, N) int64, not checked against the tables; tables (rows, D); weight, shift (D,). The word `padding` gets no
    gradient, as in torch. Raises ValueError and TypeError for other shapes and dtypes.
    """
    check_floats(words=words, segments=segments, positions=positions, weight=weight, shift=shift)
    check_size(words.shape[1], weight=weight, shift=shift)
    if ids.ndim != 2 or len(ids) != 3 or ids.dtype != torch.long:
        raise ValueError(f"ids must be int64 of shape (3, N), got {ids.dtype} {tuple(ids.shape)}")
    for name, table in (("segments", segments), ("positions", positions)):
        check_size(words.shape[1], **{f"a row of {name}": table[0]})
    dtype = words.dtype if dtype is None else dtype
    if ids.shape[1] == 0:
        return words.new_empty(0, words.shape[1], dtype=dtype)
    tables = [table.contiguous() for table in (words, segments, positions, weight, shift)]
    keep = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
    return Embedding.apply(ids.contiguous(), *tables, eps, -1 if padding is None else padding, dtype, keep)

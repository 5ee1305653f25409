"""y = LayerNorm(word + segment + position), read from the three tables in one pass (section 3, figure 2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import check_floats, check_size, row_tile
from minibert.fast.triton.layer_norm import normalise


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    ids,  # (3, N) int64: word, segment and position of each token
    words,  # (V, D)
    segments,  # (S, D)
    positions,  # (P, D)
    weight,  # (D,)
    shift,  # (D,)
    y,  # (N, D), written
    N,
    eps,
    D: tl.constexpr,
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
    normalised = normalise(z, inside, eps, D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + at, (normalised * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


def embedding(
    ids: Tensor,
    words: Tensor,
    segments: Tensor,
    positions: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(words[ids[0]] + segments[ids[1]] + positions[ids[2]]), (N, D), in `dtype` (None: that of words).

    ids (3, N) int64, not checked against the tables; tables (rows, D); weight, shift (D,). Without gradients. Raises
    ValueError and TypeError for other shapes and dtypes.
    """
    check_floats(words=words, segments=segments, positions=positions, weight=weight, shift=shift)
    check_size(words.shape[1], weight=weight, shift=shift)
    if ids.ndim != 2 or len(ids) != 3 or ids.dtype != torch.long:
        raise ValueError(f"ids must be int64 of shape (3, N), got {ids.dtype} {tuple(ids.shape)}")
    for name, table in (("segments", segments), ("positions", positions)):
        check_size(words.shape[1], **{f"a row of {name}": table[0]})
    N, D = ids.shape[1], words.shape[1]
    y_ND = torch.empty(N, D, dtype=words.dtype if dtype is None else dtype, device=words.device)
    if N:
        tables = [table.contiguous() for table in (words, segments, positions, weight, shift)]
        tile = row_tile(D)
        forward_kernel[(triton.cdiv(N, tile["ROWS"]),)](ids.contiguous(), *tables, y_ND, N, eps, D=D, **tile)
    return y_ND

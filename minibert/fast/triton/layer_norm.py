"""y = LayerNorm(x + bias + residual): how both halves of a BERT layer end, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import check_floats, check_size, row_tile


@triton.jit
def normalise(z, inside, eps, D: tl.constexpr):
    """Rows z (ROWS, BLOCK), 0 outside: their normalised values."""
    mean = tl.sum(z, axis=1) / D
    centred = tl.where(inside, z - mean[:, None], 0.0)
    return centred / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x,  # (N, D)
    bias,  # (D,), read if BIAS
    residual,  # (N, D), read if RESIDUAL
    weight,  # (D,)
    shift,  # (D,), the norm's own bias
    y,  # (N, D), written
    N,
    eps,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,  # rows a program
    BLOCK: tl.constexpr,  # D, rounded up to a power of 2
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    at = rows[:, None] * D + columns[None, :]
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    normalised = normalise(z, inside, eps, D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + at, (normalised * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


def layer_norm(
    x: Tensor, weight: Tensor, shift: Tensor, eps: float, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """LayerNorm(x + bias + residual) over the last dimension, in the dtype of x, without gradients.

    x, residual (..., D); weight, shift, bias (D,). Raises ValueError and TypeError for other shapes and dtypes.
    """
    D = x.shape[-1]
    check_floats(x=x, weight=weight, shift=shift, bias=bias, residual=residual)
    check_size(D, weight=weight, shift=shift, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if x.numel() == 0:
        return x.clone()
    x_ND, weight, shift = x.reshape(-1, D).contiguous(), weight.contiguous(), shift.contiguous()
    y_ND, tile = torch.empty_like(x_ND), row_tile(D)
    # What is not read is x, in the place of a pointer that the kernel would not take as None
    flat = x_ND if residual is None else residual.reshape(-1, D).contiguous()
    added = x_ND if bias is None else bias.contiguous()
    forward_kernel[(triton.cdiv(len(x_ND), tile["ROWS"]),)](
        x_ND, added, flat, weight, shift, y_ND, len(x_ND), eps,
        D=D, BIAS=bias is not None, RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return y_ND.view(x.shape)

"""y = gelu(x + bias), the exact gelu by erf, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import check_floats, check_size

ROWS, BLOCK, WARPS = 4, 1024, 4  # the tile of one program


@triton.jit
def gelu(z):
    """Z * P(X <= z) for a standard normal X: 0.7071... is sqrt(1 / 2)."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x,  # (N, F)
    bias,  # (F,)
    y,  # (N, F), written
    N,
    F: tl.constexpr,
    ROWS: tl.constexpr,  # rows a program
    BLOCK: tl.constexpr,  # columns a program
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns[None, :] < F)
    at = rows[:, None] * F + columns[None, :]
    b = tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b[None, :]
    tl.store(y + at, gelu(z).to(y.dtype.element_ty), mask=inside)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), in the dtype of x, without gradients. x (..., F), bias (F,).

    Raises ValueError and TypeError for others.
    """
    check_floats(x=x, bias=bias)
    check_size(x.shape[-1], bias=bias)
    if x.numel() == 0:
        return x.clone()
    x_NF = x.reshape(-1, x.shape[-1]).contiguous()
    y_NF, (N, F) = torch.empty_like(x_NF), x_NF.shape
    grid = (triton.cdiv(N, ROWS), triton.cdiv(F, BLOCK))
    forward_kernel[grid](x_NF, bias.contiguous(), y_NF, N, F=F, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS)
    return y_NF.view(x.shape)

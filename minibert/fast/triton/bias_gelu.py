"""y = gelu(x + bias), the exact gelu by erf, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import PARTIAL_SUMS, check_floats, check_size

ROWS, BLOCK, WARPS = 4, 1024, 4  # the tile of one program


@triton.jit
def gelu(z):
    """z * P(X <= z) for a standard normal X: 0.7071... is sqrt(1 / 2)."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    """The derivative: P(X <= z) + z * density(z); 0.3989... is 1 / sqrt(2 * pi)."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


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


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    x,  # (N, F)
    bias,  # (F,)
    dy,  # (N, F)
    dx,  # (N, F), written
    sums,  # (programs along N, F) float32, written: this program's share of the gradient of the bias
    N,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program * ROWS, N, programs * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows[:, None] < N) & (columns[None, :] < F)
        at = rows[:, None] * F + columns[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + b[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32) * gelu_slope(z)  # 0 outside, since dy is
        d_bias += tl.sum(d, axis=0)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(sums + program.to(tl.int64) * F + columns, d_bias, mask=columns < F)


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        y, (N, F) = torch.empty_like(x), x.shape
        grid = (triton.cdiv(N, ROWS), triton.cdiv(F, BLOCK))
        forward_kernel[grid](x, bias, y, N, F=F, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return bias_gelu_backward(*ctx.saved_tensors, dy.contiguous())


def bias_gelu_backward(x: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (N, F) and bias (F,)."""
    dx, (N, F) = torch.empty_like(x), x.shape
    programs, along = min(PARTIAL_SUMS, triton.cdiv(N, ROWS)), triton.cdiv(F, BLOCK)
    sums = torch.empty(programs, F, dtype=torch.float32, device=x.device)
    backward_kernel[(programs, along)](x, bias, dy, dx, sums, N, F=F, ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS)
    return dx, sums.sum(0).to(bias.dtype)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias), in the dtype of x. x (..., F), bias (F,). Raises ValueError and TypeError for others."""
    check_floats(x=x, bias=bias)
    check_size(x.shape[-1], bias=bias)
    if x.numel() == 0:
        return x.clone()
    return BiasGelu.apply(x.reshape(-1, x.shape[-1]).contiguous(), bias.contiguous()).view(x.shape)

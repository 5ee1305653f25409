"""y = LayerNorm(x + bias + residual): how both halves of a BERT layer end, in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import PARTIAL_SUMS, check_floats, check_size, row_tile


@triton.jit
def normalise(z, inside, eps, D: tl.constexpr):
    """Rows z (ROWS, BLOCK), 0 outside: their normalised values, and 1 / standard deviation (ROWS,)."""
    mean = tl.sum(z, axis=1) / D
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def load_sum(x, bias, residual, at, columns, inside, D: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return z


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
    z = load_sum(x, bias, residual, at, columns, inside, D, BIAS, RESIDUAL)
    normalised, _ = normalise(z, inside, eps, D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(y + at, (normalised * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    x,  # (N, D), as in forward
    bias,
    residual,
    weight,
    dy,  # (N, D)
    dz,  # (N, D), written: the gradient of x, and of the residual
    sums,  # (3, programs, D) float32, written: this program's share of the gradients of bias, weight and shift
    N,
    eps,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_shift = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(program * ROWS, N, programs * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows[:, None] < N) & (columns[None, :] < D)
        at = rows[:, None] * D + columns[None, :]
        z = load_sum(x, bias, residual, at, columns, inside, D, BIAS, RESIDUAL)
        normalised, rstd = normalise(z, inside, eps, D)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        d_weight += tl.sum(g * normalised, axis=0)
        d_shift += tl.sum(g, axis=0)
        g = g * w[None, :]
        along = tl.sum(g * normalised, axis=1) / D
        mean = tl.sum(g, axis=1) / D
        d = (g - normalised * along[:, None] - mean[:, None]) * rstd[:, None]
        d_bias += tl.sum(tl.where(inside, d, 0.0), axis=0)
        tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)
    at = program.to(tl.int64) * D + columns
    part = programs.to(tl.int64) * D
    tl.store(sums + at, d_bias, mask=columns < D)
    tl.store(sums + part + at, d_weight, mask=columns < D)
    tl.store(sums + 2 * part + at, d_shift, mask=columns < D)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, bias, residual, weight)
        ctx.eps, ctx.dtypes = eps, (weight.dtype, shift.dtype)
        y, (N, D) = torch.empty_like(x), x.shape
        tile = row_tile(D)
        forward_kernel[(triton.cdiv(N, tile["ROWS"]),)](
            x, x if bias is None else bias, x if residual is None else residual, weight, shift, y, N, eps,
            D=D, BIAS=bias is not None, RESIDUAL=residual is not None, **tile,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, residual, weight = ctx.saved_tensors
        dz, d_bias, d_weight, d_shift = layer_norm_backward(x, bias, residual, weight, dy.contiguous(), ctx.eps)
        weight_dtype, shift_dtype = ctx.dtypes
        d_bias = None if bias is None else d_bias.to(bias.dtype)
        d_residual = None if residual is None else dz.to(residual.dtype)
        return dz, d_bias, d_residual, d_weight.to(weight_dtype), d_shift.to(shift_dtype), None


def layer_norm_backward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, dy: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum that was normalised (N, D), and in float32 of bias, weight and shift, (D,) each."""
    dz, (N, D) = torch.empty_like(x), x.shape
    tile = row_tile(D)
    programs = max(1, min(PARTIAL_SUMS, triton.cdiv(N, tile["ROWS"])))
    sums = torch.empty(3, programs, D, dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        x, x if bias is None else bias, x if residual is None else residual, weight, dy, dz, sums, N, eps,
        D=D, BIAS=bias is not None, RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return dz, *sums.sum(1).unbind(0)


def layer_norm(
    x: Tensor, weight: Tensor, shift: Tensor, eps: float, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """LayerNorm(x + bias + residual) over the last dimension, in the dtype of x.

    x, residual (..., D); weight, shift, bias (D,). Raises ValueError and TypeError for other shapes and dtypes.
    """
    D = x.shape[-1]
    check_floats(x=x, weight=weight, shift=shift, bias=bias, residual=residual)
    check_size(D, weight=weight, shift=shift, bias=bias)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if x.numel() == 0:
        return x.clone()
    flat = None if residual is None else residual.reshape(-1, D).contiguous()
    bias = None if bias is None else bias.contiguous()
    x_ND = x.reshape(-1, D).contiguous()
    return LayerNorm.apply(x_ND, bias, flat, weight.contiguous(), shift.contiguous(), eps).view(x.shape)

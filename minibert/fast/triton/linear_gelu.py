"""y = gelu(x W^T + b): a matrix product whose result passes through gelu before it reaches memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.bias_gelu import gelu
from minibert.fast.triton.launch import check_floats, check_size

GROUP = 8  # tiles along N that share the weight's tiles while these are in the L2 cache


class Tile(NamedTuple):
    """What one program computes, N x F of the result in steps of D, and how."""

    N: int
    F: int
    D: int
    warps: int
    stages: int


# Which is fastest depends on the GPU: `optimize` measures them
TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(128, 128, 32, 4, 4))


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    x,  # (N, D)
    weight,  # (F, D)
    bias,  # (F,)
    y,  # (N, F), written
    N,
    F: tl.constexpr,
    D: tl.constexpr,
    EXACT: tl.constexpr,  # float32 is computed as such, not as tf32
    TILE_N: tl.constexpr,
    TILE_F: tl.constexpr,
    TILE_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs are numbered down a group of GROUP row tiles first, then along F
    program, along_N, along_F = tl.program_id(0), tl.cdiv(N, TILE_N), tl.cdiv(F, TILE_F)
    first = program // (GROUP * along_F) * GROUP
    height = tl.minimum(along_N - first, GROUP)
    rows = (first + program % (GROUP * along_F) % height).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    columns = (program % (GROUP * along_F) // height) * TILE_F + tl.arange(0, TILE_F)
    steps = tl.arange(0, TILE_D)
    x_at = x + rows[:, None] * D + steps[None, :]
    w_at = weight + columns[None, :] * D + steps[:, None]
    in_N, in_F = rows[:, None] < N, columns[None, :] < F
    z = tl.zeros((TILE_N, TILE_F), dtype=tl.float32)
    for d in range(0, D, TILE_D):
        if D % TILE_D == 0:
            a = tl.load(x_at, mask=in_N, other=0.0)
            b = tl.load(w_at, mask=in_F, other=0.0)
        else:
            a = tl.load(x_at, mask=in_N & (steps[None, :] < D - d), other=0.0)
            b = tl.load(w_at, mask=in_F & (steps[:, None] < D - d), other=0.0)
        if EXACT:
            z = tl.dot(a, b, z, input_precision="ieee")
        else:
            z = tl.dot(a, b, z)
        x_at += TILE_D
        w_at += TILE_D
    z += tl.load(bias + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows[:, None] * F + columns[None, :], gelu(z).to(y.dtype.element_ty), mask=in_N & in_F)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, tile: Tile = TILES[0]) -> Tensor:
    """gelu(x W^T + b), in the dtype of x. x (..., D), weight (F, D) of the dtype of x, bias (F,). Without
    gradients. Raises ValueError and TypeError for other shapes and dtypes.
    """
    check_floats(x=x, weight=weight, bias=bias)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be {x.dtype} of shape (F, {x.shape[-1]}), got {weight.dtype} {tuple(weight.shape)}"
        )
    check_size(len(weight), bias=bias)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], len(weight))
    x_ND = x.reshape(-1, x.shape[-1]).contiguous()
    (N, D), F = x_ND.shape, len(weight)
    y_NF = torch.empty(N, F, dtype=x.dtype, device=x.device)
    forward_kernel[(triton.cdiv(N, tile.N) * triton.cdiv(F, tile.F),)](
        x_ND, weight.contiguous(), bias.contiguous(), y_NF, N, F=F, D=D, EXACT=x.dtype == torch.float32,
        TILE_N=tile.N, TILE_F=tile.F, TILE_D=tile.D, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_NF.view(*x.shape[:-1], F)

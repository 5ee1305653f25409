"""The k most probable words of each row of logits and their probabilities, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import WIDEST, check_floats

MOST = 32  # beyond that, sorting is the faster way


@triton.jit
def forward_kernel(
    logits,  # (M, V), rows WIDTH apart
    probabilities,  # (M, k) float32, written, largest first
    words,  # (M, k) int64, written
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,  # V, rounded up to a power of 2: the row stays in registers
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    z = tl.load(logits + row * WIDTH + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    largest = tl.max(z, axis=0)
    total = tl.sum(tl.exp(z - largest), axis=0)
    for k in range(K):
        top, place = tl.max(z, axis=0, return_indices=True)
        tl.store(probabilities + row * K + k, tl.exp(top - largest) / total)
        tl.store(words + row * K + k, place.to(tl.int64))
        z = tl.where(columns == place, -float("inf"), z)


def softmax_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.float().softmax(-1).topk(k)`: probabilities (M, k) in float32 and ids (M, k), largest first.

    logits (M, V). No gradients. Of equal logits the first word comes first. Raises ValueError for k outside of V.
    """
    check_floats(logits=logits)
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"logits must be (M, V) and k from 1 to V, got {tuple(logits.shape)} and {k}")
    logits = logits.detach()
    M, V = logits.shape
    block = triton.next_power_of_2(V)
    if k > MOST or block > WIDEST or M == 0:
        return tuple(logits.float().softmax(-1).topk(k))
    probabilities = torch.empty(M, k, dtype=torch.float32, device=logits.device)
    words = torch.empty(M, k, dtype=torch.int64, device=logits.device)
    warps = min(32, max(4, block // 1024))
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    width = logits.stride(0)
    forward_kernel[(M,)](logits, probabilities, words, V=V, WIDTH=width, K=k, BLOCK=block, num_warps=warps)
    return probabilities, words

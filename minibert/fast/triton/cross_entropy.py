"""The loss of predicted words, and whether each prediction is right, in one pass over the logits.

A row of logits may be wider than the V words: memory is read 16 bytes at a time, and matrix products are fast, only if
a row's width is a multiple of 8, which the 30522 words of bert-base are not. What stands beyond the V words is ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibert.fast.triton.launch import check_floats

BLOCK, WARPS = 4096, 8  # elements of a row that a program reads at a time


@triton.jit
def forward_kernel(
    logits,  # (M, WIDTH)
    labels,  # (M,) int64
    losses,  # (M,) float32, written: 0 where there is no label
    hits,  # (M,) bool, written: the label is the first of the largest logits
    log_sums,  # (M,) float32, written: log sum exp of each row
    ignored,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * WIDTH
    columns = tl.arange(0, BLOCK)
    largest, total, best = -float("inf"), 0.0, 0
    for start in range(0, V, BLOCK):  # online softmax: the sum is kept relative to the largest so far
        # Two conditions, since a mask that ends at V would keep the loads from being wide
        z = tl.load(logits + start + columns, mask=start + columns < WIDTH, other=0.0).to(tl.float32)
        z = tl.where(start + columns < V, z, -float("inf"))
        top, place = tl.max(z, axis=0, return_indices=True)
        best = tl.where(top > largest, start + place, best)
        before, largest = largest, tl.maximum(largest, top)
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(z - largest), axis=0)
    log_sum = largest + tl.log(total)
    is_labelled = label != ignored
    chosen = tl.load(logits + label, mask=is_labelled, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(is_labelled, log_sum - chosen, 0.0))
    tl.store(hits + row, best == label)
    tl.store(log_sums + row, log_sum)


@triton.jit
def backward_kernel(
    logits,  # (M, WIDTH)
    labels,  # (M,)
    log_sums,  # (M,)
    d_losses,  # (M,) float32
    d_logits,  # (M, WIDTH), written: 0 beyond V
    ignored,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    scale = tl.where(label != ignored, tl.load(d_losses + row), 0.0)
    z = tl.load(logits + row * WIDTH + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    d = (tl.exp(z - tl.load(log_sums + row)) - tl.where(columns == label, 1.0, 0.0)) * scale
    tl.store(d_logits + row * WIDTH + columns, d.to(d_logits.dtype.element_ty), mask=columns < WIDTH)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int, V: int) -> tuple[Tensor, Tensor]:
        M, width = logits.shape
        losses = torch.empty(M, dtype=torch.float32, device=logits.device)
        log_sums = torch.empty_like(losses)
        hits = torch.empty(M, dtype=torch.bool, device=logits.device)
        forward_kernel[(M,)](
            logits, labels, losses, hits, log_sums, ignored, V=V, WIDTH=width, BLOCK=BLOCK, num_warps=WARPS
        )  # fmt: skip
        ctx.save_for_backward(logits, labels, log_sums)
        ctx.ignored, ctx.V = ignored, V
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, log_sums = ctx.saved_tensors
        (M, width), d_logits = logits.shape, torch.empty_like(logits)
        backward_kernel[(M, triton.cdiv(width, BLOCK))](
            logits, labels, log_sums, d_losses.float().contiguous(), d_logits, ctx.ignored,
            V=ctx.V, WIDTH=width, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        return d_logits, None, None, None


def cross_entropy(
    logits: Tensor, labels: Tensor, ignored: int = -100, words: int | None = None
) -> tuple[Tensor, Tensor]:
    """Per row: the loss in float32, 0 where the label is `ignored`, and whether the largest logit is the label's.

    logits (M, at least V); labels (M,) int64, not checked against V; words: V, None if logits have just that width.
    Returns (M,) and boolean (M,). The same loss as torch's `cross_entropy(logits.float(), labels, reduction="none")`,
    without the float32 copies of the logits. Raises ValueError and TypeError for other shapes and dtypes.
    """
    check_floats(logits=logits)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.long:
        raise ValueError(
            f"logits must be (M, V) and labels (M,) int64, got {tuple(logits.shape)} and {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    words = logits.shape[1] if words is None else words
    if not 1 <= words <= logits.shape[1]:
        raise ValueError(f"words must be from 1 to the {logits.shape[1]} columns of logits, got {words}")
    if len(logits) == 0:
        return logits.float().sum(1), labels.bool()
    return CrossEntropy.apply(logits.contiguous(), labels.contiguous(), ignored, words)

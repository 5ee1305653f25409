"""Losses of words, without a float32 copy of the vocabulary's logits on a GPU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minibert.fast.pieces import triton_obstacle
from minibert.heads import IGNORED


def word_losses(logits: Tensor, labels: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Per row of logits (P, V or more): the loss, 0 where the label is -100, and whether the label is the best word."""
    if _has_kernels(logits):
        from minibert.fast.triton.cross_entropy import cross_entropy

        return cross_entropy(logits, labels, IGNORED, words=V)
    logits = logits[:, :V].float()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return losses, logits.detach().argmax(-1) == labels


def _has_kernels(logits: Tensor) -> bool:
    return logits.is_cuda and not triton_obstacle(logits.dtype)

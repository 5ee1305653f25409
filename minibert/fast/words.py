"""What is wanted of the vocabulary's logits, without a float32 copy of them on a GPU: losses, or the best words."""

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


def top_words(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Per row of logits (M, V) the probabilities, in float32, and the ids of the k best words: (M, k) each.

    Raises ValueError for k outside of 1 to V.
    """
    if _has_kernels(logits):
        from minibert.fast.triton.softmax_topk import softmax_topk

        return softmax_topk(logits, k)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be from 1 to the {logits.shape[-1]} words, got {k}")
    return tuple(logits.float().softmax(-1).topk(k))


def _has_kernels(logits: Tensor) -> bool:
    return logits.is_cuda and not triton_obstacle(logits.dtype)

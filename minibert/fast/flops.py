"""How much arithmetic BERT is, and how much of it a GPU could do: the two sides of "model FLOPs utilisation" (MFU).

Counted as in Chowdhery et al. 2022 (PaLM, appendix B): the matrix products that the model needs, a multiplication and
an addition each; of real tokens alone; what is computed on padding, or again in the backward pass, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from statistics import median

import torch

from minibert.config import BertConfig


def forward_flops(config: BertConfig, lengths: Iterable[int], predictions: int = 0, pooled: int = 0) -> int:
    """Operations of one forward pass over texts of these lengths, with `predictions` words predicted by the
    masked-language-model head and `pooled` texts by the pooler.
    """
    D, F, V, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    lengths = list(lengths)
    products = sum(lengths) * (4 * D * D + 2 * D * F)
    attention = 2 * D * sum(length * length for length in lengths)  # scores, and the sums that they weight
    return 2 * (layers * (products + attention) + predictions * (D * D + D * V) + pooled * D * D)


def training_flops(config: BertConfig, lengths: Iterable[int], predictions: int = 0, pooled: int = 0) -> int:
    """The same for a training step: the backward pass is two products for each one of the forward pass."""
    return 3 * forward_flops(config, lengths, predictions, pooled)


@lru_cache
def matmul_peak(device: str | torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """Operations a second of a square product of random numbers, measured: the ceiling that the MFU is a share of."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 3):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

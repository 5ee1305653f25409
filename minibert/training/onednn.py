"""Linear layers in float32 on a CPU by oneDNN, forward and backward.

PyTorch gives float32 products to MKL, which leaves half of an AMD processor's vector width unused; oneDNN uses what is
there. The results differ in rounding only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def linear_layers(model: nn.Module) -> Iterator[None]:
    """Within this context the model's linear layers are oneDNN's, wherever their input is float32 on the CPU.

    Backward passes belong inside too: what they compute again (gradient checkpointing) must be computed as before.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # in front of the class's own
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    plain = x.device.type == "cpu" and x.dtype == layer.weight.dtype == torch.float32
    if plain and x.ndim > 1 and x.numel() > 0 and not torch.is_autocast_enabled("cpu"):
        return Linear.apply(x, layer.weight, layer.bias)
    return F.linear(x, layer.weight, layer.bias)


class Linear(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)  # (M, N), (M, K)
        return (
            product(gradient, weight.t()) if for_x else None,
            product(rows.t(), x_rows.t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., K) times b (N, K) transposed, plus bias (N,): (..., N). Neither needs to be contiguous."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

"""What trains faster on a CPU than PyTorch's own choice, by oneDNN, forward and backward; results differ in rounding.

Linear layers in float32: PyTorch gives their products to MKL, which leaves half of an AMD processor's vector width
unused. Attention in bfloat16: the backward pass of PyTorch's fused kernel takes three times as long as plain products.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import BertSelfAttention

LONGEST = 256  # tokens up to which plain products were seen to be faster than the fused attention


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Calling(AbstractContextManager[None]):
    """Within this context every module of a kind calls `forward(module, ...)`. It may be entered again and again.

    The calls are made once: torch.compile would take new ones for new code.
    """

    def __init__(self, model: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> None:
        self.calls = [(module, partial(forward, module)) for module in model.modules() if isinstance(module, kind)]

    def __enter__(self) -> None:
        for module, call in self.calls:
            module.forward = call  # in front of the class's own

    def __exit__(self, *exception: object) -> None:
        for module, _ in self.calls:
            del module.forward


def linear_layers(model: nn.Module) -> Calling:
    """Within this context the model's linear layers are oneDNN's, wherever their input is float32 on the CPU.

    Backward passes belong inside too: what they compute again (gradient checkpointing) must be computed as before.
    """
    return Calling(model, nn.Linear, _forward)


def attention_by_products(model: nn.Module) -> Calling:
    """Within this context the model's attention is matrix products and a softmax, where autocast is on.

    It keeps the (B, H, T, T) probabilities for the backward pass, which the fused kernel computes again.
    """
    return Calling(model, BertSelfAttention, _attention)


def _attention(
    layer: BertSelfAttention, hidden_states: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None
) -> Tensor:
    B, T, D = hidden_states.shape
    if maps is not None or T > LONGEST or not torch.is_autocast_enabled("cpu"):
        return BertSelfAttention.forward(layer, hidden_states, mask, maps)
    query, key, value = (
        part(hidden_states).view(B, T, -1, layer.attention_head_size).transpose(1, 2)
        for part in (layer.query, layer.key, layer.value)
    )  # (B, H, T, K)
    scores = query @ key.transpose(2, 3) * layer.attention_head_size**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = F.dropout(scores.softmax(-1), layer.dropout.p, layer.training)
    return (probabilities @ value).transpose(1, 2).reshape(B, T, D)


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

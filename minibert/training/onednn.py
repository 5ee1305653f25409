"""What trains faster on a CPU than PyTorch's own choice, by oneDNN, forward and backward; results differ in rounding.

Linear layers in float32: PyTorch gives their products to MKL, which leaves half of an AMD processor's vector width
unused where that is 512 bits. Attention in bfloat16: the backward pass of PyTorch's fused kernel takes three times as
long as plain products.

These are other classes on the same parameters: `twin` gives a model that has them in the place of the plain ones, and
the model itself stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import BertSelfAttention

LONGEST = 256  # tokens up to which plain products were seen to be faster than the fused attention

M = TypeVar("M", bound=nn.Module)


def available() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_faster() -> bool:
    """Whether oneDNN's products in float32 are faster than PyTorch's own: where vectors are of 512 bits.

    With 256, MKL uses all of them: a step of a bert-base takes 6.1 s by MKL and 7.9 by oneDNN (two cores of a Zen 3).
    No race decides, since a run that goes on in another process must compute the same bits.
    """
    return available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def twin(model: M, classes: Mapping[type[nn.Module], type[nn.Module]]) -> M:
    """A model with the same parameters, in which modules of some classes are of others; `train` and `eval` are its own.

    A parameter that is replaced in one of them is replaced in both.
    """
    other = copy.copy(model)  # what its __dict__ holds is shared, the parameters among it
    other.__class__ = classes.get(type(model), type(model))
    other._modules = {name: None if child is None else twin(child, classes) for name, child in model._modules.items()}
    return other


class LinearLayer(nn.Linear):
    """nn.Linear by oneDNN, wherever its input is float32 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if plain and x.ndim > 1 and x.numel() > 0 and not torch.is_autocast_enabled("cpu"):
            return Linear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class AttentionByProducts(BertSelfAttention):
    """BertSelfAttention by matrix products and a softmax, where autocast is on.

    It keeps the (B, H, T, T) probabilities for the backward pass, which the fused kernel computes again.
    """

    def forward(self, hidden_states: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        B, T, D = hidden_states.shape
        if maps is not None or T > LONGEST or not torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_states, mask, maps)
        query, key, value = (
            part(hidden_states).view(B, T, -1, self.attention_head_size).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )  # (B, H, T, K)
        scores = query @ key.transpose(2, 3) * self.attention_head_size**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        probabilities = F.dropout(scores.softmax(-1), self.dropout.p, self.training)
        return (probabilities @ value).transpose(1, 2).reshape(B, T, D)


LINEAR_LAYERS = {nn.Linear: LinearLayer}
ATTENTION_BY_PRODUCTS = {BertSelfAttention: AttentionByProducts}


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
    """The product of a (..., K) and b (N, K) transposed, plus bias (N,): (..., N). Neither needs to be contiguous."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

"""Linear layers on oneDNN: weights in the blocked layout its kernels read, activation or residual in the same pass.

torch's own Linear hands each call the plain weight: MKL computes it in fp32 (slowly on AMD), oneDNN in bf16 after
laying the weight out anew. Laying out once, when the model is optimized, costs a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# hidden_act -> oneDNN's post-op and algorithm; other activations run as a step of their own
POST_OPS = {
    "gelu": ("gelu", "none"),
    "gelu_python": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_accurate": ("gelu", "tanh"),
    "gelu_python_tanh": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
    "sigmoid": ("sigmoid", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}

# The same functions of a result that nothing else reads, in place
_IN_PLACE = {
    name: partial(torch.ops.aten.gelu_.default, approximate=algorithm)
    for name, (post_op, algorithm) in POST_OPS.items()
    if post_op == "gelu"
}


class PlainLinear:
    """The same two calls on torch's Linear, for CPUs and dtypes that oneDNN does not serve."""

    copies = False

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        self.weight, self.bias, self.activation = weight, bias, activation
        self.nbytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return (y if self.activation is None else self.activation(y)).to(dtype or x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return F.linear(x, self.weight, self.bias).add_(residual)


class PrepackedLinear:
    """y = activation(x W^T + b), or x W^T + b + residual, for x (N, in)."""

    copies = True
    fuses = True  # whether activation and residual are oneDNN's work too

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        name = "" if activation is None else activation.name
        self.post_op, self.algorithm = POST_OPS.get(name, ("none", "")) if self.fuses else ("none", "")
        self.activation: Callable[[Tensor], Tensor] | None = None if self.post_op != "none" else activation
        self._lay_out(weight, bias)
        self.nbytes = weight.numel() * weight.element_size()

    def _lay_out(self, weight: Tensor, bias: Tensor) -> None:
        # The layout is chosen for a row count; what suits 256 rows is within 3% of the best from 16 to 2048
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 256)
        self.bias = bias.detach()
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._linear_binary = torch.ops.mkldnn._linear_pointwise.binary

    def _product(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias, self.post_op, [], self.algorithm)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y = self._product(x)
        return (y if self.activation is None else self.activation(y)).to(dtype or x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self._linear_binary(x, residual, self.weight, self.bias, "add")


class UnfusedLinear(PrepackedLinear):
    """The same with activation and residual in passes of their own.

    Without AVX-512, oneDNN's GELU takes 3.9 ms where torch's takes 0.8 (1024 x 1536 numbers, two cores of a Zen 3).
    """

    fuses = False

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        super().__init__(weight, bias, activation)
        if activation is not None:
            self.activation = _IN_PLACE.get(activation.name, activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self(x).add_(residual)

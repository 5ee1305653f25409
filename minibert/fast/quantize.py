"""Linear layers in eight bits: weights scaled per output channel, activations per token as they come.

Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 3: one scale for each row of the input and each column of
the weight, because a few tokens are far larger than the rest. The product runs on the CPU's 8-bit dot products (VNNI).

Measured on a sentence encoder (MiniLM), the value projection alone makes more than half of the whole error of int8.
So values, and the heads, stay in 16 or 32 bits.

CPUs without VNNI add two products in 16 bits, which saturates: there weights get 7 bits instead of 8.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from minibert.fast.onednn import PrepackedLinear


class Bfloat16Linear(PrepackedLinear):
    """Products in bfloat16 between tensors of float32."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        super().__init__(weight.bfloat16(), bias.bfloat16(), activation)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().__call__(x.bfloat16()).to(dtype or x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().__call__(x.bfloat16()).to(x.dtype).add_(residual)


class Int8Linear:
    """y = activation(x W^T + b), or x W^T + b + residual, for x (N, in) of float32.

    A weight is rounded to `weight_levels()` steps of its channel's largest magnitude, x to `levels` steps of its
    token's. Then x is moved up by `centre`: oneDNN is fast on unsigned activations only, and takes `centre` off again.
    """

    copies = True
    centre, levels, finest = 128, 127, 1e-20

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None):
        weight = weight.float()
        self.scale = weight.abs().amax(1).clamp_min(1e-20) / (weight_levels() or 127)  # (out,)
        self._pack(torch.round(weight / self.scale[:, None]).to(torch.int8))
        self.bias, self.activation = bias.float(), activation
        self.nbytes = weight.numel()
        self._linear = torch.ops.onednn.qlinear_pointwise.default

    def _pack(self, rounded: Tensor) -> None:
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, [256, rounded.shape[1]])
        self.zero_points = torch.zeros(len(rounded), dtype=torch.int32)

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        y = self._product(x)
        return (y if self.activation is None else self.activation(y)).to(dtype or torch.float32)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer's output plus `residual`."""
        return self._product(x).add_(residual)

    def _product(self, x: Tensor) -> Tensor:
        x = x.float()
        scale = (self._largest(x) / self.levels).clamp_min_(self.finest)  # (N, 1)
        product = self.multiply(self._rounded(x, scale))
        return torch.addcmul(self.bias, product, scale, out=product)

    def _largest(self, x: Tensor) -> Tensor:
        return x.abs().amax(1, keepdim=True)

    def multiply(self, x: Tensor) -> Tensor:
        """(x - centre) W^T in units of the token's scale, for x (N, in) of unsigned bytes."""
        return self._linear(x, 1.0, self.centre, self.weight, self.scale, self.zero_points,
                            None, 1.0, 0, torch.float32, "none", [], "")  # fmt: skip

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """round(x / scale) + centre, unsigned. By way of signed numbers, to which torch converts four times as fast."""
        steps = x * scale.reciprocal()
        if self.centre != 128:
            steps.add_(self.centre - 128)
        return steps.round_().to(torch.int8).bitwise_xor_(-128).view(torch.uint8)  # flip the sign bit: add 128


class Int8AfterGelu(Int8Linear):
    """For an x that a GELU gave: above -0.17 = -centre * finest, so nearly all levels go to what is positive."""

    centre, levels, finest = 16, 239, 0.17 / 16

    def _largest(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


@cache
def weight_levels() -> int:
    """How large the bytes of a weight may be for products of bytes to be exact on this CPU: 127, 64, or 0 if they never
    are. Tried on the largest sums there can be.
    """
    for levels in (127, 64):
        layer = Int8Linear.__new__(Int8Linear)
        layer._linear = torch.ops.onednn.qlinear_pointwise.default
        signs = torch.tensor([1, -1, 1, -1]).repeat_interleave(16)[:, None]  # (64, 1): whole channels of one sign
        rounded = (signs * levels).expand(64, 256).to(torch.int8).contiguous()
        layer.scale = torch.ones(64)
        layer._pack(rounded)
        for rows in (1, 16, 300):  # kernels differ
            x = torch.full((rows, 256), 255, dtype=torch.uint8)
            x[::2, ::2] = 0
            exact = (x.long() - layer.centre) @ rounded.long().t()
            if not torch.equal(layer.multiply(x).long(), exact):
                break
        else:
            return levels
    return 0

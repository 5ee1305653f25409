"""Linear layers in eight bits: weights scaled per output channel, activations per token as they come.

Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 3: one scale for each row of the input and each column of
the weight, because a few tokens are far larger than the rest. The product runs on the CPU's 8-bit dot products (VNNI).

Measured on a sentence encoder (MiniLM), the value projection alone makes more than half of the whole error of int8.
So values, and the heads, stay in 16 or 32 bits.

What follows a LayerNorm has channels that are always larger than others, and take their levels. Xiao et al. 2022,
"SmoothQuant" (arXiv 2211.10438), section 4: the input is divided by a factor a channel, the weight multiplied by it.
The paper measures channels on texts; here the norm's own parameters say how large they are.

CPUs without VNNI add two products in 16 bits, which saturates: there weights get 7 bits instead of 8. After a GELU,
whose results need fewer levels, weights get more of them and x less.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import ClassVar, NamedTuple

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


class Steps(NamedTuple):
    """How x becomes bytes: rounded to `levels` steps of its token's largest magnitude, none finer than `finest`, and
    moved up by `centre`.
    """

    centre: int
    levels: float
    finest: float


class Int8Linear:
    """y = activation(x W^T + b), or x W^T + b + residual, for x (N, in) of float32; by oneDNN.

    A weight is rounded to `weight_levels` steps of its channel's largest magnitude, x as its Steps say: kernels are
    fast on unsigned activations only, and take `centre` off again.
    magnitudes (in,): how large the channels of x are, where that is known.
    """

    copies = True
    # The largest bytes of a weight and of x, best first: those are taken whose products are exact on this CPU
    ranges: ClassVar[tuple[tuple[int, int], ...]] = ((127, 255), (64, 255))
    slack: ClassVar[float] = 0  # by how much the largest of a token stays below the largest byte

    def __init__(
        self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None, magnitudes: Tensor | None = None
    ):
        weight, self.smoothing = weight.float(), None
        if magnitudes is not None:
            factors = smoothing_factors(weight, magnitudes.float())
            weight, self.smoothing = weight * factors, factors.reciprocal()
        levels, largest = byte_range(type(self))
        self.centre, self.levels, self.finest = self.steps(largest)
        self.scale = weight.abs().amax(1).clamp_min(1e-20) / levels  # (out,)
        self._pack(torch.round(weight / self.scale[:, None]).to(torch.int8))
        self.bias, self.activation = bias.float(), activation
        self.nbytes = weight.numel()

    @classmethod
    def steps(cls, largest: int) -> Steps:
        """For bytes up to `largest`."""
        return Steps(128, largest - 128 - cls.slack, 1e-20)

    @classmethod
    def of_levels(cls, rounded: Tensor, largest: int) -> Int8Linear:
        """A layer of whole numbers as they are, (out, in), in int8, for bytes up to `largest`: to try its products."""
        layer = cls.__new__(cls)
        layer.centre, layer.levels, layer.finest = cls.steps(largest)
        layer.scale = torch.ones(len(rounded))
        layer._pack(rounded)
        return layer

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
        x = x.float() if self.smoothing is None else x.float() * self.smoothing
        scale = (self._largest(x) / self.levels).clamp_min_(self.finest)  # (N, 1)
        return self._scaled(x * scale.reciprocal(), scale)

    def _scaled(self, steps: Tensor, scale: Tensor) -> Tensor:
        product = self.multiply(steps)
        return torch.addcmul(self.bias, product, scale, out=product)

    def _largest(self, x: Tensor) -> Tensor:
        return x.abs().amax(1, keepdim=True)

    def multiply(self, steps: Tensor) -> Tensor:
        """round(x) W^T for x (N, in) of float32, within -centre and 255 - centre; may write to x."""
        return self.multiply_bytes(self._rounded(steps))

    def multiply_bytes(self, rounded: Tensor) -> Tensor:
        """The same for x already rounded and moved up by `centre`, (N, in) of uint8."""
        return torch.ops.onednn.qlinear_pointwise.default(
            rounded, 1.0, self.centre, self.weight, self.scale, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip

    def _rounded(self, steps: Tensor) -> Tensor:
        """round(x) + centre, unsigned. By way of signed numbers, to which torch converts four times as fast."""
        if self.centre != 128:
            steps.add_(self.centre - 128)
        return steps.round_().to(torch.int8).bitwise_xor_(-128).view(torch.uint8)  # flip the sign bit: add 128


class Int8AfterGelu(Int8Linear):
    """For an x that a GELU gave: exact or not, above -0.1702 = -centre * finest, so that nearly all levels go to what
    is positive.

    MiniLM on a CPU without VNNI, three times 256 sentences, cosine to float32, mean and least: 0.9984 and 0.9947 with
    bytes up to 255 and weights of 64 levels, 0.9988 and 0.9960 with 170 and 96, 0.9986 and 0.9944 with 127 and 127.
    """

    ranges = ((127, 255), (96, 170), (64, 255))

    @classmethod
    def steps(cls, largest: int) -> Steps:
        """For bytes up to `largest`."""
        centre = round(largest / 16)
        return Steps(centre, largest - centre - cls.slack, 0.1702 / centre)

    def _largest(self, x: Tensor) -> Tensor:
        return x.amax(1, keepdim=True)


class FbgemmInt8Linear(Int8Linear):
    """The same by FBGEMM, which rounds in the pass that packs its input, and costs little beside a small product.

    On two cores of a Zen 3, 16 tokens x 1536 x 384 take 107 us; oneDNN takes 276 for the product alone, since it has no
    kernels for bytes below VNNI that are much faster than float32.
    """

    slack = 1e-3  # so that no rounding takes a number beyond the `bounds`

    def _pack(self, rounded: Tensor) -> None:
        _hear_deprecation()
        outputs, inputs = rounded.shape
        self.weight = _of_shape(outputs, inputs)
        self.packed = torch.fbgemm_pack_quantized_matrix(rounded)
        self.offsets = rounded.sum(1, dtype=torch.int32)
        self.zeros = torch.zeros(outputs)
        # FBGEMM takes its scale from the smallest and the largest number that come. With a row that holds the bounds,
        # the scale is 1 and zero lies at `centre`, whatever the other rows hold: no text depends on its neighbours
        self.bounds = torch.zeros(1, inputs)
        self.bounds[0, :2] = torch.tensor([-self.centre, 255 - self.centre])

    def multiply(self, steps: Tensor) -> Tensor:
        product = torch.fbgemm_linear_int8_weight_fp32_activation(
            torch.cat([steps, self.bounds]), self.weight, self.packed, self.offsets, 1.0, 0, self.zeros
        )
        return product[: len(steps)].mul_(self.scale)


class FbgemmInt8AfterGelu(Int8AfterGelu, FbgemmInt8Linear):
    """Int8AfterGelu by FBGEMM."""


def smoothing_factors(weight: Tensor, magnitudes: Tensor) -> Tensor:
    """By what to divide the channels of an input of such magnitudes, (in,), for a weight (out, in); 1 on average.

    Equation 4 of the paper with alpha = 0.85, which serves models whose inputs are harder to round than their weights:
    on 256 sentences of MiniLM, the least cosine rises from 0.9937 to 0.9967, with 0.5 to 0.9955.
    """
    largest = weight.abs().amax(0)
    factors = magnitudes.clamp_min(1e-5) ** 0.85 / largest.clamp_min(1e-5) ** 0.15
    return factors / factors.mean()


def norm_magnitudes(norm: nn.LayerNorm) -> Tensor:
    """How large the channels are that a LayerNorm gives: three deviations of a normal distribution, (in,)."""
    return (norm.bias.abs() + 3 * norm.weight.abs()).detach()


@cache
def _hear_deprecation() -> None:
    """Let torch say once in a process that these operations may go in a later version, where nobody has to read it.

    Where they are gone, `optimize` has its receipt and takes oneDNN.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = torch.fbgemm_pack_quantized_matrix(torch.zeros(16, 16, dtype=torch.int8))
        ones, offsets = torch.ones(2, 16), torch.zeros(16, dtype=torch.int32)
        torch.fbgemm_linear_int8_weight_fp32_activation(
            ones, _of_shape(16, 16), packed, offsets, 1.0, 0, torch.zeros(16)
        )


@cache
def _of_shape(outputs: int, inputs: int) -> Tensor:
    """What FBGEMM wants beside the packed weight, and asks for nothing but its shape: memory that is never touched."""
    return torch.empty(outputs, inputs, dtype=torch.int8)


def weight_levels(kernel: type[Int8Linear] = Int8Linear) -> int:
    """How large the bytes of a weight may be for a kernel's products to be exact on this CPU, 0 if they never are."""
    return _exact_range(kernel)[0]


def byte_range(kernel: type[Int8Linear]) -> tuple[int, int]:
    """How large the bytes of a weight and of x are: of the kernel's `ranges` the first that is exact on this CPU."""
    levels, largest = _exact_range(kernel)
    return (levels, largest) if levels else kernel.ranges[0]


@cache
def _exact_range(kernel: type[Int8Linear]) -> tuple[int, int]:
    """Tried on the largest sums there can be; (0, 0) if none is exact."""
    for levels, largest in kernel.ranges:
        signs = torch.tensor([1, -1, 1, -1]).repeat_interleave(16)[:, None]  # (64, 1): whole channels of one sign
        rounded = (signs * levels).expand(64, 256).to(torch.int8).contiguous()
        layer = kernel.of_levels(rounded, largest)
        for rows in (1, 16, 300):  # kernels differ
            steps = torch.full((rows, 256), float(largest - layer.centre))
            steps[::2, ::2] = -layer.centre
            exact = steps.long() @ rounded.long().t()
            if not torch.equal(layer.multiply(steps).long(), exact):
                break
        else:
            return levels, largest
    return 0, 0

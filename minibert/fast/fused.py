"""Linear layers in eight bits whose steps around the product are each one loop, compiled by torch's Inductor.

Torch alone passes over the activations five times to round them and three times to scale them back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from minibert.activations import ACTIVATIONS
from minibert.fast.quantize import Int8AfterGelu, Int8Linear


@functools.cache
def _compiled(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Sizes are symbols in it: a batch of another length, or a model of another width, needs no new code."""
    return torch.compile(step, dynamic=True)


@functools.cache
def _rounding(linear: type[Int8Linear]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = (linear.largest(x) / linear.levels).clamp_min(linear.finest)
        return ((x * scale.reciprocal()).round() + linear.centre).to(torch.uint8), scale

    return quantize


def _finish(product: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return (product * scale + bias).to(dtype)


def _finish_add(product: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return product * scale + bias + residual


@functools.cache
def _finish_with(activation: str) -> Callable[..., Tensor]:
    def finish(product: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        return ACTIVATIONS[activation](product * scale + bias).to(dtype)

    return finish


class FusedInt8Linear(Int8Linear):
    """Int8Linear with its steps compiled, but for a single row: torch would compile that once more."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) == 1:
            return super().quantize(x)
        return _compiled(_rounding(type(self)))(x)

    def finish(self, product: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if len(product) == 1:
            return super().finish(product, scale, dtype)
        step = _finish if self.activation is None else _finish_with(self.activation.name)
        return _compiled(step)(product, scale, self.bias, dtype)

    def finish_add(self, product: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
        if len(product) == 1:
            return super().finish_add(product, scale, residual)
        return _compiled(_finish_add)(product, scale, self.bias, residual)


class FusedInt8AfterGelu(FusedInt8Linear, Int8AfterGelu):
    """Int8AfterGelu with its steps compiled."""


@functools.cache
def fused_obstacle() -> str:
    """Why the steps cannot be compiled here, or "" if they can."""
    try:
        FusedInt8Linear(torch.eye(64), torch.zeros(64))(torch.ones(2, 64))
    except Exception as failure:  # no C++ compiler, no directory to write to, ...: torch's own steps remain
        return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]:.100}"
    return ""

"""What the tests of the Triton kernels share: where they run, awkward sizes, and the comparison with float64.

Without a GPU the kernels run under Triton's interpreter, which takes the same source, masks and addresses. With one
they are compiled, and the same tests run there (pytest -m gpu): a process can do only one of the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # conftest.py has done it: it is read when triton is first imported
pytest.importorskip("triton", reason="the kernels need triton: pip install triton==3.7.1")

DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "cpu"]
# How far a result may be from float64's, as a share of the largest. Half precision: one unit in the last place, since a
# result is rounded once (which takes half of one) but the interpreter cuts bfloat16 off. float32: sums of up to 1023
# terms in any order.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1), (3, 3), (1, 127), (127, 3), (5, 1023), (33, 64)]


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers that may ask for a gradient."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return numbers.to(device, dtype).requires_grad_()


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    assert got.isfinite().all(), what
    allowed = TOLERANCES[dtype] * max(1.0, float(expected.detach().abs().max()))
    error = float((got.double() - expected).detach().abs().max())
    assert error <= allowed, f"{what}: off by {error:.1e}, allowed {allowed:.1e}"


def check(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, gradients: bool = False
) -> None:
    """The result, and if asked for the gradient of every floating-point input, against `reference` in float64."""
    twins = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    got, expected = kernel(*inputs), reference(*twins)
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else inputs[1].dtype
    assert got.shape == expected.shape
    assert_close(got, expected, dtype)
    assert got.requires_grad == gradients
    if not gradients:
        return
    upstream = draw(*got.shape, dtype=got.dtype, device=str(got.device), seed=9).detach()
    asking = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    grads = torch.autograd.grad(got, [inputs[i] for i in asking], upstream)
    exact = torch.autograd.grad(expected, [twins[i] for i in asking], upstream.double())
    for i, ours, theirs in zip(asking, grads, exact, strict=True):
        assert ours.dtype == inputs[i].dtype
        assert_close(ours, theirs, dtype, f"gradient of input {i}")

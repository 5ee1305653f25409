"""gelu(x W^T + b): the result, for tiles that do and do not fit."""

import pytest
import torch
import torch.nn.functional as F
from triton_case import CUDA, DEVICES, TOLERANCES, check, draw

from minibert.fast.triton.linear_gelu import TILES, Tile, linear_gelu

# Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers
DTYPES = TOLERANCES if CUDA else [torch.float32, torch.float16]
SMALL = Tile(16, 32, 16, 4, 2)


def parts(N, D, width, dtype, device):
    """x, weight, bias; products of about 1."""
    x, weight = draw(N, D, dtype=dtype, device=device), draw(width, D, dtype=dtype, device=device, scale=D**-0.5)
    return x, weight, draw(width, dtype=dtype, device=device, seed=1)


def reference(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "width"), [(1, 1, 1), (3, 127, 5), (127, 16, 33), (200, 32, 70)])
def test_result(device, dtype, N, D, width):
    check(lambda *inputs: linear_gelu(*inputs, SMALL), reference, *parts(N, D, width, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES)
def test_tiles_that_are_used(device, tile):
    check(lambda *inputs: linear_gelu(*inputs, tile), reference, *parts(130, 96, 258, torch.float16, device))


def test_bad_input():
    x, weight, bias = (tensor.detach() for tensor in parts(3, 8, 5, torch.float32, "cpu"))
    with pytest.raises(ValueError, match=r"weight must be torch.float32 of shape \(F, 8\)"):
        linear_gelu(x, weight[:, :7], bias)
    with pytest.raises(ValueError, match="weight must be torch.float32"):
        linear_gelu(x, weight.half(), bias)
    with pytest.raises(ValueError, match="bias must have shape"):
        linear_gelu(x, weight, bias[:4])
    assert linear_gelu(x[:0], weight, bias).shape == (0, 5)

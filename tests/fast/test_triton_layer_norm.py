"""LayerNorm(x + bias + residual): the result."""

import pytest
import torch
import torch.nn.functional as F
from triton_case import DEVICES, SHAPES, TOLERANCES, check, draw

from minibert.fast.triton.layer_norm import layer_norm


def reference(x, weight, shift, bias=0.0, residual=0.0):
    return F.layer_norm(x + bias + residual, weight.shape, weight, shift, 1e-3)


def parts(shape, dtype, device):
    """x, weight, shift, bias, residual."""
    vectors = [draw(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (1, 2, 3)]
    return draw(*shape, dtype=dtype, device=device), *vectors, draw(*shape, dtype=dtype, device=device, seed=4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_bias_and_residual(device, dtype, shape):
    check(lambda x, w, s, b, r: layer_norm(x, w, s, 1e-3, b, r), reference, *parts(shape, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
def test_alone_and_with_either(device):
    x, w, s, b, r = parts((2, 3, 65), torch.float32, device)
    check(lambda x, w, s: layer_norm(x, w, s, 1e-3), reference, x, w, s)
    check(lambda x, w, s, b: layer_norm(x, w, s, 1e-3, bias=b), reference, x, w, s, b)
    check(lambda x, w, s, r: layer_norm(x, w, s, 1e-3, residual=r), lambda *a: reference(*a[:3], 0.0, a[3]), x, w, s, r)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_mixed_dtypes(device):
    """Half-precision rows, normalised by float32 parameters; rows that do not lie one after another."""
    x = draw(9, 24, dtype=torch.bfloat16, device=device)
    w, s = (draw(12, dtype=torch.float32, device=device, seed=seed) for seed in (1, 2))
    check(lambda x, w, s: layer_norm(x[:, ::2], w, s, 1e-3), lambda x, w, s: reference(x[:, ::2], w, s), x, w, s)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    x, w, s, _, _ = parts((0, 8), torch.float32, device)
    assert layer_norm(x, w, s, 1e-3).shape == (0, 8)


def test_bad_input():
    x, w, s, b, r = (tensor.detach() for tensor in parts((3, 8), torch.float32, "cpu"))
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(4,\)"):
        layer_norm(x, w[:4], s, 1e-3)
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        layer_norm(x, w, s, 1e-3, b, r[:2])
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got torch.float64"):
        layer_norm(x.double(), w, s, 1e-3)
    with pytest.raises(ValueError, match="one device"):
        layer_norm(x, w.to("meta"), s, 1e-3)
    with pytest.raises(ValueError, match="too wide"):
        layer_norm(torch.zeros(1, 65537), torch.ones(65537), torch.ones(65537), 1e-3)

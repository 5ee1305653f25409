"""gelu(x + bias): the result."""

import pytest
import torch
import torch.nn.functional as F
from triton_case import DEVICES, SHAPES, TOLERANCES, assert_close, check, draw

from minibert.fast.triton.bias_gelu import bias_gelu


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1025)])
def test_result(device, dtype, shape):
    inputs = draw(*shape, dtype=dtype, device=device, scale=2.0), draw(shape[-1], dtype=dtype, device=device, seed=1)
    check(bias_gelu, lambda x, bias: F.gelu(x + bias), *inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_far_from_zero(device):
    x = torch.tensor([[-200.0, -6.0, 6.0, 200.0]], device=device)
    bias = torch.zeros(4, device=device)
    assert_close(bias_gelu(x, bias), F.gelu(x.double()), torch.float32)


def test_bad_input():
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\), got \(4,\)"):
        bias_gelu(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(TypeError, match="bias must be float32"):
        bias_gelu(torch.ones(2, 3), torch.ones(3).long())
    assert bias_gelu(torch.ones(0, 3), torch.ones(3)).shape == (0, 3)

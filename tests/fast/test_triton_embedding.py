"""LayerNorm(word + segment + position): the result."""

import pytest
import torch
import torch.nn.functional as F
from triton_case import DEVICES, TOLERANCES, check, draw

from minibert.fast.triton.embedding import embedding

ROWS = (11, 2, 9)  # of the tables


def parts(N, D, dtype, device):
    """ids, words, segments, positions, weight, shift."""
    generator = torch.Generator().manual_seed(N)
    ids = torch.stack([torch.randint(rows, (N,), generator=generator) for rows in ROWS]).to(device)
    tables = [draw(rows, D, dtype=dtype, device=device, seed=rows) for rows in ROWS]
    return ids, *tables, *(draw(D, dtype=dtype, device=device, seed=seed) for seed in (1, 2))


def reference(ids, words, segments, positions, weight, shift):
    total = F.embedding(ids[0], words) + F.embedding(ids[1], segments) + F.embedding(ids[2], positions)
    return F.layer_norm(total, weight.shape, weight, shift, 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (3, 3), (1, 127), (127, 3), (5, 1023)])
def test_result(device, dtype, N, D):
    check(lambda *inputs: embedding(*inputs, 1e-3), reference, *parts(N, D, dtype, device))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_tables_to_half_precision(device):
    inputs = parts(7, 12, torch.float32, device)
    got = embedding(*inputs, 1e-3, dtype=torch.float16)
    assert torch.equal(got, embedding(*inputs, 1e-3).half())


def test_bad_input():
    ids, *tables = parts(4, 6, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"ids must be int64 of shape \(3, N\), got torch.int32"):
        embedding(ids.int(), *tables, 1e-3)
    with pytest.raises(ValueError, match="a row of segments must have shape"):
        embedding(ids, tables[0], tables[1][:, :5], *tables[2:], 1e-3)
    assert embedding(ids[:, :0], *tables, 1e-3).shape == (0, 6)

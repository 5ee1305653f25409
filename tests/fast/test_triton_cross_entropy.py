"""Losses, hits and gradients of predicted words."""

import pytest
import torch
import torch.nn.functional as F
from triton_case import DEVICES, TOLERANCES, assert_close, check, draw

from minibert.fast.triton.cross_entropy import cross_entropy

SIZES = [(1, 1), (3, 3), (7, 127), (2, 1023), (3, 4097), (2, 9000)]


def labels(M, V, device):
    return torch.randint(V, (M,), generator=torch.Generator().manual_seed(V)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("M", "V"), SIZES)
def test_losses_and_gradients(device, dtype, M, V):
    logits, wanted = draw(M, V, dtype=dtype, device=device, scale=3.0), labels(M, V, device)
    wanted[0] = V - 1
    # Losses come in float32 whatever the logits are
    check(
        lambda z: cross_entropy(z, wanted)[0],
        lambda z: F.cross_entropy(z, wanted, reduction="none"),
        logits,
        gradients=True,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_labels(device):
    logits, wanted = draw(6, 50, dtype=torch.float32, device=device), labels(6, 50, device)
    wanted[1::2] = -100
    check(
        lambda z: cross_entropy(z, wanted)[0],
        lambda z: F.cross_entropy(z, wanted, reduction="none"),
        logits,
        gradients=True,
    )
    losses, hits = cross_entropy(logits, torch.full_like(wanted, -100))
    assert not losses.any()
    assert not hits.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_hits_are_those_of_argmax(device, dtype):
    logits = draw(40, 5000, dtype=dtype, device=device).detach().clamp(max=2.0)  # many equal maxima
    first = logits.float().cpu().argmax(1).to(device)  # on the CPU, torch's is the first of them
    assert cross_entropy(logits, first)[1].all()
    assert not cross_entropy(logits, (first + 1) % 5000)[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", [5, 4090])
def test_columns_beyond_the_words(device, V):
    logits, wanted = draw(3, V + 6, dtype=torch.float32, device=device), labels(3, V, device)
    with torch.no_grad():
        logits[:, V:] = torch.nan
    losses, hits = cross_entropy(logits, wanted, words=V)
    losses.sum().backward()
    alone = logits.detach()[:, :V].requires_grad_()
    expected, expected_hits = cross_entropy(alone, wanted)
    expected.sum().backward()
    assert torch.equal(losses, expected)
    assert torch.equal(hits, expected_hits)
    assert torch.equal(logits.grad[:, :V], alone.grad)
    assert not logits.grad[:, V:].any()


@pytest.mark.parametrize("device", DEVICES)
def test_large_and_impossible_logits(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 3.0, -torch.inf]], device=device)
    wanted = torch.tensor([0, 1], device=device)
    assert_close(cross_entropy(logits, wanted)[0], torch.zeros(2, device=device).double(), torch.float32)


def test_bad_input():
    with pytest.raises(ValueError, match=r"logits must be \(M, V\) and labels \(M,\) int64"):
        cross_entropy(torch.ones(2, 3), torch.ones(3).long())
    with pytest.raises(ValueError, match="labels"):
        cross_entropy(torch.ones(2, 3), torch.ones(2).int())
    with pytest.raises(ValueError, match="words must be from 1 to the 3 columns"):
        cross_entropy(torch.ones(2, 3), torch.ones(2).long(), words=4)
    losses, hits = cross_entropy(torch.ones(0, 3), torch.ones(0).long())
    assert losses.shape == hits.shape == (0,)

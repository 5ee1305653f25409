"""The most probable words."""

import pytest
import torch
from triton_case import DEVICES, TOLERANCES, draw

from minibert.fast.triton.softmax_topk import MOST, softmax_topk


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("M", "V", "k"), [(1, 1, 1), (3, 3, 3), (5, 127, 5), (2, 1023, 4), (2, 5000, MOST)])
def test_as_torch(device, dtype, M, V, k):
    logits = draw(M, V, dtype=dtype, device=device, scale=3.0)
    probabilities, words = softmax_topk(logits, k)
    expected = logits.detach().double().softmax(-1)
    # Computed in float32 throughout, so the tolerance is float32's for every dtype
    torch.testing.assert_close(probabilities.double(), expected.topk(k).values, atol=1e-7, rtol=1e-5)
    # Equal logits may stand in either order: compare what the words are worth
    torch.testing.assert_close(expected.gather(1, words), expected.topk(k).values)
    assert all(len(set(row)) == k for row in words.tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_apart(device):
    logits = draw(3, 40, dtype=torch.float32, device=device)
    for part in (logits[:, :37], logits[:, ::2], logits[1:2, :5]):
        for ours, theirs in zip(softmax_topk(part, 3), part.softmax(-1).topk(3), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_many_words_and_no_rows(device):
    logits = draw(2, 100, dtype=torch.float32, device=device)
    assert softmax_topk(logits, MOST + 1)[1].shape == (2, MOST + 1)
    assert softmax_topk(logits[:0], 3)[0].shape == (0, 3)


def test_bad_input():
    with pytest.raises(ValueError, match="k from 1 to V"):
        softmax_topk(torch.ones(2, 3), 4)
    with pytest.raises(ValueError, match="k from 1 to V"):
        softmax_topk(torch.ones(3), 1)

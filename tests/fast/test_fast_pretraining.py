"""The GPU's pretraining loss against the plain one: sums, gradients, steps; and the arithmetic that MFU counts."""

from __future__ import annotations

import pytest
import torch
from reference import TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minibert import BertConfig, BertForPreTraining
from minibert.fast import words
from minibert.fast.flops import forward_flops, matmul_peak, training_flops
from minibert.fast.pretraining import PackedPretrainingLoss, pair_starts
from minibert.pretraining.loss import PretrainingLoss

CUDA = torch.cuda.is_available()
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU] if CUDA else ["cpu"]
R, T, V = 3, 16, TINY["vocab_size"]
# Two pairs and padding; one pair; three pairs and no padding
PAIRS = torch.tensor([[1] * 6 + [2] * 7 + [0] * 3, [3] * 9 + [0] * 7, [4] * 5 + [5] * 5 + [6] * 6])


def make(**sizes):
    torch.manual_seed(0)
    model = BertForPreTraining(
        BertConfig(**{**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **sizes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(packed, device="cpu"):
    """The fields of a training Batch."""
    pair = PAIRS if packed else PAIRS.new_tensor([[1] * 12 + [0] * 4, [2] * 16, [3] * 5 + [0] * 11])
    starts = [0, 6, 16, 32, 37, 42] if packed else [0, 16, 32]
    generator = torch.Generator().manual_seed(1)
    fields = {
        "input_ids": torch.randint(1, V, (R, T), generator=generator),
        "token_type_ids": torch.randint(2, (R, T), generator=generator),
        "position_ids": torch.arange(T).expand(R, T).contiguous(),
        "pair": pair,
        "cls_positions": torch.tensor(starts),
        "next_sentence_label": torch.randint(2, (len(starts),), generator=generator),
        "masked_positions": torch.tensor([1, 3, 8, 17, 20, 33, 34, 0]),
        "masked_labels": torch.tensor([5, 6, 7, 8, 9, 10, 11, -100]),
    }
    return {name: x.to(device) for name, x in fields.items()} | {"packed": packed}


def sums_and_gradients(loss, fields):
    sums = loss(**fields)
    (sums[0] / 7 + sums[2]).backward()
    return sums.detach(), [parameter.grad for parameter in loss.model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_as_the_plain_loss(packed, fused, device, monkeypatch):
    if fused:
        pytest.importorskip("triton")
        if CUDA != (device == "cuda"):
            pytest.skip("kernels are compiled for the GPU")
    monkeypatch.setattr(words, "_has_kernels", lambda logits: fused)
    fields = batch(packed, device)
    expected, their_grads = sums_and_gradients(PretrainingLoss(make().to(device)), fields)
    got, our_grads = sums_and_gradients(PackedPretrainingLoss(make().to(device)), fields)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_with_dropout_and_checkpointing(device):
    """bfloat16, dropout, recomputation, and a batch learned by heart."""
    model = make(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).to(device)
    model.gradient_checkpointing_enable()
    loss, fields = PackedPretrainingLoss(model.train()), batch(True, device)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(60):
        with torch.autocast(device, torch.bfloat16):
            sums = loss(**fields)
        (sums[0] / 7 + sums[2] / 6).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(sums[0].detach()))
    assert all(value == value for value in history)
    assert history[-1] < 0.5 * history[0]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_flash_attention(dropout):
    """Without dropout, as the plain loss in bfloat16; with it, the same number of compilations for every batch."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "attention_probs_dropout_prob": dropout}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    loss = PackedPretrainingLoss(make(**sizes).cuda())
    loss.compile(dynamic=False)
    plain = PretrainingLoss(make(**sizes).cuda())
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            ours, theirs = loss(**batch(True, "cuda")), plain(**batch(True, "cuda"))
        (ours[0] + ours[2]).backward()
        torch.testing.assert_close(ours, theirs, rtol=0.05 if dropout == 0 else 0.5, atol=2.0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_pair_sees_itself_alone():
    loss, fields = PackedPretrainingLoss(make().eval()), batch(True)
    encode = ("input_ids", "token_type_ids", "position_ids", "pair")
    before = loss._encode(*(fields[name] for name in encode), None)
    inside = (PAIRS == 2).flatten()
    fields["input_ids"] = torch.where(PAIRS == 2, fields["input_ids"], fields["input_ids"].flip(1))
    after = loss._encode(*(fields[name] for name in encode), None)
    torch.testing.assert_close(after[inside], before[inside])
    assert not torch.allclose(after[~inside], before[~inside])


def test_starts_by_hand():
    assert pair_starts(PAIRS, 6).tolist() == [0, 6, 13, 16, 25, 32, 37, 42, *[48] * 56]
    padding_after_padding = torch.tensor([[1, 0], [0, 0], [2, 2]])
    assert pair_starts(padding_after_padding, 2).tolist() == [0, 1, 2, 4, *[6] * 60]
    assert pair_starts(PAIRS, 6).dtype == torch.int32


def test_compile_keeps_the_numbers():
    loss, fields = PackedPretrainingLoss(make()), batch(True)
    expected = loss(**fields)
    loss.compile(backend="aot_eager", dynamic=False)
    torch.testing.assert_close(loss(**fields), expected, rtol=1e-5, atol=1e-5)


def test_flops_are_those_that_torch_counts():
    model = make().eval()
    lengths, predictions = [16, 16, 16], 8
    fields = batch(False) | {"pair": torch.ones(R, T).long()}
    # The counter knows no fused attention on CPUs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        PackedPretrainingLoss(model)(**fields)
    extra = 2 * predictions * TINY["hidden_size"] * (-V % 64) + 2 * R * TINY["hidden_size"] * 2  # padding, NSP
    assert counter.get_total_flops() == forward_flops(model.config, lengths, predictions, pooled=R) + extra
    assert training_flops(model.config, [3]) == 3 * forward_flops(model.config, [3])


def test_matmul_peak():
    assert matmul_peak("cpu", torch.float32, size=64, repeats=3) > 0

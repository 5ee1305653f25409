"""Gradients and ten optimizer steps with dropout, equal to transformers to the last bit."""

from __future__ import annotations

import pytest
import torch
from reference import HEADS, batch_for, masks, twins


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_gradients(head, mask):
    reference, ours = twins(head)
    inputs = batch_for(head)
    if mask == "right" and head != "BertForMultipleChoice":
        inputs["attention_mask"] = masks(4, 17)["right"]
    reference(**inputs).loss.backward()
    ours(**inputs).loss.backward()
    for (name, expected), actual in zip(reference.named_parameters(), ours.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None), name
        if expected.grad is not None:
            assert torch.equal(expected.grad, actual.grad), name


def _ten_steps(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    torch.manual_seed(11)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_ten_steps_with_dropout(head):
    reference, ours = twins(head)
    batches = [batch_for(head, tokens=9 + i) for i in range(10)]
    assert _ten_steps(reference, batches) == _ten_steps(ours, batches)
    for (name, expected), actual in zip(reference.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(expected, actual), name


def test_gradient_checkpointing_changes_nothing():
    _, plain = twins()
    _, saving = twins()
    saving.gradient_checkpointing_enable()
    batches = [batch_for("BertForPreTraining") for _ in range(2)]
    assert _ten_steps(plain, batches) == _ten_steps(saving, batches)
    for expected, actual in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(expected, actual)

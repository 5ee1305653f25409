"""Twins: transformers' model and ours on the same weights, and inputs for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import minibert

TINY = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 53,
    "max_position_embeddings": 41,
}
HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
]


def realign(model: nn.Module) -> nn.Module:
    """Copy each parameter into fresh memory, row after row.

    Products with one row or one column round differently with the weight's alignment and layout: transformers leaves a
    memory-mapped weight at any 8-byte offset, and a weight that TensorFlow once wrote transposed column by column.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def twins(head: str = "BertForPreTraining", *, attention: str = "sdpa", seed: int = 0, **sizes: Any):
    """(reference, ours), in eval mode, both with the weights that `seed` gives the reference."""
    config = transformers.BertConfig(**{**TINY, **sizes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    reference = getattr(transformers, head)(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 1:  # biases and LayerNorms start at 0 and 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = getattr(minibert, head)(minibert.BertConfig(**{**TINY, **sizes})).eval()
    ours.load_state_dict(reference.state_dict())
    return realign(reference), realign(ours)


def masks(batch: int, tokens: int) -> dict[str, Tensor | None]:
    """Padding of every kind: none, ones only, at the right, at the left, holes, and a query-key mask."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, tokens, (batch, 1), generator=generator)
    right = (torch.arange(tokens)[None] < lengths).long()
    holes = (torch.rand(batch, tokens, generator=generator) < 0.6).long()
    holes[:, 0] = 1
    square = torch.rand(batch, 1, tokens, tokens, generator=generator) < 0.6
    square |= torch.eye(tokens, dtype=torch.bool)
    return {
        "none": None,
        "ones": torch.ones(batch, tokens, dtype=torch.long),
        "right": right,
        "left": right.flip(1),
        "holes": holes,
        "4D": square,
    }


def batch_for(head: str, batch: int = 4, tokens: int = 17, **sizes: Any) -> dict[str, Tensor]:
    """Inputs and labels that suit a head."""
    sizes = {**TINY, "type_vocab_size": 2, **sizes}
    generator = torch.Generator().manual_seed(7)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shape = (batch, 3, tokens) if head == "BertForMultipleChoice" else (batch, tokens)
    inputs = {
        "input_ids": draw(sizes["vocab_size"], *shape, low=1),
        "token_type_ids": draw(sizes["type_vocab_size"], *shape),
    }
    words = draw(sizes["vocab_size"], batch, tokens)
    words[torch.rand(batch, tokens, generator=generator) < 0.7] = -100
    words[0, 0] = 5
    labels: dict[str, dict[str, Tensor]] = {
        "BertModel": {},
        "BertForPreTraining": {"labels": words, "next_sentence_label": draw(2, batch)},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": draw(2, batch)},
        "BertForSequenceClassification": {"labels": draw(2, batch)},
        "BertForTokenClassification": {"labels": draw(2, batch, tokens)},
        "BertForQuestionAnswering": {
            "start_positions": draw(tokens, batch),
            "end_positions": draw(tokens + 5, batch),
        },
        "BertForMultipleChoice": {"labels": draw(3, batch)},
    }
    return {**inputs, **labels[head]}


def assert_as_exact(actual: Tensor, reference: Tensor, exact: Tensor, factor: float = 4.0) -> None:
    """`actual` misses the result in float64, `exact`, by no more than a few times what the reference misses it by.

    Two orders of one sum differ by their rounding, on each machine otherwise: no bound that one machine printed holds
    on another. One unit in the last place is allowed where the reference happens to hit.
    """
    exact = exact.double()
    theirs, ours = ((found.double() - exact).abs().max().item() for found in (reference, actual))
    last_place = torch.finfo(reference.dtype).eps * exact.abs().max().item()
    assert ours <= factor * theirs + last_place, f"off by {ours:.3g}, the reference by {theirs:.3g}"


def rounding(model: nn.Module) -> float:
    """What float32 costs this model on this machine: how far its first output is off at most, in random texts.

    Where `assert_as_exact` has too few numbers to compare (the scores of one answer), a few times this is the bound.
    """
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(1, model.config.vocab_size, (16, 12), generator=generator)
    mask = (torch.arange(12)[None] <= torch.randint(1, 12, (16, 1), generator=generator)).long()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask)[0]
        return (model(ids, attention_mask=mask)[0].double() - exact).abs().max().item()


def assert_same(expected: Any, actual: Any) -> None:
    """Every tensor of two outputs is equal to the last bit, under the same keys in the same order."""
    assert list(expected.keys()) == list(actual.keys())
    for key in expected:
        left, right = expected[key], actual[key]
        if not isinstance(left, tuple):
            left, right = (left,), (right,)
        assert len(left) == len(right), key
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert a.shape == b.shape, f"{key}[{i}]"
            assert torch.equal(a, b), f"{key}[{i}]: largest difference {(a - b).abs().max():.3g}"

"""Write a part of BERT yourself and have it run inside the real model: right means equal to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import model as readable
from minibert.heads import BertForPreTraining
from minibert.study.probe import patch
from minibert.study.steps import google_variable


class Exercise(NamedTuple):
    """What to write, and how it starts."""

    task: str
    skeleton: str


EXERCISES = {
    "embeddings": Exercise("word + segment + position, before LayerNorm; sums depend on their order",
                           "def embeddings(word, segment, position):  # (B, T, D) each"),
    "attention": Exercise("scaled dot-product attention; torch's kernel is allowed, and needed for equal bits",
                          "def attention(query, key, value, mask, dropout_p=0.0):  # (B, H, T, K) each"),
    "mask": Exercise("from 1 for tokens and 0 for padding to what the kernel takes",
                     "def mask(attention_mask, dtype):  # (B, T) -> boolean (B, 1, 1, T)"),
    "layer_norm": Exercise("normalise the last dimension, scale, shift",
                           "def layer_norm(x, gamma, beta, eps):  # (B, T, D)"),
    "gelu": Exercise("x times the normal distribution function of x", "def gelu(x):"),
    "mlm_loss": Exercise("mean cross-entropy over the labels that are not -100; 0 where there is none",
                         "def mlm_loss(logits, labels):  # (N, V), (N,)"),
    "next_sentence": Exercise("from the last layer's states to two logits: first token, dense, tanh, head",
                              "def next_sentence(states, pooler, head):  # (B, T, D) -> (B, 2)"),
    "google_name": Exercise("the variable of a Google checkpoint for a parameter's name",
                            "def google_name(name):  # 'bert.pooler.dense.weight' -> 'bert/pooler/dense/kernel'"),
}  # fmt: skip


def check(name: str, answer: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    """Does a BertForPreTraining give the same bits with `answer` in it?

    Raises ValueError for an exercise that is not there, or another model.
    """
    if name not in EXERCISES:
        raise ValueError(f"exercise {name!r}: there are {', '.join(EXERCISES)}")
    if not isinstance(model, BertForPreTraining):
        raise ValueError(f"model: exercises run inside a BertForPreTraining, got {type(model).__name__}")
    with torch.no_grad():
        return bool(_CHECKS[name](answer, model, dict(inputs)))


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).prediction_logits


def _in_place_of(owner: Any, attribute: str) -> Callable[..., bool]:
    def run(answer: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> bool:
        expected = _logits(model, inputs)
        with mock.patch.object(owner, attribute, answer):
            return torch.equal(_logits(model, inputs), expected)

    return run


class _Part(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *arguments: Any):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.arguments)


def _modules(kind: str, make: Callable[[Callable[..., Tensor], Any], nn.Module]) -> Callable[..., bool]:
    def run(answer: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> bool:
        expected = _logits(model, inputs)
        parts = {name: make(answer, module) for name, module in model.named_modules() if name.endswith(kind)}
        with patch(model, parts):
            return torch.equal(_logits(model, inputs), expected)

    return run


def _embeddings(answer: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    part, expected = model.bert.embeddings, _logits(model, inputs)
    word, segment = part.word_embeddings(inputs["input_ids"]), part.token_type_embeddings(inputs["token_type_ids"])
    norm, total = part.LayerNorm, answer(word, segment, part.position_embeddings.weight[None, : word.shape[1]])
    with patch(model, {"bert.embeddings.LayerNorm": _Part(lambda x: norm(total))}):
        return torch.equal(_logits(model, inputs), expected)


def _mlm_loss(answer: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    logits, labels = _logits(model, inputs).flatten(0, 1), inputs["input_ids"].clone().flatten()
    labels[::2] = -100
    same = torch.equal(answer(logits, labels), F.cross_entropy(logits, labels))
    return same and float(answer(logits, torch.full_like(labels, -100))) == 0.0


def _next_sentence(answer: Callable[..., Any], model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    output = model(**inputs, output_hidden_states=True)
    ours = answer(output.hidden_states[-1], model.bert.pooler.dense, model.cls.seq_relationship)
    return torch.equal(ours, output.seq_relationship_logits)


_CHECKS: dict[str, Callable[..., bool]] = {
    "embeddings": _embeddings,
    "attention": _in_place_of(readable, "attention"),
    "mask": _in_place_of(readable, "kernel_mask"),
    "layer_norm": _modules("LayerNorm", lambda f, norm: _Part(f, norm.weight, norm.bias, norm.eps)),
    "gelu": _modules("act_fn", lambda f, module: _Part(f)),
    "mlm_loss": _mlm_loss,
    "next_sentence": _next_sentence,
    "google_name": lambda answer, model, inputs: all(
        answer(n) == google_variable(n) for n, _ in model.named_parameters()
    ),
}

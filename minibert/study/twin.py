"""transformers' BERT with a model's own weights, where transformers is installed: the reference of every proof."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from minibert.study.trace import Trace
from minibert.weights.pretrained import Uninitialised


def twin(model: nn.Module, attention: str = "sdpa") -> nn.Module | None:
    """Transformers' model of the same class, weights, dtype and mode; None where transformers is not installed.

    Each weight is copied into fresh memory: bits depend on alignment. attention: "sdpa" or "eager".
    """
    try:
        import transformers
    except ImportError:
        return None
    name = next(
        base.__name__ for base in type(model).__mro__ if base.__module__ in ("minibert.model", "minibert.heads")
    )
    options = {"add_pooling_layer": model.pooler is not None} if name == "BertModel" else {}
    config = transformers.BertConfig(**json.loads(json.dumps(model.config.to_dict())))
    with Uninitialised():  # all weights are about to be replaced
        other = getattr(transformers, name)._from_config(config, attn_implementation=attention, **options)
    other.load_state_dict(model.state_dict())
    return other.to(model.dtype).train(model.training)


def ulps(a: Tensor, b: Tensor) -> float:
    """The largest difference in units of the last place at the size of b's root mean square; 0 if the bits are equal,
    or nan, or infinities, agree.
    """
    if torch.equal(a, b):
        return 0.0
    rms = b.double().square().mean().sqrt().item()
    return ((a.double() - b.double()).abs().max() / (torch.finfo(b.dtype).eps * (rms or 1.0))).item()


def equal_steps(found: dict[str, Any]) -> tuple[int, int]:
    """Of a proof: how many steps have equal bits, and how many were compared."""
    compared = [row["ulps"] for row in found.values() if row["ulps"] is not None]
    return compared.count(0.0), len(compared)


def proof(ours: Trace, theirs: Trace) -> dict[str, Any]:
    """For each step: how far it is from the twin's in ulps (0.0: bit-equal), and the twin's line of code."""
    return {
        step.name: {
            "ulps": None if step.beside else ulps(step.tensor, theirs[step.name]),
            "line": str(theirs.step(step.name).source),
            "code": theirs.step(step.name).source.code,
        }
        for step in ours
        if step.name in theirs
    }

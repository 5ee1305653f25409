"""What a process that was spawned does with the objects it is sent: the same as the one that sent them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

TEXTS = ["Paris is the capital of France.", "It was dark."]
IDS = torch.tensor([[101, 7, 8, 102], [101, 9, 102, 0]])
INPUTS: dict[str, Any] = {
    "fill-mask": "a [MASK] here",
    "next-sentence-prediction": (TEXTS[0], TEXTS[1]),
    "question-answering": {"question": "what?", "context": TEXTS[0]},
}


def use(name: str, thing: Any) -> Any:
    """Something that shows all of an object: what it computes, or what it holds."""
    if name == "tokenizer":
        return dict(thing(TEXTS, padding=True)), len(thing)
    if name == "batch":
        return [thing.word_ids(row) for row in range(len(TEXTS))], {key: thing[key].tolist() for key in thing}
    if name == "config":
        return thing.to_dict()
    if name == "encoder":
        return thing.encode(TEXTS).tolist()
    if name == "output":
        return numbers(thing)
    if name.startswith(("model", "optimized")):
        with torch.no_grad():
            return numbers(thing(IDS, IDS.ne(0).long(), output_hidden_states=True))
    if name == "zero-shot-classification":
        return thing(TEXTS, candidate_labels=["a", "b"])
    return thing(INPUTS.get(name, TEXTS))


def numbers(output: Mapping[str, Any]) -> Any:
    values = {key: [x.tolist() for x in v] if isinstance(v, tuple) else v.tolist() for key, v in output.items()}
    return [type(output).__name__, values]


def use_all(things: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: use(name, thing) for name, thing in things.items()}


class Holder:
    """An actor that got the objects when it was made."""

    def __init__(self, things: dict[str, Any]):
        self.things = things

    def use_all(self) -> dict[str, Any]:
        return use_all(self.things)

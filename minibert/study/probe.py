"""Questions to a trace: what does each layer say already (lens), what did the answer depend on (attribute), and what
happens without a part (patch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minibert.study.trace import Trace, trace

METHODS = ("leave_one_out", "gradient_x_input", "attention", "rollout")


@dataclass(eq=False)
class Lens:
    """What the heads say after `layer` layers, 0 being the embeddings: ids and probabilities of the k likeliest words,
    (B, T, k), and the probabilities of next sentence, (B, 2), where the model has that head too.
    """

    layer: int
    ids: Tensor
    probabilities: Tensor
    next_sentence: Tensor | None


@torch.no_grad()
def lens(model: nn.Module, seen: Trace, k: int = 5, at: list[int] | None = None) -> list[Lens]:
    """The heads on the states of every layer; the last is what the model answers, earlier ones were never trained so.

    at: the numbers of the tokens to look at, all if not given. Raises ValueError for a model without MLM head.
    """
    words = _words_head(model)
    pooler = model.bert.pooler if hasattr(model.cls, "seq_relationship") else None
    result = []
    for layer, state in enumerate(seen.states):
        top = words(state if at is None else state[:, at]).float().softmax(-1).topk(k)
        next_sentence = model.cls.seq_relationship(pooler(state)).float().softmax(-1) if pooler else None
        result.append(Lens(layer, top.indices, top.values, next_sentence))
    return result


def attribute(
    model: nn.Module, inputs: Mapping[str, Any], at: int, method: str = "leave_one_out", target: int | None = None,
    seen: Trace | None = None,
) -> Tensor:  # fmt: skip
    """How much each token of one text mattered for the word at token `at`, (T,).

    leave_one_out: the log-probability lost when no other token may attend to this one. gradient_x_input: the gradient
    of the log-probability times the word's embedding. attention: the mean weight over all heads and layers. rollout:
    attention through all layers, half of each being the residual (Abnar and Zuidema 2020, section 3).

    Args:
        at: the number of the token whose answer is asked about.
        target: the id of the word; default the likeliest.
        seen: a trace of this very call, for the methods that look at attention; default: one is taken.

    Raises ValueError for another method, more than one text, a token that is not there, a model without MLM head.
    """
    ids = inputs["input_ids"]
    if method not in METHODS or ids.shape[0] != 1 or not 0 <= at < ids.shape[1]:
        raise ValueError(f"attribute: method is one of {', '.join(METHODS)}, input_ids one text (1, T) and `at` one of "
                         f"its tokens; got {method!r}, {tuple(ids.shape)} and {at}")  # fmt: skip
    T = ids.shape[1]
    if method in ("attention", "rollout"):
        maps = (seen or trace(model, inputs)).attentions
        weights = [layer[0].float().mean(0) for layer in maps]  # (H, T, T) -> (T, T)
        if method == "attention":
            return torch.stack(weights).mean(0)[at]
        rolled = torch.eye(T)
        for layer in weights:
            rolled = (layer + torch.eye(T)) / 2 @ rolled
        return rolled[at]
    target = log_probabilities(model, inputs, at).argmax().item() if target is None else target
    if method == "gradient_x_input":
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        with torch.enable_grad():
            answer = log_probabilities(model, {**rest, "inputs_embeds": embeds}, at)[target]
        return (torch.autograd.grad(answer, embeds)[0] * embeds).sum(-1)[0].detach()  # (1, T, D) -> (T,)
    return leave_out(model, inputs, at, target, [[i] for i in range(T)])


@torch.no_grad()
def leave_out(model: nn.Module, inputs: Mapping[str, Any], at: int, target: int, groups: list[list[int]]) -> Tensor:
    """The log-probability of `target` at `at` that is lost when nobody may attend to a group of tokens, one a group."""
    before = log_probabilities(model, inputs, at)[target]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    lost = []
    for group in groups:
        left = mask.clone()
        left[0, group] = 0
        lost.append(before - log_probabilities(model, {**inputs, "attention_mask": left}, at)[target])
    return torch.stack(lost)


def log_probabilities(model: nn.Module, inputs: Mapping[str, Any], at: int) -> Tensor:
    """Of every word at one token of the first text, (V,); the head is not run on the others."""
    words = _words_head(model)
    return words(model.bert(**inputs).last_hidden_state[0, at]).float().log_softmax(-1)


def _words_head(model: nn.Module) -> nn.Module:
    heads = getattr(model, "cls", None)
    if not hasattr(heads, "predictions"):
        raise ValueError(f"model: {type(model).__name__} has no MLM head; BertForMaskedLM and BertForPreTraining have")
    return heads.predictions


class zero_head:
    """For `patch`, at an `attention.self` of `model`: what these heads give is 0.

    Raises ValueError for a head that is not there.
    """

    def __init__(self, model: nn.Module, *heads: int):
        H = model.config.num_attention_heads
        if not all(0 <= head < H for head in heads):
            raise ValueError(f"zero_head{heads}: there are heads 0 to {H - 1}")
        self.kept = torch.tensor([head not in heads for head in range(H)])

    def __call__(self, context: Tensor) -> Tensor:
        kept = self.kept.to(context)
        return (context.unflatten(-1, (len(kept), -1)) * kept[:, None]).flatten(-2)  # (B, T, D) -> (B, T, H, K) -> ...


@contextmanager
def patch(model: nn.Module, parts: Mapping[str, nn.Module | Callable[[Any], Any]]) -> Iterator[nn.Module]:
    """While the context lasts, parts of the model do something else; afterwards, an error included, all is as before.

    Args:
        parts: for each module's name, another module to run in its place, or a function of its output, `zero_head(...)`
            say, whose result goes on instead.

    Raises ValueError for a name that is not there, or that has no heads to take out.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name, new in parts.items():
            if name not in modules or not name:
                raise ValueError(f"patch: this {type(model).__name__} has no module {name!r}")
            if isinstance(new, zero_head) and not name.endswith("attention.self"):
                raise ValueError(f"patch: {name!r} has no heads, an attention.self has")
            if isinstance(new, nn.Module):
                parent, _, child = name.rpartition(".")
                stack.callback(setattr, model.get_submodule(parent), child, modules[name])
                setattr(model.get_submodule(parent), child, new)
            else:
                hook = modules[name].register_forward_hook(lambda module, args, output, new=new: new(output))
                stack.callback(hook.remove)
        yield model

"""What is often said about BERT, measured on the reader's own text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.study.probe import log_probabilities, patch
from minibert.study.trace import Trace
from minibert.study.twin import ulps
from minibert.text.tokenizer import BertTokenizer

UNRELATED = "The price of copper fell again in March."


@torch.no_grad()
def measure(
    model: nn.Module, tokenizer: BertTokenizer, inputs: Mapping[str, Tensor], seen: Trace, facts: Mapping[str, Any]
) -> list[dict[str, str]]:
    """What is said, and what is measured here, a pair a myth."""
    encoder = getattr(model, "bert", model)
    rows = [_parameters(model, seen), _attention_cost(seen), *_padding(encoder, tokenizer, inputs, seen.states[-1])]
    rows += [_states(seen), _sentence_vector(encoder, tokenizer, seen.states[-1][0])]
    if facts["mattered"]:
        rows += [_gelu(model, inputs, facts), _importance(facts), _all_heads(facts)]
    if facts["lens"] and facts["lens"]["next_sentence"]:
        chance = facts["lens"]["next_sentence"][-1]
        said = "In next-sentence prediction, label 1 means yes."
        rows.append((said, f"Label 0 is “the second text follows the first”. Here its probability is {chance:.3f}."))
    return [{"said": said, "measured": measured} for said, measured in rows]


def _parameters(model: nn.Module, seen: Trace) -> tuple[str, str]:
    own = sum(p.numel() for p in model.parameters())
    twice = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    tied = "No two parts share parameters here." if own == twice else (
        f"Counted once each; {twice:,} if those that two parts share (the word embeddings are also the output "
        "projection) are counted twice.")  # fmt: skip
    return "Everybody agrees how many parameters a BERT has.", f"{own:,} parameters. {tied}"


def _attention_cost(seen: Trace) -> tuple[str, str]:
    T, D, F_ = (seen.sizes[letter] for letter in "TDF")
    share = 2 * T * D / (4 * D * D + 2 * D * F_)
    limit = (4 * D * D + 2 * D * F_) // (2 * D)
    return "Attention, being quadratic, is what makes BERT slow.", (
        f"At {T} tokens, scores and weighted sums are {share:.1%} of what a layer's linear maps cost "
        f"(T / (2 D + F)). They would be equal at {limit:,} tokens.")  # fmt: skip


def _padding(
    encoder: nn.Module, tokenizer: BertTokenizer, inputs: Mapping[str, Tensor], plain: Tensor
) -> list[tuple[str, str]]:
    ids = inputs["input_ids"]
    extra = min(8, encoder.config.max_position_embeddings - ids.shape[1])
    if extra < 1:
        return []
    padded = {name: F.pad(x, (0, extra)) for name, x in inputs.items()}
    padded["input_ids"][:, ids.shape[1] :] = tokenizer.pad_token_id
    masked = encoder(**padded).last_hidden_state[:, : ids.shape[1]]
    everything = {**padded, "attention_mask": torch.ones_like(padded["input_ids"])}
    careless = encoder(**everything).last_hidden_state[:, : ids.shape[1]]
    change = ((careless - plain).norm() / plain.norm()).item()
    return [("Padding changes the answer.", (
        f"{extra} tokens of padding, masked: {ulps(masked, plain):.0f} units in the last place, rounding alone. "
        f"Without the attention mask: {change:.1%} of the states' length."))]  # fmt: skip


def _states(seen: Trace) -> tuple[str, str]:
    return f"A BERT of {len(seen.attentions)} layers has {len(seen.attentions)} hidden states.", (
        f"It returns {len(seen.states)}: number 0 is the embeddings, before any layer.")  # fmt: skip


def _sentence_vector(encoder: nn.Module, tokenizer: BertTokenizer, states: Tensor) -> tuple[str, str]:
    other = encoder(**tokenizer(UNRELATED, return_tensors="pt")).last_hidden_state[0]
    states = [x.float() for x in (states, other)]
    cls = F.cosine_similarity(states[0][0], states[1][0], 0).item()
    mean = F.cosine_similarity(states[0].mean(0), states[1].mean(0), 0).item()
    return "The state of [CLS] is a good sentence vector.", (
        f"Cosine with “{UNRELATED}”: {cls:.2f} ([CLS]), {mean:.2f} (mean of the tokens). Only training for it makes "
        "either one a measure of meaning.")  # fmt: skip


def _gelu(model: nn.Module, inputs: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[str, str]:
    x = torch.linspace(-6, 6, 12001, dtype=torch.float64)
    apart = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max().item()
    at = facts["mattered"]["at"]
    before = log_probabilities(model, inputs, at)
    other = {name: nn.GELU(approximate="tanh") for name, _ in model.named_modules() if name.endswith("act_fn")}
    with patch(model, other):
        after = log_probabilities(model, inputs, at)
    change = (after.exp() - before.exp()).abs().max().item()
    same = "stays" if after.argmax() == before.argmax() else "changes"
    return "GELU by tanh is GELU.", (
        f"They differ by up to {apart:.1e} an element. Put into this model, a word's probability changes by up to "
        f"{change:.1e}; the likeliest word {same}.")  # fmt: skip


def _importance(facts: Mapping[str, Any]) -> tuple[str, str]:
    found = list(facts["mattered"]["scores"])
    said = "Attention weights show what the answer depends on."
    if "leave_one_out" not in found:
        return said, "Leaving tokens out was too expensive at this length; look at a shorter text."
    value = facts["mattered"]["agreement"][found.index("attention")][found.index("leave_one_out")]
    return (
        said,
        f"Rank correlation of mean attention with what is lost without a token: {value:.2f} (1 would be the same).",
    )


def _all_heads(facts: Mapping[str, Any]) -> tuple[str, str]:
    rows = facts["mattered"]["ablated"]
    said = "Every attention head matters."
    if not rows:
        return said, "Taking heads out was too expensive at this length; look at a shorter text."
    changed = sum(row["word"] != facts["mattered"]["word"] for row in rows)
    what = "heads" if len(rows[0]["heads"]) == 1 else "layers' attention"
    return said, f"Of {len(rows)} {what}, taken out one at a time, {changed} change the likeliest word here."

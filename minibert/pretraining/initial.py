"""A start from scratch that spares pretraining its first plateau: heads that look at neighbouring tokens.

From random weights BERT soon knows how frequent words are and what a text is about, and then learns little for millions
of tokens, until a head has found out, place by place, which tokens are neighbours. With sinusoidal position embeddings
(Vaswani et al. 2017, section 3.5) a step to a neighbour is a rotation, the same at every place, and a head's query and
key projections can hold it from the start. That weights may begin where training would bring them is the idea of
mimetic initialization (Trockman and Kolter 2023, arXiv 2305.09828). Nothing is fixed: all of it is trained.
"""

from __future__ import annotations

import torch

from minibert.heads import BertForPreTraining

_AMPLITUDE = 2.0  # of the sinusoids, in units of initializer_range: a place must be heard among the words
_FASTEST = 2.0  # radians a token: neighbours must differ
_SHARPNESS = 26.0  # the score of the token looked at


@torch.no_grad()
def look_at_neighbours(model: BertForPreTraining) -> None:
    """Make position embeddings sinusoids, and heads of the first layer look 1 back, 1 ahead, 2 back, 2 ahead, ..."""
    config = model.config
    D, K = config.hidden_size, config.hidden_size // config.num_attention_heads
    positions = model.bert.embeddings.position_embeddings.weight  # (T, D)
    rates = _FASTEST * 10000 ** (-torch.arange(0, D - 1, 2) / D)  # (D / 2,)
    angles = torch.arange(len(positions))[:, None] * rates
    amplitude = _AMPLITUDE * config.initializer_range
    positions[:, : 2 * len(rates)] = amplitude * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    # LayerNorm divides by the standard deviation of word + segment + position
    normed = _AMPLITUDE**2 / (2 + _AMPLITUDE**2 / 2)
    gain = (_SHARPNESS * K**0.5 / (normed * (K // 2))) ** 0.5
    attention = model.bert.encoder.layer[0].attention.self
    for head in range(config.num_attention_heads):
        offset = (head // 2 + 1) * (-1) ** (head + 1)
        query, key = (part.weight[head * K : (head + 1) * K].zero_() for part in (attention.query, attention.key))
        for pair, rate in enumerate(rates[: K // 2].tolist()):
            own = slice(2 * pair, 2 * pair + 2)
            turn = torch.tensor(rate * offset)
            key[own, own] = gain * torch.eye(2)
            query[own, own] = gain * torch.stack([turn.cos(), turn.sin(), -turn.sin(), turn.cos()]).view(2, 2)

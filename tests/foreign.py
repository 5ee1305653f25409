"""Somebody's own BERT, with names of modules that no checkpoint has, and a fault by name if asked for one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAULTS = (
    "mask by minus 1e4", "key and value exchanged", "scale by hidden size", "heads interleaved", "pre norm",
    "tanh gelu", "gelu missing", "residual of the input", "positions off by one", "pooler on the last token",
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, D: int, H: int, inner: int, eps: float, fault: str):
        super().__init__()
        self.H, self.fault = H, fault
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(D, eps) for _ in range(2))
        self.up, self.down = nn.Linear(D, inner), nn.Linear(inner, D)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part(x).view(B, T, self.H, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.fault == "heads interleaved":
            k = self.k(x).view(B, T, -1, self.H).permute(0, 3, 1, 2)  # fault
        if self.fault == "key and value exchanged":
            k, v = v, k
        size = D if self.fault == "scale by hidden size" else D // self.H
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / size**0.5  # fault
        if mask is not None:
            least = -1e4 if self.fault == "mask by minus 1e4" else float("-inf")
            scores = scores.masked_fill(mask[:, None, None] == 0, least)  # fault
        return self.out(torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2))  # fault

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.fault == "pre norm":
            x = x + self.attend(self.norm1(x), mask)  # fault
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        attended = self.norm1(x + self.attend(x, mask))
        wide = self.up(attended)
        if self.fault != "gelu missing":
            wide = F.gelu(wide, approximate="tanh" if self.fault == "tanh gelu" else "none")  # fault
        return self.norm2(self.down(wide) + (x if self.fault == "residual of the input" else attended))  # fault


class Encoder(nn.Module):
    def __init__(self, config, fault: str = ""):
        super().__init__()
        self.fault, D = fault, config.hidden_size
        sizes = (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
        self.words, self.places, self.segments = (nn.Embedding(size, D) for size in sizes)
        self.norm = nn.LayerNorm(D, config.layer_norm_eps)
        shape = (D, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps, fault)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config.num_hidden_layers))
        self.pool = nn.Linear(D, D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None):
        places = torch.arange(input_ids.shape[1])
        if self.fault == "positions off by one":
            places = (places + 1) % self.places.num_embeddings
        segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.norm(self.places(places) + self.segments(segments) + self.words(input_ids))  # fault
        for block in self.blocks:
            x = block(x, attention_mask)
        first = x[:, -1 if self.fault == "pooler on the last token" else 0]  # fault
        return x, torch.tanh(self.pool(first))


@torch.no_grad()
def own(model: nn.Module, fault: str = "") -> Encoder:
    """With the weights of a BertModel."""
    result, theirs = Encoder(model.config, fault).eval(), dict(model.named_parameters())
    names = {
        "words": "embeddings.word_embeddings", "places": "embeddings.position_embeddings",
        "segments": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm", "pool": "pooler.dense",
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    for name, parameter in result.named_parameters():
        *block, module, kind = name.split(".")
        parameter.copy_(theirs[f"{'encoder.layer.' + block[1] + '.' if block else ''}{names[module]}.{kind}"])
    return result

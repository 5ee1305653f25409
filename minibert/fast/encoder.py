"""The encoder on CPU: the layers of a BertModel, on packed tokens and fused weights."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.fast.attention import attend
from minibert.fast.padding import Packing, Picked
from minibert.model import BertLayer, BertModel


class Linear(Protocol):
    """A linear layer of the fast path: onednn.PlainLinear, onednn.PrepackedLinear, quantize.Int8Linear."""

    nbytes: int

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None): ...
    def __call__(self, x: Tensor) -> Tensor: ...
    def add(self, x: Tensor, residual: Tensor) -> Tensor: ...


class Norm:
    """LayerNorm with its parameters in the dtype of the fast path."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class FastLayer:
    """One BertLayer: four matrix products, each with what follows it fused in, two norms, one attention."""

    def __init__(self, layer: BertLayer, linear: type[Linear], dtype: torch.dtype):
        def convert(*modules: nn.Linear, activation: nn.Module | None = None) -> Linear:
            weight = torch.cat([module.weight.detach() for module in modules]).to(dtype)
            bias = torch.cat([module.bias.detach() for module in modules]).to(dtype)
            return linear(weight, bias, activation)

        attention, own = layer.attention, layer.attention.self
        self.heads = own.query.out_features // own.attention_head_size
        self.qkv = convert(own.query, own.key, own.value)
        self.projection = convert(attention.output.dense)
        self.attention_norm = Norm(attention.output.LayerNorm, dtype)
        self.up = convert(layer.intermediate.dense, activation=layer.intermediate.intermediate_act_fn)
        self.down = convert(layer.output.dense)
        self.norm = Norm(layer.output.LayerNorm, dtype)

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in (self.qkv, self.projection, self.up, self.down))

    def __call__(
        self, x_ND: Tensor, packing: Packing, wanted: Picked | None = None, maps_BHTT: Tensor | None = None
    ) -> Tensor:
        """(N, D) -> (N, D), or (M, D) for the M wanted tokens."""
        per_row, residual = None, x_ND
        if wanted is not None:
            per_row, residual = wanted.per_row, x_ND.index_select(0, wanted.index)
        context = attend(self.qkv(x_ND), packing, self.heads, per_row, maps_BHTT)
        y_ND = self.attention_norm(self.projection.add(context, residual))
        return self.norm(self.down.add(self.up(y_ND), y_ND))


class CpuEncoder:
    """The embeddings and layers of a BertModel. Another device's encoder has the same three methods."""

    def __init__(self, model: BertModel, linear: type[Linear], dtype: torch.dtype):
        self.dtype = dtype
        self.embeddings = model.embeddings
        self.layers = [FastLayer(layer, linear, dtype) for layer in model.encoder.layer]

    @property
    def nbytes(self) -> int:
        """Memory of the weights' second copy."""
        return sum(layer.nbytes for layer in self.layers)

    def embed(
        self,
        packing: Packing,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """The sums of BertEmbeddings, in its order, for the computed tokens only: (N, D)."""
        tables, pack = self.embeddings, packing.pack
        x_ND = tables.word_embeddings(pack(input_ids)) if inputs_embeds is None else pack(inputs_embeds)
        if position_ids is None:
            position_ids = torch.arange(packing.shape[1])[None]
        segments = tables.token_type_embeddings
        x_ND = x_ND + (segments.weight[0] if token_type_ids is None else segments(pack(token_type_ids)))
        return tables.LayerNorm(x_ND + tables.position_embeddings(pack(position_ids))).to(self.dtype)

    def encode(
        self, x_ND: Tensor, packing: Packing, picked: Picked | None = None, maps: list[Tensor] | None = None
    ) -> list[Tensor]:
        """All hidden states, the embeddings first; of the last one only the picked tokens, (M, D).

        maps: one (B, H, T, T) of zeros a layer, to be filled with attention probabilities.
        """
        states, last = [x_ND], len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            wanted = picked if number == last else None
            states.append(layer(states[-1], packing, wanted, None if maps is None else maps[number]))
        return states

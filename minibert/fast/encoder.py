"""The encoder on CPU: the layers of a BertModel, on packed tokens and fused weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.fast.attention import attend
from minibert.fast.padding import Packing, Picked
from minibert.model import BertLayer, BertModel

# Activations bounded below by -0.17, as GELU is
GELUS = ("gelu", "gelu_new", "gelu_python", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu_fast")


class Linear(Protocol):
    """A linear layer of the fast path: onednn.PlainLinear, onednn.PrepackedLinear, quantize.Int8Linear."""

    nbytes: int

    def __init__(self, weight: Tensor, bias: Tensor, activation: nn.Module | None = None): ...
    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...  # in x's dtype, or the one asked for
    def add(self, x: Tensor, residual: Tensor) -> Tensor: ...


class Norm:
    """LayerNorm with its parameters in the dtype of the fast path."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Kernels:
    """dtype: of what is stored between products. linear: for most products; after_gelu: for what follows the
    activation; careful: for values and heads, where low precision costs most. attention: dtype of its products.
    rows: how many tokens go through the feed-forward part at once, None for all: few, where steps between the products
    would otherwise leave the cache."""

    dtype: torch.dtype
    linear: type[Linear]
    after_gelu: type[Linear]
    careful: type[Linear]
    attention: torch.dtype
    rows: int | None = None


class FastLayer:
    """One BertLayer: four matrix products, each with what follows it fused in, two norms, one attention."""

    def __init__(self, layer: BertLayer, kernels: Kernels):
        def join(linear: type[Linear], *modules: nn.Linear, activation: nn.Module | None = None) -> Linear:
            weight = torch.cat([module.weight.detach() for module in modules]).to(kernels.dtype)
            bias = torch.cat([module.bias.detach() for module in modules]).to(kernels.dtype)
            return linear(weight, bias, activation)

        attention, own = layer.attention, layer.attention.self
        self.heads = own.query.out_features // own.attention_head_size
        if kernels.linear is kernels.careful:
            self.inputs = [join(kernels.linear, own.query, own.key, own.value)]
        else:
            self.inputs = [join(kernels.linear, own.query, own.key), join(kernels.careful, own.value)]
        self.projection = join(kernels.linear, attention.output.dense)
        self.attention_norm = Norm(attention.output.LayerNorm, kernels.dtype)
        activation = layer.intermediate.intermediate_act_fn
        self.up = join(kernels.linear, layer.intermediate.dense, activation=activation)
        down = kernels.after_gelu if activation.name in GELUS else kernels.linear
        self.down = join(down, layer.output.dense)
        self.norm = Norm(layer.output.LayerNorm, kernels.dtype)
        self.rows, self.attention_dtype = kernels.rows, kernels.attention

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in (*self.inputs, self.projection, self.up, self.down))

    def __call__(
        self, x_ND: Tensor, packing: Packing, picked: Picked | None = None, maps_BHTT: Tensor | None = None
    ) -> Tensor:
        """(N, D) -> (N, D), or (M, D) for the M picked tokens."""
        D = x_ND.shape[1]
        parts = (linear(x_ND, self.attention_dtype) for linear in self.inputs)
        query, key, value = (part for joined in parts for part in joined.split(D, 1))
        if picked is not None:
            query, x_ND = query.index_select(0, picked.index), x_ND.index_select(0, picked.index)
        context = attend(query, key, value, packing, self.heads, picked, maps_BHTT)
        y_MD = self.attention_norm(self.projection.add(context, x_ND))
        if self.rows is None or len(y_MD) <= self.rows:
            return self.feed_forward(y_MD)
        return torch.cat([self.feed_forward(part) for part in y_MD.split(self.rows)])

    def feed_forward(self, x_MD: Tensor) -> Tensor:
        return self.norm(self.down.add(self.up(x_MD), x_MD))


class CpuEncoder:
    """The embeddings and layers of a BertModel."""

    def __init__(self, model: BertModel, kernels: Kernels):
        self.dtype = kernels.dtype
        self.embeddings = model.embeddings
        self.layers = [FastLayer(layer, kernels) for layer in model.encoder.layer]

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
    ) -> Iterator[Tensor]:
        """All hidden states, the embeddings first; of the last one only the picked tokens, (M, D).

        One by one, for the caller to keep or to drop: dropped ones give their memory, still in the cache, to the next.
        maps: one (B, H, T, T) of zeros a layer, to be filled with attention probabilities.
        """
        yield x_ND
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            wanted = picked if number == last else None
            x_ND = layer(x_ND, packing, wanted, None if maps is None else maps[number])
            yield x_ND

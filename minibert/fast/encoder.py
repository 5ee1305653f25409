"""The engine on CPU: embeddings, layers and the word head, on packed tokens and weights laid out for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minibert.fast.attention import attend
from minibert.fast.padding import Batch, Packing, Picked, rounded, up_to
from minibert.fast.quantize import Int8Linear, norm_magnitudes
from minibert.model import BertLayer, BertModel

# Activations bounded below by -0.17, as GELU is
GELUS = ("gelu", "gelu_new", "gelu_python", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu_fast")


class Linear(Protocol):
    """A linear layer of the fast path: of onednn, quantize or panels."""

    copies: bool  # whether it lays the weight out anew, in memory of its own
    weight: Tensor
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
        return functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Kernels:
    """dtype: of what is stored between products. linear: for most products; after_gelu: for what follows the
    activation; careful: for values and heads, where low precision costs most. attention: dtype of its products.
    rows: how many tokens go through the feed-forward part at once, None for all: few, where steps between the products
    would otherwise leave the cache.
    """

    dtype: torch.dtype
    linear: type[Linear]
    after_gelu: type[Linear]
    careful: type[Linear]
    attention: torch.dtype
    rows: int | None = None


@dataclass(frozen=True)
class Encoded:
    """What an engine returns, packed. last_MD: of the picked tokens, or of all N. states_ND: the embeddings and each
    layer's output, if asked for. maps_BHTT: one a layer, if asked for, zeros at padding.
    """

    last_MD: Tensor
    states_ND: list[Tensor] | None = None
    maps_BHTT: list[Tensor] | None = None


class FastLayer:
    """One BertLayer: four matrix products, each with what follows it fused in, two norms, one attention."""

    def __init__(self, layer: BertLayer, kernels: Kernels):
        attention, own = layer.attention, layer.attention.self
        K = own.attention_head_size
        self.width = own.query.out_features
        self.heads = self.width // K
        if kernels.linear.copies:  # the query's weight takes the attention's scale in
            self.scale = 1.0
            query = own.query.weight.detach() * K**-0.5, own.query.bias.detach() * K**-0.5
            key, value = ((part.weight.detach(), part.bias.detach()) for part in (own.key, own.value))
            parts = [(query, key, value)] if kernels.linear is kernels.careful else [(query, key), (value,)]
            joined = [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]
            kinds = [kernels.linear, kernels.careful]
            self.inputs = [
                linear(weight.to(kernels.dtype), bias.to(kernels.dtype))
                for linear, (weight, bias) in zip(kinds, joined, strict=False)
            ]
        else:  # nor are the parameters joined: that would be a second copy of them
            self.scale = K**-0.5
            self.inputs = [_linear(kernels.linear, part, kernels) for part in (own.query, own.key, own.value)]
        self.projection = _linear(kernels.linear, attention.output.dense, kernels)
        self.attention_norm = Norm(attention.output.LayerNorm, kernels.dtype)
        activation = layer.intermediate.intermediate_act_fn
        self.up = _linear(kernels.linear, layer.intermediate.dense, kernels, activation, attention.output.LayerNorm)
        down = kernels.after_gelu if activation.name in GELUS else kernels.linear
        self.down = _linear(down, layer.output.dense, kernels)
        self.norm = Norm(layer.output.LayerNorm, kernels.dtype)
        self.rows, self.attention_dtype = kernels.rows, kernels.attention

    @property
    def linears(self) -> list[Linear]:
        return [*self.inputs, self.projection, self.up, self.down]

    def __call__(
        self, x_ND: Tensor, packing: Packing, picked: Picked | None = None, maps_BHTT: Tensor | None = None
    ) -> Tensor:
        """(N, D) -> (N, D), or (M, D) for the M picked tokens. N and M are rounded up; attention sees none of these."""
        N = packing.tokens
        parts = (linear(x_ND, self.attention_dtype) for linear in self.inputs)
        query, key, value = (part[:N] for joined in parts for part in joined.split(self.width, 1))
        if picked is not None:
            query = query.index_select(0, picked.index)
            x_ND = up_to(rounded(len(query)), x_ND.index_select(0, picked.index))
        context = up_to(len(x_ND), attend(query, key, value, packing, self.heads, self.scale, picked, maps_BHTT))
        y_MD = self.attention_norm(self.projection.add(context, x_ND))
        if self.rows is None or len(y_MD) <= self.rows:
            return self.feed_forward(y_MD)
        return torch.cat([self.feed_forward(part) for part in y_MD.split(self.rows)])

    def feed_forward(self, x_MD: Tensor) -> Tensor:
        return self.norm(self.down.add(self.up(x_MD), x_MD))


class VocabularyHead:
    """The masked-language-model head on packed tokens: (M, D) -> (M, V)."""

    def __init__(self, head: nn.Module, kernels: Kernels):
        self.transform = _linear(kernels.careful, head.transform.dense, kernels, head.transform.transform_act_fn)
        self.norm = Norm(head.transform.LayerNorm, kernels.dtype)
        self.decoder = _linear(kernels.careful, head.decoder, kernels)

    @property
    def linears(self) -> list[Linear]:
        return [self.transform, self.decoder]

    def __call__(self, x_MD: Tensor) -> Tensor:
        return self.decoder(self.norm(self.transform(x_MD)))


class CpuEngine:
    """Computes batches for a BertModel and, if there is one, a head of masked words."""

    def __init__(self, model: BertModel, head: nn.Module | None, kernels: Kernels):
        self.dtype, self.kernels = kernels.dtype, kernels
        self.embeddings = model.embeddings
        self.compiled: Callable[[Batch], Tensor] | None = None  # all of `encode` in one call, see compiled.py
        self.layers = [FastLayer(layer, kernels) for layer in model.encoder.layer]
        self.head = None if head is None else VocabularyHead(head, kernels)
        parts = nn.ModuleList([model] if head is None else [model, head])
        self._own = {parameter.data_ptr() for parameter in parts.parameters()}

    @property
    def linears(self) -> list[Linear]:
        found = [linear for layer in self.layers for linear in layer.linears]
        return found + ([] if self.head is None else self.head.linears)

    @property
    def nbytes(self) -> int:
        """Memory of the weights beside the model's own."""
        return sum(_nbytes(linear, self._own) for linear in self.linears)

    def to_host(self, x: Tensor | None) -> Tensor | None:
        return x

    def to_device(self, x: Tensor | None) -> Tensor | None:
        return x

    def embed(self, batch: Batch) -> Tensor:
        """The sums of BertEmbeddings, in its order, for the computed tokens only: (N, D), N rounded up."""
        tables, N = self.embeddings, rounded(batch.packing.tokens)
        ids_3N, embeds_ND = up_to(N, batch.ids_3N, -1), batch.embeds_ND
        words = tables.word_embeddings.weight
        x_ND = functional.embedding(ids_3N[0], words) if embeds_ND is None else up_to(N, embeds_ND)
        x_ND = x_ND + functional.embedding(ids_3N[1], tables.token_type_embeddings.weight)
        x_ND = x_ND + functional.embedding(ids_3N[2], tables.position_embeddings.weight)
        norm = tables.LayerNorm
        return functional.layer_norm(x_ND, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(self.dtype)

    def encode(self, batch: Batch, with_states: bool = False, with_maps: bool = False) -> Encoded:
        """All layers. States and maps are kept only if asked for."""
        picked, N = batch.picked, batch.packing.tokens
        simple = not (with_states or with_maps or batch.packing.masks or batch.embeds_ND is not None)
        if self.compiled is not None and simple:
            return Encoded(self.compiled(batch))
        x_ND = self.embed(batch)
        states = [x_ND[:N]] if with_states else None
        maps: list[Tensor] | None = [] if with_maps else None
        # Without states and maps, which are of all tokens, the last layer computes what is wanted
        wanted = picked if self.layers and not with_states and not with_maps else None
        for number, layer in enumerate(self.layers, 1):
            if maps is not None:
                B, T = batch.packing.shape
                maps.append(x_ND.new_zeros(B, layer.heads, T, T))
            of_last = wanted if number == len(self.layers) else None
            x_ND = layer(x_ND, batch.packing, of_last, None if maps is None else maps[-1])
            if states is not None:
                states.append(x_ND[:N])
        if picked is not None and wanted is None:
            x_ND = x_ND.index_select(0, picked.index)
        return Encoded(x_ND[: N if picked is None else len(picked.index)], states, maps)

    def words(self, x_MD: Tensor) -> Tensor:
        """The head of masked words, (M, D) -> (M, V)."""
        M = len(x_MD)
        return self.head(up_to(rounded(M), x_MD))[:M]


def _linear(
    kind: type[Linear],
    module: nn.Linear,
    kernels: Kernels,
    activation: nn.Module | None = None,
    norm: nn.LayerNorm | None = None,
) -> Linear:
    """A layer of the model. norm: what its input comes from, if it is that and nothing else."""
    weight, bias = (part.detach().to(kernels.dtype) for part in (module.weight, module.bias))
    if norm is not None and issubclass(kind, Int8Linear):
        return kind(weight, bias, activation, norm_magnitudes(norm))
    return kind(weight, bias, activation)


def _nbytes(linear: Linear, own: set[int]) -> int:
    """Memory of a layer's weight beside the model's: of a copy, or of one that was cast."""
    return linear.nbytes if linear.copies or linear.weight.data_ptr() not in own else 0

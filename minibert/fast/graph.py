"""BERT's whole pass over packed tokens as one module, to be compiled ahead of time: no Python between operations.

One graph serves any number of tokens, of texts, and any lengths: all of it runs on the N packed tokens, nothing sees
padding. Weights are not part of what is compiled: they are handed in, laid out for their products, so that all models
of one shape share one compiled pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from minibert.activations import ACTIVATIONS
from minibert.fast.encoder import GELUS, CpuEngine, Kernels, Linear
from minibert.fast.onednn import POST_OPS, PrepackedLinear, UnfusedLinear
from minibert.fast.panels import (
    PanelBfloat16Linear,
    PanelInt8AfterGelu,
    PanelInt8Linear,
    PanelLinear,
    is_gelu,
    laid_out,
)
from minibert.fast.quantize import Bfloat16Linear, Int8AfterGelu, Int8Linear, byte_range
from minibert.model import BertModel

_FLOATS = (PrepackedLinear, UnfusedLinear, PanelLinear, PanelBfloat16Linear, Bfloat16Linear)
_BYTES = (Int8Linear, Int8AfterGelu, PanelInt8Linear, PanelInt8AfterGelu)
KINDS: dict[str, type[Linear]] = {kind.__name__: kind for kind in (*_FLOATS, *_BYTES)}


@dataclass(frozen=True)
class Shape:
    """All that a compiled pass depends on. linear, careful, after_gelu: names of the kinds of products, as in Kernels;
    epsilons: of the embeddings' norm and of the layers'.
    """

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    words: int
    positions: int
    segments: int
    activation: str
    epsilons: tuple[float, float]
    table_dtype: str
    dtype: str
    linear: str
    careful: str
    after_gelu: str

    @property
    def fuses(self) -> bool:
        """Whether oneDNN's products may take in what follows them."""
        return self.linear != UnfusedLinear.__name__

    @property
    def takes_any_rows(self) -> bool:
        """Whether none of its products is oneDNN's, for whose sake rows are rounded up."""
        return all(issubclass(KINDS[name], (PanelLinear, PanelInt8Linear)) for name in (self.linear, self.careful))

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def shape_of(model: BertModel, kernels: Kernels) -> Shape | str:
    """The shape of a model's pass, or why it cannot be one graph."""
    layers, tables = model.encoder.layer, model.embeddings
    if not layers:
        return "the model has no layers"
    kinds = [kernels.linear.__name__, kernels.careful.__name__, kernels.after_gelu.__name__]
    other = [kind for kind in kinds if kind not in KINDS]
    if other:
        return f"it is for products by oneDNN and our own, not for {other[0]}"
    seen = {
        (
            layer.attention.self.query.out_features,
            layer.attention.self.attention_head_size,
            layer.intermediate.dense.out_features,
            layer.intermediate.intermediate_act_fn.name,
            layer.attention.output.LayerNorm.eps,
            layer.output.LayerNorm.eps,
        )
        for layer in layers
    }
    width, head_size, feed_forward, activation, eps, other_eps = seen.pop()
    hidden = tables.word_embeddings.embedding_dim
    if seen or eps != other_eps or width != hidden:
        return "its layers differ in size"

    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    return Shape(
        layers=len(layers),
        hidden=hidden,
        heads=hidden // head_size,
        feed_forward=feed_forward,
        words=tables.word_embeddings.num_embeddings,
        positions=tables.position_embeddings.num_embeddings,
        segments=tables.token_type_embeddings.num_embeddings,
        activation=activation,
        epsilons=(tables.LayerNorm.eps, eps),
        table_dtype=name(tables.word_embeddings.weight.dtype),
        dtype=name(kernels.dtype),
        linear=kinds[0],
        careful=kinds[1],
        after_gelu=kinds[2] if activation in GELUS else kinds[0],
    )


class Product(nn.Module):
    """One linear layer of the graph, in floating point, with places for the weights that will be handed in."""

    def __init__(self, kind: str, inputs: int, outputs: int, dtype: torch.dtype, activation: str = ""):
        super().__init__()
        self.kind, self.activation = KINDS[kind], activation
        dtype = torch.bfloat16 if self.kind is Bfloat16Linear else dtype
        self.register_buffer("weight", torch.empty(outputs, inputs, dtype=dtype))
        self.register_buffer("bias", torch.empty(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs), in the weight's dtype."""
        post_op, algorithm = POST_OPS.get(self.activation, ("none", "")) if self.kind.fuses else ("none", "")
        x = x.to(self.weight.dtype)
        y = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, post_op, [], algorithm)
        return y if post_op != "none" else self.activated(y)

    def activated(self, y: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](y) if self.activation else y


class PanelProduct(Product):
    """The same by the kernel for panels."""

    def __init__(self, kind: str, inputs: int, outputs: int, dtype: torch.dtype, activation: str = ""):
        super().__init__(kind, inputs, outputs, dtype, activation)
        self.outputs = outputs
        self.weight, self.bias = laid_out(self.weight.to(self.kind.weights), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        gelu = is_gelu(self.activation)
        y = torch.ops.minibert_panels.linear.default(x, self.weight, self.bias, self.outputs, gelu)
        return y if gelu else self.activated(y)


class BytesProduct(Product):
    """The same in bytes, by oneDNN: what Int8Linear computes. Gives float32."""

    def __init__(self, kind: str, inputs: int, outputs: int, dtype: torch.dtype, activation: str = ""):
        super().__init__(kind, inputs, outputs, torch.float32, activation)
        self.register_buffer("scale", torch.empty(outputs))
        self.register_buffer("smoothing", None)
        self.steps = self.kind.steps(byte_range(self.kind)[1])
        self.register_weights(inputs, outputs)

    def register_weights(self, inputs: int, outputs: int) -> None:
        self.weight = torch.empty(inputs, outputs, dtype=torch.int8)  # oneDNN transposes what it packs in int8
        self.register_buffer("zero_points", torch.empty(outputs, dtype=torch.int32))
        # Handed in too: what is a number in the graph would be a constant that no package holds
        self.register_buffer("unit", torch.tensor(1.0))
        self.register_buffer("centre", torch.tensor(self.steps.centre, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        x = x if self.smoothing is None else x * self.smoothing
        largest = x.amax(1, keepdim=True) if issubclass(self.kind, Int8AfterGelu) else x.abs().amax(1, keepdim=True)
        scale = (largest / self.steps.levels).clamp_min(self.steps.finest)  # (N, 1)
        return self.multiply((torch.round(x * scale.reciprocal()) + self.steps.centre).to(torch.uint8), scale)

    def multiply(self, rounded: Tensor, steps: Tensor) -> Tensor:
        product = torch.ops.onednn.qlinear_pointwise.tensor(
            rounded, self.unit, self.centre, self.weight, self.scale, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return self.activated(product * steps + self.bias)


class PanelBytesProduct(BytesProduct):
    """The same by our own kernel: what PanelInt8Linear computes."""

    def register_weights(self, inputs: int, outputs: int) -> None:
        like = self.kind(torch.zeros(outputs, inputs), torch.zeros(outputs))
        self.outputs, self.weight, self.scale, self.bias = outputs, like.weight, like.scale, like.bias
        self.register_buffer("offsets", like.offsets)

    def multiply(self, rounded: Tensor, steps: Tensor) -> Tensor:
        gelu = is_gelu(self.activation)
        y = torch.ops.minibert_panels.linear_of_bytes.default(
            rounded, steps, self.weight, self.offsets, self.scale, self.bias, self.outputs, gelu
        )
        return y if gelu else self.activated(y)


def product(
    kind: str, inputs: int, outputs: int, dtype: torch.dtype, activation: str = "", after_norm: bool = False
) -> Product:
    """One linear layer of the graph, of one of the KINDS. after_norm: its input is that of a LayerNorm alone."""
    products = {PanelInt8Linear: PanelBytesProduct, Int8Linear: BytesProduct, PanelLinear: PanelProduct}
    chosen = next((each for parent, each in products.items() if issubclass(KINDS[kind], parent)), Product)
    layer = chosen(kind, inputs, outputs, dtype, activation)
    if after_norm and isinstance(layer, BytesProduct):
        layer.smoothing = torch.empty(inputs)
    return layer


class Norm(nn.Module):
    """LayerNorm with places for its parameters."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size, dtype=dtype))
        self.register_buffer("bias", torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Layer(nn.Module):
    """One BertLayer."""

    def __init__(self, shape: Shape):
        super().__init__()
        dtype, D = getattr(torch, shape.dtype), shape.hidden
        self.heads = shape.heads
        if shape.linear == shape.careful:
            self.inputs = nn.ModuleList([product(shape.linear, D, 3 * D, dtype)])
        else:
            self.inputs = nn.ModuleList([product(shape.linear, D, 2 * D, dtype), product(shape.careful, D, D, dtype)])
        self.projection = product(shape.linear, D, D, dtype)
        self.attention_norm = Norm(D, shape.epsilons[1], dtype)
        self.up = product(shape.linear, D, shape.feed_forward, dtype, shape.activation, after_norm=True)
        self.down = product(shape.after_gelu, shape.feed_forward, D, dtype)
        self.norm = Norm(D, shape.epsilons[1], dtype)

    def forward(self, x_ND: Tensor, starts: Tensor, picked: Tensor | None) -> Tensor:
        """(N, D) -> (N, D), or (M, D) for the M picked tokens."""
        D = x_ND.shape[1]
        parts = [linear(x_ND).float() for linear in self.inputs]
        query, key, value = (part[:, i : i + D] for part in parts for i in range(0, part.shape[1], D))
        if picked is not None:
            x_ND, query = x_ND.index_select(0, picked), query.index_select(0, picked)
        # The query's weights hold the scale
        context = torch.ops.minibert_panels.attention.default(query, key, value, starts, picked, self.heads)
        y_MD = self.attention_norm(self.projection(context.to(x_ND.dtype)) + x_ND)
        return self.norm(self.down(self.up(y_MD)) + y_MD).to(x_ND.dtype)


class Pass(nn.Module):
    """Embeddings and layers."""

    def __init__(self, shape: Shape):
        super().__init__()
        tables = getattr(torch, shape.table_dtype)
        self.dtype = getattr(torch, shape.dtype)
        for name in ("words", "segments", "positions"):
            self.register_buffer(name, torch.empty(getattr(shape, name), shape.hidden, dtype=tables))
        self.norm = Norm(shape.hidden, shape.epsilons[0], tables)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def forward(self, ids_3N: Tensor, starts: Tensor, picked_M: Tensor) -> Tensor:
        """ids_3N: word, segment and position; starts: (B + 1,), where each text begins and the last one ends; picked_M:
        the tokens whose last state is wanted, in ascending order. Returns (M, D).
        """
        x_ND = functional.embedding(ids_3N[0], self.words) + functional.embedding(ids_3N[1], self.segments)
        x_ND = self.norm(x_ND + functional.embedding(ids_3N[2], self.positions)).to(self.dtype)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x_ND = layer(x_ND, starts, picked_M if number == last else None)
        return x_ND


def weights(engine: CpuEngine) -> dict[str, Tensor]:
    """What an engine holds, under the names that a Pass has for it."""
    tables = engine.embeddings
    found = {
        "words": tables.word_embeddings.weight,
        "segments": tables.token_type_embeddings.weight,
        "positions": tables.position_embeddings.weight,
        "norm.weight": tables.LayerNorm.weight,
        "norm.bias": tables.LayerNorm.bias,
    }
    for number, layer in enumerate(engine.layers):
        products = {f"inputs.{i}": linear for i, linear in enumerate(layer.inputs)}
        products |= {"projection": layer.projection, "up": layer.up, "down": layer.down}
        for name, linear in products.items():
            names = ["weight", "bias"]
            if isinstance(linear, Int8Linear) and linear.smoothing is not None:
                names += ["smoothing"]
            if isinstance(linear, PanelInt8Linear):
                names += ["scale", "offsets"]
            elif isinstance(linear, Int8Linear):
                names += ["scale", "zero_points"]
                found[f"layers.{number}.{name}.unit"] = torch.tensor(1.0)
                found[f"layers.{number}.{name}.centre"] = torch.tensor(linear.centre, dtype=torch.int32)
            found |= {f"layers.{number}.{name}.{part}": getattr(linear, part) for part in names}
        for name, norm in (("attention_norm", layer.attention_norm), ("norm", layer.norm)):
            found |= {f"layers.{number}.{name}.weight": norm.weight, f"layers.{number}.{name}.bias": norm.bias}
    return {name: tensor.detach() for name, tensor in found.items()}

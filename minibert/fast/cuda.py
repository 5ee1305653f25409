"""The fast path on a GPU: packed tokens from the embeddings to the last layer, fused kernels, CUDA graphs.

Written for CUDA, but nothing here is tied to it: on a CPU the same code runs with torch's own kernels and without
graphs, which is how it is tested anywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import Encoded, Norm
from minibert.fast.graphs import Bucket, Graphs, bucket_for
from minibert.fast.optimized import OptimizedModel
from minibert.fast.padding import Batch, Packing, Picked
from minibert.fast.pieces import LARGE, TORCH, Pieces, cuda_seconds, measured
from minibert.fast.plan import NAMES
from minibert.fast.varlen import Texts, attend, varlen_obstacle
from minibert.model import BertLayer, BertModel

_PADDED_ROWS = 8192  # rows that a graph without FlashAttention may pad its texts to


@dataclass(frozen=True)
class GpuPlan:
    """dtype: what products are computed in. small, large: kernels for batches below and from `LARGE` tokens.
    varlen: attention by FlashAttention. graphs: replay small batches. receipts: what was decided, and why.
    """

    dtype: str
    small: Pieces
    large: Pieces
    varlen: bool
    graphs: bool
    receipts: tuple[str, ...]
    compile: bool | None = False

    @property
    def activations(self) -> torch.dtype:
        """What is stored between products."""
        return getattr(torch, self.dtype)

    def pieces(self, tokens: int) -> Pieces:
        return self.large if tokens >= LARGE else self.small

    @torch.no_grad()
    def build(self, model: BertPreTrainedModel) -> OptimizedModel:
        """The optimized model, on whatever device `model` is."""
        head = getattr(getattr(model, "cls", None), "predictions", None)
        engine = GpuEngine(model.base_model, head, self)
        notes = [f"memory: {engine.nbytes / 2**20:.0f} MiB for a second copy of weights, joined, cast or padded"]
        if engine.graphs is not None:
            notes.append(_try_graph(engine))
        return OptimizedModel(model, engine, replace(self, graphs=engine.graphs is not None), tuple(notes))

    def __str__(self) -> str:
        attention = "varlen_attn" if self.varlen else "scaled_dot_product_attention"
        return f"{self.dtype}, {attention}, {'CUDA graphs' if self.graphs else 'no graphs'}"


class GpuVocabularyHead:
    """The masked-language-model head on packed tokens: (N, D) -> (N, V)."""

    def __init__(self, head: nn.Module, plan: GpuPlan):
        dtype, dense, decoder = plan.activations, head.transform.dense, head.decoder
        self.plan, self.activation = plan, head.transform.transform_act_fn
        self.transform = dense.weight.detach().to(dtype), dense.bias.detach().to(dtype)
        self.norm = Norm(head.transform.LayerNorm, dtype)
        # Rows of results that are no multiple of 16 bytes, as of 30522 words, make for slow products
        self.V, extra = len(decoder.weight), -len(decoder.weight) % 8
        self.decoder = F.pad(decoder.weight.detach(), (0, 0, 0, extra)).to(dtype)
        self.bias = F.pad(decoder.bias.detach(), (0, extra)).to(dtype)
        self.nbytes = self.decoder.numel() * self.decoder.element_size()

    def __call__(self, x_ND: Tensor) -> Tensor:
        y_ND = self.norm(self.plan.pieces(len(x_ND)).up(x_ND, *self.transform, self.activation))
        return F.linear(y_ND, self.decoder, self.bias)[:, : self.V]


class GpuLayer:
    """One BertLayer: four matrix products, attention, and what fuses with them."""

    def __init__(self, layer: BertLayer, plan: GpuPlan):
        dtype, attention, own = plan.activations, layer.attention, layer.attention.self
        self.plan, self.heads = plan, own.query.out_features // own.attention_head_size

        def convert(*modules: nn.Linear) -> tuple[Tensor, Tensor]:
            weights, biases = ([getattr(m, name).detach().to(dtype) for m in modules] for name in ("weight", "bias"))
            return (weights[0], biases[0]) if len(modules) == 1 else (torch.cat(weights), torch.cat(biases))

        self.qkv = convert(own.query, own.key, own.value)
        self.projection = convert(attention.output.dense)
        self.attention_norm = Norm(attention.output.LayerNorm, dtype)
        self.up, self.activation = convert(layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        self.down = convert(layer.output.dense)
        self.norm = Norm(layer.output.LayerNorm, dtype)

    def weights(self) -> list[Tensor]:
        return [self.qkv[0], self.projection[0], self.up[0], self.down[0]]

    def __call__(
        self,
        x_ND: Tensor,
        texts: Texts,
        asking: tuple[Tensor, Texts] | None = None,
        keep_map: Any = None,
    ) -> Tensor:
        """(N, D) -> (N, D), or (M, D) for the M tokens asking. keep_map is called with (N, 3 * D), q, k and v."""
        qkv_N3D = F.linear(x_ND, *self.qkv)
        if keep_map is not None:
            keep_map(qkv_N3D)
        context = attend(qkv_N3D, self.heads, texts, asking)
        residual = x_ND if asking is None else x_ND.index_select(0, asking[0])
        pieces = self.plan.pieces(len(context))
        y_ND = pieces.down(context, *self.projection, residual, self.attention_norm)
        return pieces.down(pieces.up(y_ND, *self.up, self.activation), *self.down, y_ND, self.norm)


class GpuEngine:
    """Computes batches for a BertModel and, if there is one, a head of masked words.

    Batches are planned on the host: one copy of the ids to the device, none of anything back until the results.
    """

    def __init__(self, model: BertModel, head: nn.Module | None, plan: GpuPlan):
        self.plan, self.dtype, self.device = plan, plan.activations, model.device
        self.embeddings = model.embeddings
        self.layers = [GpuLayer(layer, plan) for layer in model.encoder.layer]
        self.head = None if head is None else GpuVocabularyHead(head, plan)
        shared = {parameter.data_ptr() for parameter in model.parameters()}
        copies = [weight for layer in self.layers for weight in layer.weights() if weight.data_ptr() not in shared]
        self.nbytes = sum(weight.numel() * weight.element_size() for weight in copies)
        self.nbytes += 0 if self.head is None else self.head.nbytes
        self.graphs = Graphs(self._encode_bucket, self.device) if plan.graphs else None

    def to_host(self, x: Any) -> Any:
        return x.cpu() if isinstance(x, Tensor) and x.is_cuda else x

    def to_device(self, x: Tensor | None) -> Tensor | None:
        """Through pinned memory, so that the host need not wait."""
        if x is None or self.device.type != "cuda" or x.is_cuda:
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    def encode(self, batch: Batch, with_states: bool = False, with_maps: bool = False) -> Encoded:
        """All layers, as one graph where the batch is small and nothing else is asked for."""
        plan, picked = batch.packing, batch.picked
        with _on(self.device):
            bucket = None if with_maps or with_states or batch.embeds_ND is not None else self._bucket(plan)
            maps = None
            if with_maps:
                shape = (plan.shape[0], self.layers[0].heads if self.layers else 0, plan.shape[1], plan.shape[1])
                maps = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers]
            if bucket is not None:
                states = [self.graphs.run(batch.ids_3N, plan.lengths, bucket)]
            else:
                only_picked = picked is not None and len(picked.index) and not with_states and not with_maps
                states = self._encode_freely(batch, picked if only_picked else None, maps)
            last = states[-1]
            if picked is not None and len(last) == plan.tokens:
                last = last.index_select(0, self.to_device(picked.index))
            return Encoded(last, states if with_states else None, maps)

    def words(self, x_MD: Tensor) -> Tensor:
        """The head of masked words, (M, D) -> (M, V)."""
        with _on(self.device):
            return self.head(x_MD)

    def _embed(self, ids_3N: Tensor, embeds_ND: Tensor | None = None) -> Tensor:
        """Word, segment and position ids on the device -> (N, D)."""
        if embeds_ND is None:
            return self.plan.pieces(ids_3N.shape[1]).embed(ids_3N, self.embeddings, self.dtype)
        tables = self.embeddings
        x_ND = embeds_ND + tables.token_type_embeddings(ids_3N[1])
        return tables.LayerNorm(x_ND + tables.position_embeddings(ids_3N[2])).to(self.dtype)

    def _encode_freely(self, batch: Batch, picked: Picked | None, maps: list[Tensor] | None) -> list[Tensor]:
        """Without a graph: all hidden states, of the last one only the picked tokens. Fills in the maps."""
        x_ND = self._embed(self.to_device(batch.ids_3N), batch.embeds_ND)
        asking = None if picked is None else self._asking(picked)
        keep_maps = None if maps is None else lambda number, qkv: _keep_map(maps[number], qkv, batch.packing)
        return self._layers(x_ND, self._texts(batch.packing), asking, keep_maps)

    def _layers(
        self, x_ND: Tensor, texts: Texts, asking: tuple[Tensor, Texts] | None = None, keep_maps: Any = None
    ) -> list[Tensor]:
        """All hidden states, the embeddings first; of the last one only the tokens asking, (M, D).

        keep_maps: called with (layer number, (N, 3 * D)) for each layer.
        """
        states, last = [x_ND], len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            keep = None if keep_maps is None else partial(keep_maps, number)
            states.append(layer(states[-1], texts, asking if number == last else None, keep))
        return states

    def _bucket(self, plan: Packing) -> Bucket | None:
        """The graph to use for a batch, or None."""
        if self.graphs is None or plan.masks:
            return None
        bucket = bucket_for(plan.lengths)
        if bucket is not None and not self.plan.varlen and bucket.S * bucket.longest > _PADDED_ROWS:
            return None
        return bucket

    def _encode_bucket(self, batch: Tensor, bucket: Bucket) -> Tensor:
        ids_3N = batch[: 3 * bucket.N].view(3, bucket.N)
        texts = Texts(batch[3 * bucket.N :].int(), bucket.longest, self.plan.varlen)
        return self._layers(self._embed(ids_3N), texts)[-1]

    def _texts(self, plan: Packing) -> Texts:
        longest, varlen = max(plan.lengths), self.plan.varlen
        starts = self._starts(plan.lengths)
        if not plan.masks:
            return Texts(starts, longest, varlen)
        return Texts(starts, longest, False, self.to_device(_dense_mask(plan, longest)))

    def _asking(self, picked: Picked) -> tuple[Tensor, Texts]:
        texts = Texts(self._starts(picked.lengths), max(picked.lengths), self.plan.varlen)
        return self.to_device(picked.index), texts

    def _starts(self, lengths: list[int]) -> Tensor:
        return self.to_device(torch.tensor([0, *lengths]).cumsum(0).int())


def _on(device: torch.device) -> AbstractContextManager:
    """Kernels and graphs are launched on the current device: make it the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _dense_mask(plan: Packing, longest: int) -> Tensor:
    """(B, 1 or H, 1 or longest, longest) for a batch with masks of its own, on the host."""
    if len(plan.masks) == plan.shape[0]:
        return torch.stack([plan.masks[row] for row in range(plan.shape[0])])
    mask = torch.arange(longest) < torch.tensor(plan.lengths)[:, None]  # rows without one: the computed tokens
    mask = mask[:, None, None]  # (B, T) -> (B, 1, 1, T)
    for row, own in plan.masks.items():
        mask[row] = own
    return mask


def _keep_map(maps_BHTT: Tensor, qkv_N3D: Tensor, plan: Packing) -> None:
    """Write one layer's attention probabilities where each row's computed tokens stand among the T columns."""
    heads, K = maps_BHTT.shape[1], qkv_N3D.shape[1] // 3 // maps_BHTT.shape[1]
    for row, part in enumerate(qkv_N3D.split(plan.lengths)):
        query, key, _ = part.view(-1, 3, heads, K).permute(1, 2, 0, 3)  # (n, 3, H, K) -> 3 times (H, n, K)
        scores = query @ key.transpose(1, 2) * K**-0.5  # (H, n, n)
        mask = plan.masks.get(row)
        if mask is not None:
            mask = mask.to(scores.device)
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        places = plan.columns(row).to(scores.device)
        probabilities = torch.where(nothing, 1 / scores.shape[-1], scores.softmax(-1))  # uniform, as the plain model's
        maps_BHTT[row][:, places[:, None], places[None]] = probabilities


def gpu_plan(model: BertPreTrainedModel, dtype: str | None) -> GpuPlan:
    """Decide dtype and kernels. dtype: a name in NAMES, "auto", or None for the model's own.

    Raises ValueError for a dtype that this GPU does not compute fast, RuntimeError where there is no CUDA.
    """
    device, config = model.device, model.config
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(
            f"the GPU path needs a CUDA device, but the model is on {device} and torch {torch.__version__} "
            f"{'finds' if torch.cuda.is_available() else 'finds no'} GPU here"
        )
    capability = torch.cuda.get_device_capability(device)
    name = _dtype(dtype, NAMES[model.dtype], capability)
    receipts = [
        f"device: {torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}",
        f"chosen: {name}, " + ("the model's own dtype" if dtype is None else "as asked"),
    ]
    computed = getattr(torch, name)
    with _on(device):
        pieces, lines = measured(
            model.base_model.embeddings, config.intermediate_size, config.hidden_act, computed, cuda_seconds
        )
    obstacle = varlen_obstacle(device, computed, config.hidden_size // config.num_attention_heads)
    receipts += [*lines, f"attention: {obstacle + ': padded rows' if obstacle else 'varlen_attn on packed tokens'}"]
    receipts.append("torch.compile: not used, since shapes change with each batch; benchmarks/gpu.py compares")
    return GpuPlan(name, pieces["small"], pieces["large"], not obstacle, True, tuple(receipts))


def _dtype(asked: str | None, own: str, capability: tuple[int, int]) -> str:
    if asked == "int8":
        raise ValueError("dtype='int8' is for the CPU: on a GPU use bfloat16 or float16")
    if asked == "auto":
        return "bfloat16" if capability >= (8, 0) else "float16" if capability >= (7, 0) else "float32"
    name = own if asked is None else asked
    if name == "bfloat16" and capability < (8, 0):
        raise ValueError(f"dtype=bfloat16: a GPU of compute capability {capability[0]}.{capability[1]} only emulates "
                         "it; use float16 or float32")  # fmt: skip
    return name


def _try_graph(engine: GpuEngine) -> str:
    """Capture one graph now: where that is impossible, do without, and say so."""
    try:
        with _on(engine.device):
            engine.graphs.capture(bucket_for([16]))
    except RuntimeError as failure:
        engine.graphs = None
        return f"CUDA graphs: not used ({str(failure).splitlines()[0]})"
    return "CUDA graphs: batches of up to 4096 tokens, one graph a size, captured at first use"


PLAIN = GpuPlan("float32", TORCH, TORCH, False, False, ("torch's own kernels on packed tokens",))

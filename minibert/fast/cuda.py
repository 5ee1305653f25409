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
from minibert.fast.encoder import Norm
from minibert.fast.graphs import Bucket, Graphs, bucket_for
from minibert.fast.optimized import OptimizedModel, _Call
from minibert.fast.padding import Packing, Picked, packing
from minibert.fast.pieces import LARGE, TORCH, Pieces, cuda_seconds, measured
from minibert.fast.plan import NAMES
from minibert.fast.varlen import Texts, attend, varlen_obstacle
from minibert.inputs import check_inputs
from minibert.model import BertLayer, BertModel
from minibert.outputs import BaseModelOutput

_PADDED_ROWS = 8192  # rows that a graph without FlashAttention may pad its texts to


@dataclass(frozen=True)
class GpuPlan:
    """dtype: what products are computed in. small, large: kernels for batches below and from `LARGE` tokens.
    varlen: attention by FlashAttention. graphs: replay small batches. receipts: what was decided, and why."""

    dtype: str
    small: Pieces
    large: Pieces
    varlen: bool
    graphs: bool
    receipts: tuple[str, ...]

    @property
    def activations(self) -> torch.dtype:
        """What is stored between products."""
        return getattr(torch, self.dtype)

    def pieces(self, tokens: int) -> Pieces:
        return self.large if tokens >= LARGE else self.small

    def explain(self) -> str:
        return "\n".join(self.receipts)

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


class GpuEncoder:
    """The embeddings and layers of a BertModel."""

    def __init__(self, model: BertModel, plan: GpuPlan):
        self.plan, self.dtype, self.device = plan, plan.activations, model.device
        self.embeddings = model.embeddings
        self.layers = [GpuLayer(layer, plan) for layer in model.encoder.layer]
        shared = {parameter.data_ptr() for parameter in model.parameters()}
        copies = [weight for layer in self.layers for weight in layer.weights() if weight.data_ptr() not in shared]
        self.nbytes = sum(weight.numel() * weight.element_size() for weight in copies)
        self.graphs = Graphs(self._encode_bucket, self.device) if plan.graphs else None

    def embed(self, ids_3N: Tensor) -> Tensor:
        """Word, segment and position ids on the device -> (N, D)."""
        return self.plan.pieces(ids_3N.shape[1]).embed(ids_3N, self.embeddings, self.dtype)

    def embed_given(self, inputs_embeds_ND: Tensor, ids_3N: Tensor) -> Tensor:
        """The same, with embeddings instead of words."""
        tables = self.embeddings
        x_ND = inputs_embeds_ND + tables.token_type_embeddings(ids_3N[1])
        return tables.LayerNorm(x_ND + tables.position_embeddings(ids_3N[2])).to(self.dtype)

    def encode(
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

    def bucket(self, plan: Packing) -> Bucket | None:
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
        return self.encode(self.embed(ids_3N), texts)[-1]


class GpuModel(OptimizedModel):
    """`OptimizedModel` on a GPU. Inputs may be on the CPU, which saves the wait for them to be copied there."""

    def _call(self, positions: Tensor | None) -> _GpuCall:
        return _GpuCall(self, positions)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See OptimizedModel.forward. Autocast changes nothing: the dtype was chosen by `optimize`."""
        with _on(self.device), torch.autocast(self.device.type, enabled=False):
            return super().forward(*args, **kwargs)


class _GpuCall(_Call):
    """A call's shapes are planned on the host: one copy of the ids there, none of anything back until the results."""

    def bert(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """BertModel.forward. The last hidden state stays packed, except for a bare BertModel."""
        config, encoder = self.config, self.fast.encoder
        hosted = (_to_host(x) for x in (input_ids, attention_mask, token_type_ids, position_ids, self.positions))
        input_ids, attention_mask, token_type_ids, position_ids, self.positions = hosted
        check_inputs(config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        with_maps = config.output_attentions if output_attentions is None else output_attentions
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        plan = packing(attention_mask, B, T, encoder.dtype)
        wanted = self._wanted(B, T)
        picked = None if wanted is None else plan.pick(wanted)
        self.packing = replace(plan, index=self._to_device(plan.index), masks={})
        ids_3N = _ids(plan, input_ids, token_type_ids, position_ids)
        bucket = None if with_maps or with_states or inputs_embeds is not None else encoder.bucket(plan)
        maps = None
        if with_maps:
            shape = (B, config.num_attention_heads, T, T)
            maps = [torch.zeros(shape, dtype=encoder.dtype, device=encoder.device) for _ in encoder.layers]
        if bucket is not None:
            states = [encoder.graphs.run(ids_3N, plan.lengths, bucket)]
        else:
            only_picked = picked is not None and len(picked.index) and not with_states and not with_maps
            states = self._encode(plan, ids_3N, inputs_embeds, picked if only_picked else None, maps)
        last = states[-1]
        if picked is not None and len(last) == plan.tokens:
            last = last.index_select(0, self._to_device(picked.index))
        pooled = None if self.fast.pooler is None else self._pooled(last, plan, picked)
        if self.positions is not None:  # without added first tokens
            asked = plan.pack(self.positions).index_select(0, picked.index).nonzero().squeeze(1)
            last = last.index_select(0, self._to_device(asked))
        if isinstance(self.fast.model, BertModel):
            last = self._as_asked(last)
        all_states = tuple(self._padded(state) for state in states) if with_states else None
        output = BaseModelOutput(last, pooled, all_states, None if maps is None else tuple(maps))
        return self.finish(output, return_dict)

    def _encode(
        self,
        plan: Packing,
        ids_3N: Tensor,
        inputs_embeds: Tensor | None,
        picked: Picked | None,
        maps: list[Tensor] | None,
    ) -> list[Tensor]:
        """Without a graph: all hidden states, of the last one only the picked tokens. Fills in the maps."""
        encoder, ids_3N = self.fast.encoder, self._to_device(ids_3N)
        if inputs_embeds is None:
            x_ND = encoder.embed(ids_3N)
        else:
            x_ND = encoder.embed_given(self.packing.pack(inputs_embeds.to(encoder.device)), ids_3N)
        asking = None if picked is None else self._asking(picked)
        keep_maps = None if maps is None else lambda number, qkv: _keep_map(maps[number], qkv, plan)
        return encoder.encode(x_ND, self._texts(plan), asking, keep_maps)

    def _texts(self, plan: Packing) -> Texts:
        longest, varlen = max(plan.lengths), self.fast.plan.varlen
        starts = self._starts(plan.lengths)
        if not plan.masks:
            return Texts(starts, longest, varlen)
        return Texts(starts, longest, False, self._to_device(_dense_mask(plan, longest)))

    def _asking(self, picked: Picked) -> tuple[Tensor, Texts]:
        lengths = [len(tokens) for tokens in picked.per_row]
        texts = Texts(self._starts(lengths), max(lengths), self.fast.plan.varlen)
        return self._to_device(picked.index), texts

    def _starts(self, lengths: list[int]) -> Tensor:
        return self._to_device(torch.tensor([0, *lengths]).cumsum(0).int())

    def _pooled(self, last_MD: Tensor, plan: Packing, picked: Picked | None) -> Tensor:
        lengths = plan.lengths if picked is None else [len(tokens) for tokens in picked.per_row]
        first = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        first_BD = last_MD.index_select(0, self._to_device(first))
        return self.fast.pooler(first_BD.to(self.fast.dtype)[:, None])  # (B, 1, D) -> (B, D)

    def _to_device(self, x: Tensor | None) -> Tensor | None:
        """Through pinned memory, so that the host need not wait."""
        device = self.fast.device
        if x is None or device.type != "cuda":
            return x
        return x.pin_memory().to(device, non_blocking=True)


def _on(device: torch.device) -> AbstractContextManager:
    """Kernels and graphs are launched on the current device: make it the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _to_host(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) and x.is_cuda else x


def _ids(plan: Packing, words: Tensor | None, segments: Tensor | None, positions: Tensor | None) -> Tensor:
    """(3, N), on the host: word (0 if embeddings are given instead), segment and position of each computed token."""
    nothing = torch.zeros(1, plan.shape[1], dtype=torch.long)
    if positions is None:
        positions = torch.arange(plan.shape[1])[None]
    rows = (plan.pack(nothing if x is None else x.long()) for x in (words, segments, positions))
    return torch.stack(list(rows))


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
        maps_BHTT[row][:, places[:, None], places[None]] = scores.softmax(-1).masked_fill(nothing, 0.0)


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


def with_plan(model: BertPreTrainedModel, plan: GpuPlan) -> GpuModel:
    """The optimized model, on whatever device `model` is."""
    encoder = GpuEncoder(model.base_model, plan)
    words = getattr(getattr(model, "cls", None), "predictions", None)
    head = None if words is None else GpuVocabularyHead(words, plan)
    extra = encoder.nbytes + (0 if head is None else head.nbytes)
    receipts = [*plan.receipts, f"memory: {extra / 2**20:.0f} MiB for a second copy of weights, joined, cast or padded"]
    if encoder.graphs is not None:
        receipts.append(_try_graph(encoder))
    plan = replace(plan, graphs=encoder.graphs is not None, receipts=tuple(receipts))
    return GpuModel(model, encoder, head, plan)


def _try_graph(encoder: GpuEncoder) -> str:
    """Capture one graph now: where that is impossible, do without, and say so."""
    try:
        with _on(encoder.device):
            encoder.graphs.capture(bucket_for([16]))
    except RuntimeError as failure:
        encoder.graphs = None
        return f"CUDA graphs: not used ({str(failure).splitlines()[0]})"
    return "CUDA graphs: batches of up to 4096 tokens, one graph a size, captured at first use"


def on_cuda(model: BertPreTrainedModel, dtype: str | None) -> GpuModel:
    """What `optimize` does for a model on a GPU."""
    return with_plan(model, gpu_plan(model, dtype))


PLAIN = GpuPlan("float32", TORCH, TORCH, False, False, ("torch's own kernels on packed tokens",))

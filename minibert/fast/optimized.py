"""OptimizedModel: any minibert model's call and outputs, computed by an encoder of the fast path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import CpuEncoder, Kernels, Norm
from minibert.fast.padding import Packing, Picked, packing, pad
from minibert.fast.plan import Plan
from minibert.heads import BertForMultipleChoice, BertForNextSentencePrediction, BertForSequenceClassification
from minibert.inputs import check_inputs
from minibert.model import BertModel
from minibert.outputs import BaseModelOutput

# Models whose only use of the last layer is the first token of each text
POOLED_ONLY = (BertForMultipleChoice, BertForNextSentencePrediction, BertForSequenceClassification)


class FastVocabularyHead:
    """The masked-language-model head on packed tokens: (N, D) -> (N, V)."""

    def __init__(self, head: nn.Module, kernels: Kernels):
        dense, decoder, linear, dtype = head.transform.dense, head.decoder, kernels.careful, kernels.dtype
        self.transform = linear(dense.weight.to(dtype), dense.bias.to(dtype), head.transform.transform_act_fn)
        self.norm = Norm(head.transform.LayerNorm, dtype)
        self.decoder = linear(decoder.weight.to(dtype), decoder.bias.to(dtype))

    @property
    def nbytes(self) -> int:
        return self.transform.nbytes + self.decoder.nbytes

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self.decoder(self.norm(self.transform(x_ND)))


class OptimizedModel(nn.Module):
    """Made by `optimize`. For inference only; gives the outputs of `model`, whose parameters it shares.

    Three additions to the call: `input_ids` may be lists of ids, one a text; padding is not computed, outputs there
    are zeros; and `positions`, boolean (B, T), asks for those tokens alone: `last_hidden_state` is then (M, D) and
    token logits (M, ...), in reading order. All False leaves only what the first tokens give, as `pooler_output`.
    """

    def __init__(
        self, model: BertPreTrainedModel, encoder: CpuEncoder, vocabulary_head: FastVocabularyHead | None, plan: Plan
    ):
        super().__init__()
        # Not a submodule: .to(), .train() and state_dict() belong to the plain model
        object.__setattr__(self, "model", model)
        self.encoder, self.vocabulary_head, self.plan = encoder, vocabulary_head, plan
        object.__setattr__(self, "pooler", model.base_model.pooler)
        self.eval()
        # Training changes parameters in place and counts it here. (Inference tensors keep no count.)
        self._parameters_seen = [p for p in model.parameters() if not p.is_inference()]
        self._versions_seen = self._versions()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the outputs: the plain model's. What it computes in is `plan.dtype`."""
        return self.model.dtype

    @torch.no_grad()
    def forward(self, input_ids: Any = None, *args: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Arguments and outputs as the plain model's, errors too. See the class for `positions` and lists of ids.

        Raises RuntimeError if the plain model's parameters were changed after `optimize`.
        """
        if self._versions() != self._versions_seen:
            raise RuntimeError("the model's parameters changed after optimize: optimize it again")
        kwargs = inspect.signature(self.model.forward).bind_partial(input_ids, *args, **kwargs).arguments
        input_ids = kwargs.pop("input_ids")
        if isinstance(input_ids, Sequence):
            if kwargs.get("attention_mask") is not None:
                raise ValueError("attention_mask: input_ids given as lists have no padding to mask")
            input_ids, kwargs["attention_mask"] = pad(input_ids, self.config.pad_token_id or 0)
        if positions is not None:
            self._check_positions(kwargs)
        call = self._call(positions)
        if isinstance(self.model, BertModel):
            return call.bert(input_ids, **kwargs)
        # The head's own forward, with a stand-in for the model: its checks, its losses, its output record
        return type(self.model).forward(call, input_ids, **kwargs)

    def _call(self, positions: Tensor | None) -> _Call:
        return _Call(self, positions)

    def _check_positions(self, arguments: dict[str, Any]) -> None:
        if isinstance(self.model, POOLED_ONLY):
            raise ValueError(f"positions: {type(self.model).__name__} gives nothing for single tokens")
        for name in ("labels", "start_positions", "end_positions"):
            if arguments.get(name) is not None:
                raise ValueError(f"positions: with {name}, outputs are needed at every token")

    def explain(self) -> str:
        """What was chosen, and on what evidence."""
        return self.plan.explain()

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, {self.plan}"

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError("an optimized model is for inference only: train the plain model (.model)")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("an optimized model stays as it is: move or cast the plain model (.model), then optimize it")

    def __reduce__(self) -> tuple[Any, ...]:
        from minibert.fast import optimize  # imports this module

        return optimize, (self.model, self.plan.dtype)  # prepacked weights cannot be pickled or copied: pack again

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters_seen]


class _Call:
    """Stands in for the plain model in one run of its own forward: the parts that cost are computed on packed tokens.

    `bert` returns packed tokens, the head modules below take them and return the padded tensors that forward expects.
    """

    def __init__(self, fast: OptimizedModel, positions: Tensor | None):
        self.fast, self.positions = fast, positions
        self.packing: Packing | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.fast.model, name)
        return MethodType(found.__func__, self) if isinstance(found, MethodType) else found

    def dropout(self, x: Tensor) -> Tensor:
        return x

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
        check_inputs(config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        with_maps = config.output_attentions if output_attentions is None else output_attentions
        with_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        B, T = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        plan = self.packing = packing(attention_mask, B, T, encoder.dtype)
        wanted = self._wanted(B, T)
        picked = None if wanted is None else plan.pick(wanted)
        x_ND = encoder.embed(plan, input_ids, token_type_ids, position_ids, inputs_embeds)
        maps = None
        if with_maps:
            maps = [x_ND.new_zeros(B, config.num_attention_heads, T, T) for _ in range(config.num_hidden_layers)]
        whole = with_states or with_maps
        states: list[Tensor] = []
        for state in encoder.encode(x_ND, plan, None if whole else picked, maps):
            states = [*states, state] if with_states else [state]
        last = states[-1].index_select(0, picked.index) if whole and picked is not None else states[-1]
        pooled = None if self.fast.pooler is None else self._pooled(last, plan, picked)
        if self.positions is not None:
            last = last[plan.pack(self.positions).index_select(0, picked.index)]  # without added first tokens
        if isinstance(self.fast.model, BertModel):
            last = self._as_asked(last)
        all_states = tuple(self._padded(state) for state in states) if with_states else None
        output = BaseModelOutput(last, pooled, all_states, None if maps is None else tuple(maps))
        return self.finish(output, return_dict)

    def cls(self, x: Tensor, pooled: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The heads of masked words (x is packed tokens), of the next sentence (x is pooled), or both."""
        if self.fast.vocabulary_head is None:
            return self.fast.model.cls(x)
        words = self._as_asked(self.fast.vocabulary_head(x))
        return words if pooled is None else (words, self.fast.model.cls.seq_relationship(pooled))

    def classifier(self, x: Tensor) -> Tensor:
        logits = self.fast.model.classifier(x.to(self.fast.dtype))
        return logits if self.fast.pooler is not None else self._as_asked(logits)

    def qa_outputs(self, x_ND: Tensor) -> Tensor:
        return self._as_asked(self.fast.model.qa_outputs(x_ND.to(self.fast.dtype)))

    def _wanted(self, B: int, T: int) -> Tensor | None:
        """Which tokens the last layer must give, (B, T); None for all."""
        pooled_only = isinstance(self.fast.model, POOLED_ONLY)
        if self.positions is None and not pooled_only:
            return None
        wanted = torch.zeros(B, T, dtype=torch.bool) if self.positions is None else self.positions
        if not isinstance(wanted, Tensor) or wanted.dtype != torch.bool or wanted.shape != (B, T):
            got = f"{wanted.dtype} {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
            raise ValueError(f"positions must be a boolean tensor of shape {(B, T)}, got {got}")
        if self.fast.pooler is None:
            return wanted
        wanted = wanted.clone()
        wanted[:, 0] = True
        return wanted

    def _pooled(self, last_MD: Tensor, plan: Packing, picked: Picked | None) -> Tensor:
        lengths = plan.lengths if picked is None else [len(tokens) for tokens in picked.per_row]
        first_BD = last_MD.index_select(0, torch.tensor([0, *accumulate(lengths[:-1])]))
        return self.fast.pooler(first_BD.to(self.fast.dtype)[:, None])  # (B, 1, D) -> (B, D)

    def _padded(self, x_N: Tensor) -> Tensor:
        return self.packing.unpack(x_N.to(self.fast.dtype))

    def _as_asked(self, x_N: Tensor) -> Tensor:
        """Padded, (B, T, ...); or the positions alone, (M, ...)."""
        return self._padded(x_N) if self.positions is None else x_N.to(self.fast.dtype)

"""OptimizedModel: any minibert model's call and outputs, computed by an engine of the fast path."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import Encoded
from minibert.fast.exact import Held
from minibert.fast.padding import Batch, Packing, Picked, pack_ids, pack_rows, packing, pad
from minibert.heads import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from minibert.inputs import IGNORED, check_ids, check_inputs, input_shape, is_recorded
from minibert.model import BertModel
from minibert.outputs import BaseModelOutput, ModelOutput

# Models whose only use of the last layer is the first token of each text
POOLED_ONLY = (BertForMultipleChoice, BertForNextSentencePrediction, BertForSequenceClassification)
TOKEN_LABELS = (BertForMaskedLM, BertForPreTraining, BertForTokenClassification)  # models whose labels are (B, T)
LABELS = ("labels", "next_sentence_label", "start_positions", "end_positions")
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class ChangedError(RuntimeError):
    """The plain model is not what it was when it was optimized."""


class Engine(Protocol):
    """What computes, on one kind of device. Batches are planned on the host and hold no padding."""

    dtype: torch.dtype  # of what it returns
    nbytes: int  # memory of the weights' second copy

    def to_host(self, x: Tensor | None) -> Tensor | None: ...
    def to_device(self, x: Tensor | None) -> Tensor | None: ...
    def encode(self, batch: Batch, with_states: bool = False, with_maps: bool = False) -> Encoded: ...
    def words(self, x_MD: Tensor) -> Tensor: ...


class Plan(Protocol):
    """What was decided: picklable, so that a copy of the model decides nothing anew."""

    dtype: str
    receipts: tuple[str, ...]

    def build(self, model: BertPreTrainedModel) -> OptimizedModel: ...


class OptimizedModel(nn.Module):
    """Made by `optimize`. For inference only; gives the outputs of `model`, whose parameters it shares.

    Three additions to the call: `input_ids` may be lists of ids, one a text; padding is not computed, outputs there
    are zeros (but for losses and answers' positions, which may depend on padding: see `forward`); and `positions`,
    boolean (B, T), asks for those tokens alone: `last_hidden_state` is then (M, D) and token logits (M, ...), in
    reading order. All False leaves only what the first tokens give, as `pooler_output`.

    What records a call instead of running it (torch.jit.trace, torch.compile, torch.export) records the plain model.
    """

    def __init__(self, model: BertPreTrainedModel, engine: Engine, plan: Plan, notes: tuple[str, ...] = ()):
        super().__init__()
        # Not a submodule: .to(), .train() and state_dict() belong to the plain model
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "pooler", model.base_model.pooler)
        self.engine, self.plan, self.notes = engine, plan, notes  # notes: receipts of what was built
        # dtype: of the outputs, the plain model's; what it computes in is `plan.dtype`. Neither can change: see Held
        self.device, self.dtype = model.device, model.dtype
        self.eval()
        self._held = Held(model)
        self._signature = inspect.signature(model.forward)

    @property
    def config(self) -> Any:
        return self.model.config

    @torch.no_grad()
    def forward(self, input_ids: Any = None, *args: Any, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Arguments and outputs as the plain model's, errors too, whatever autocast surrounds the call.

        With start_positions or end_positions, with labels at padding, and for the logits of answers, padding is
        computed as the plain model does. See the class for `positions` and lists of ids.

        Raises ChangedError, a RuntimeError, if the plain model was changed after `optimize`.
        """
        self.check_unchanged()
        given = {"input_ids": input_ids, **kwargs}
        if args or not kwargs.keys() <= self._signature.parameters.keys():
            given = self._signature.bind_partial(input_ids, *args, **kwargs).arguments
        if isinstance(given["input_ids"], Sequence):
            if given.get("attention_mask") is not None:
                raise ValueError("attention_mask: input_ids given as lists have no padding to mask")
            given["input_ids"], given["attention_mask"] = pad(input_ids, self.config.pad_token_id or 0)
        ids = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if isinstance(ids, Tensor) and _holds_no_values(ids):
            return self._recorded(given, positions)
        with _without_autocast(self.device):
            return self._computed(given, positions)

    def encode_rows(
        self, rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None, first_only: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Lists of ids, one a text, to last hidden states (N, D) one text after another, and the texts' lengths.

        No padding is made. segments: a list as long for each text. first_only: states of the first tokens, (B, D).
        Raises ValueError and ChangedError as `forward`.
        """
        self.check_unchanged()
        batch = pack_rows(rows, segments)
        self._check_ids(rows, batch, segments is not None)
        if first_only:
            batch = replace(batch, picked=_first_tokens(batch.packing))
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), _without_autocast(self.device):
            last = self.engine.encode(batch).last_MD
        return last.to(self.dtype), batch.packing.lengths

    def check_unchanged(self) -> None:
        """Raises ChangedError if the plain model is not what it was: its weights are held here in another layout."""
        change = self._held.change()
        if change:
            raise ChangedError(f"{change} after optimize: optimize it again")

    def is_current(self) -> bool:
        """Whether the plain model is what it was."""
        return not self._held.change()

    def explain(self) -> str:
        """What was chosen, and on what evidence."""
        return "\n".join((*self.plan.receipts, *self.notes))

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, {self.plan}"

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise RuntimeError("an optimized model is for inference only: train the plain model (.model)")
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("an optimized model stays as it is: move or cast the plain model (.model), then optimize it")

    def __reduce__(self) -> tuple[Any, ...]:
        # What is laid out for kernels cannot be copied, but laid out again. Without a compiled pass, none is made
        return _rebuilt, (self.model, replace(self.plan, compile=self.plan.compile and None))

    # One call

    def _recorded(self, given: dict[str, Any], positions: Tensor | None) -> Any:
        if positions is not None:
            raise ValueError("positions: a recorded call cannot depend on which they are; leave them out")
        return self.model(**given)

    def _computed(self, given: dict[str, Any], positions: Tensor | None) -> Any:
        labels = {name: given[name] for name in LABELS if given.get(name) is not None}
        shape = self._check_labels(given, labels, positions)
        inputs = [given.get(name) for name in INPUTS]
        if isinstance(self.model, BertForMultipleChoice):
            inputs = [None if x is None else x.flatten(0, 1) for x in inputs]  # (B, C, ...) -> (B * C, ...)
            labels["choices"] = shape[1]
        wants = [getattr(self.config, name) if given.get(name) is None else given[name]
                 for name in ("output_hidden_states", "output_attentions")]  # fmt: skip
        plan, batch, encoded = self._encoded(inputs, positions, labels, *wants)
        output = self._outputs(plan, encoded, batch.picked, positions, labels)
        return self.model.finish(output, given.get("return_dict"))

    def _check_labels(
        self, given: dict[str, Any], labels: dict[str, Tensor], positions: Tensor | None
    ) -> tuple[int, ...]:
        """Raise ValueError as the plain model does; returns (B, T), or (B, C, T)."""
        plain, ids, embeds = self.model, given["input_ids"], given.get("inputs_embeds")
        if positions is not None:
            if isinstance(plain, POOLED_ONLY):
                raise ValueError(f"positions: {type(plain).__name__} gives nothing for single tokens")
            for name in labels:
                if name != "next_sentence_label":
                    raise ValueError(f"positions: with {name}, outputs are needed at every token")
        shape = input_shape(ids, embeds, ndim=3 if isinstance(plain, BertForMultipleChoice) else 2)
        if isinstance(plain, BertForMultipleChoice):
            check_ids("labels", labels.get("labels"), [shape[:1]], shape[1], IGNORED)
        elif isinstance(plain, BertForQuestionAnswering):
            for name in ("start_positions", "end_positions"):
                check_ids(name, labels.get(name), [(shape[0],), (shape[0], 1)], 2**31)
        elif isinstance(plain, BertForPreTraining):
            check_ids("labels", labels.get("labels"), [tuple(shape)], self.config.vocab_size, IGNORED)
            check_ids(
                "next_sentence_label", labels.get("next_sentence_label"), [(shape[0],), (shape[0], 1)], 2, IGNORED
            )
        elif not isinstance(plain, BertModel):
            plain._check_labels(labels.get("labels"), *shape)
        return shape

    def _encoded(
        self, inputs: list[Any], positions: Tensor | None, labels: dict[str, Tensor], states: bool, maps: bool
    ) -> tuple[Packing, Batch, Encoded]:
        engine = self.engine
        ids, mask, segments, places, positions = map(engine.to_host, (*inputs[:4], positions))
        embeds = inputs[4]
        check_inputs(self.config, ids, mask, segments, places, embeds)
        B, T = (ids if embeds is None else embeds).shape[:2]
        plan = packing(mask, B, T, engine.dtype, self._needs_padding(mask, labels))
        if positions is None:
            picked = _first_tokens(plan) if isinstance(self.model, POOLED_ONLY) else None
        else:
            picked = plan.pick(self._wanted(positions, B, T))
        moved = replace(plan, index=engine.to_device(plan.index))
        embeds = None if embeds is None else moved.pack(engine.to_device(embeds))
        batch = Batch(plan, pack_ids(plan, ids, segments, places), embeds, picked)
        return moved, batch, engine.encode(batch, states, maps)

    def _needs_padding(self, mask: Tensor | None, labels: dict[str, Any]) -> bool:
        """Whether something is asked for that depends on what the model gives at padding."""
        if mask is None or mask.ndim > 2:
            return False
        if isinstance(self.model, BertForQuestionAnswering):
            return True  # logits compete with those at padding
        if not isinstance(self.model, TOKEN_LABELS) or "labels" not in labels:
            return False
        return bool((self.engine.to_host(labels["labels"])[~mask.bool()] != IGNORED).any())

    def _wanted(self, wanted: Tensor, B: int, T: int) -> Tensor:
        """Which tokens the last layer must give, (B, T), where `positions` asks for some."""
        if not isinstance(wanted, Tensor) or wanted.dtype != torch.bool or wanted.shape != (B, T):
            got = f"{wanted.dtype} {tuple(wanted.shape)}" if isinstance(wanted, Tensor) else type(wanted).__name__
            raise ValueError(f"positions must be a boolean tensor of shape {(B, T)}, got {got}")
        if self.pooler is None:
            return wanted
        wanted = wanted.clone()
        wanted[:, 0] = True
        return wanted

    def _outputs(
        self, plan: Packing, encoded: Encoded, picked: Picked | None, positions: Tensor | None, labels: dict[str, Any]
    ) -> ModelOutput:
        """The plain model's record: its head on the packed states, its losses."""
        engine, last_MD = self.engine, encoded.last_MD

        def padded(x_N: Tensor) -> Tensor:
            return plan.unpack(x_N.to(self.dtype))

        pooled = None
        if self.pooler is not None:
            lengths = plan.lengths if picked is None else picked.lengths
            firsts = Packing((len(lengths), 0), None, lengths, {}).firsts
            first_BD = last_MD if len(last_MD) == len(lengths) else last_MD.index_select(0, engine.to_device(firsts))
            pooled = self.pooler(first_BD.to(self.dtype)[:, None])  # (B, 1, D) -> (B, D)
        if positions is not None and self.pooler is not None:  # without the first tokens that nobody asked for
            asked = plan.pack(engine.to_device(positions)).index_select(0, engine.to_device(picked.index))
            last_MD = last_MD[asked]
        packed_only = positions is not None or isinstance(self.model, POOLED_ONLY)
        shaped = (lambda x: x.to(self.dtype)) if packed_only else padded
        states = None if encoded.states_ND is None else tuple(map(padded, encoded.states_ND))
        maps = None if encoded.maps_BHTT is None else tuple(x.to(self.dtype) for x in encoded.maps_BHTT)
        if isinstance(self.model, (BertForMaskedLM, BertForPreTraining)):
            name = "logits" if isinstance(self.model, BertForMaskedLM) else "words"
            labels[name] = shaped(engine.words(last_MD))
        output = BaseModelOutput(shaped(last_MD), pooled, states, maps)
        labels = {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in labels.items()}
        return output if isinstance(self.model, BertModel) else self.model.outputs(output, **labels)

    def _check_ids(self, rows: Sequence[Sequence[int]], batch: Batch, with_segments: bool) -> None:
        T = batch.packing.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"rows: one of {T} tokens, max_position_embeddings allows "
                             f"{self.config.max_position_embeddings}")  # fmt: skip
        N = batch.ids_3N.shape[1]
        if min(map(min, rows)) < 0 or max(map(max, rows)) >= self.config.vocab_size:
            check_ids("rows", batch.ids_3N[0], [(N,)], self.config.vocab_size)
        if with_segments:
            check_ids("segments", batch.ids_3N[1], [(N,)], self.config.type_vocab_size)


def _holds_no_values(x: Tensor) -> bool:
    """Whether a batch cannot be planned by what it holds: the call is recorded, or the tensor is a fake or meta one."""
    return is_recorded(x) or x.is_meta or type(x) not in (Tensor, nn.Parameter)


def _first_tokens(plan: Packing) -> Picked:
    return Picked(plan.firsts, [torch.zeros(1, dtype=torch.long)] * len(plan.lengths))


def _rebuilt(model: BertPreTrainedModel, plan: Plan) -> OptimizedModel:
    return plan.build(model)


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """The dtype was chosen by `optimize`. Entering the context costs some microseconds, so only where one is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()

"""What all models share: a config, initialisation. Loading and saving are in weights/pretrained.py."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from minibert.compat.models import HubModel
from minibert.config import BertConfig
from minibert.outputs import ModelOutput
from minibert.weights.pretrained import Pretrained

Output = TypeVar("Output", bound=ModelOutput)


class BertPreTrainedModel(HubModel, Pretrained):
    """The base of all models: a module with a config, which an encoder shares with the head on it."""

    config_class = BertConfig
    base_model_prefix = "bert"  # the attribute that holds the encoder, in models that are not one

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config

    def post_init(self) -> None:
        """Initialise the weights of a new model; the last line of every constructor."""
        first = next(self.parameters(), None)
        holds_values = first is None or not first.is_meta
        for child in self.children():
            if isinstance(child, BertPreTrainedModel):
                continue  # it has done so itself
            for module in child.modules():
                if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
                    continue  # it does so itself when its size is known
                if not module.__dict__.get("is_initialised", False):
                    if holds_values:
                        self._init_weights(module)
                    module.is_initialised = True  # type: ignore[assignment]
        if self.config.gradient_checkpointing and self.base_model is self:
            self.gradient_checkpointing_enable()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Section A.2 as released (google-research/bert, modeling.py): normal, cut at two standard deviations."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not self._is_decoder(module):
            # The inverse of the distribution function, ten times as fast as nn.init.trunc_normal_ and as exact
            probability = math.erf(2 / math.sqrt(2))
            module.weight.uniform_(-probability, probability).erfinv_().mul_(
                math.sqrt(2) * self.config.initializer_range
            )
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.zero_()

    def _is_decoder(self, module: nn.Module) -> bool:
        """Whether a layer has no weight of its own, but the word embeddings'."""
        word_embeddings = getattr(getattr(self.base_model, "embeddings", None), "word_embeddings", None)
        return isinstance(module, nn.Linear) and module.weight is getattr(word_embeddings, "weight", None)

    def finish(self, output: Output, return_dict: bool | None) -> Output | tuple[Any, ...]:
        """The record itself, or the tuple of its fields where the call or the config asks for one."""
        as_record = self.config.return_dict if return_dict is None else return_dict
        return output if as_record else output.to_tuple()

    @property
    def base_model(self) -> nn.Module:
        """The BertModel inside, or this model if it is one."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

"""What all models share: a config, initialisation, resizing. Loading and saving are in weights/pretrained.py."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from minibert.config import BertConfig
from minibert.outputs import ModelOutput
from minibert.weights.pretrained import Pretrained


class BertPreTrainedModel(Pretrained):
    """The base of all models: a module with a config, which an encoder shares with the head on it."""

    config_class = BertConfig
    base_model_prefix = "bert"  # the attribute that holds the encoder, in models that are not one

    def __init__(self, config: BertConfig):
        super().__init__()
        if not isinstance(config, BertConfig):
            raise TypeError(f"config must be a minibert.BertConfig, got {type(config).__name__}")
        config.check()
        self.config = config

    def post_init(self) -> None:
        """Initialise the weights of a new model; the last line of every constructor."""
        for child in self.children():
            if not isinstance(child, BertPreTrainedModel):  # which has done it itself
                child.apply(self._init_weights)

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

    def finish(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple[Any, ...]:
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

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model holds, a tied parameter counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary, in models that have one."""
        predictions = getattr(getattr(self, "cls", None), "predictions", None)
        return getattr(predictions, "decoder", None)

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only what enters each layer and compute the rest again in the backward pass."""
        self.base_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.encoder.gradient_checkpointing = False

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """Cut or extend the vocabulary, with the tied decoder and its bias; new rows are initialised, new biases 0.

        The parameters are new objects: give an optimizer made before this call the new ones.
        """
        config = copy.copy(self.config)
        config.vocab_size = new_num_tokens  # refuses what is not a size
        config.check()
        old = self.get_input_embeddings()
        kept = min(new_num_tokens, old.num_embeddings)
        new = nn.Embedding(
            new_num_tokens, config.hidden_size, config.pad_token_id, device=old.weight.device, dtype=old.weight.dtype
        )
        self._init_weights(new)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        for head in [module for module in self.modules() if isinstance(getattr(module, "decoder", None), nn.Linear)]:
            if head.decoder.weight is old.weight:
                bias = functional.pad(head.bias.detach()[:kept], (0, new_num_tokens - kept))
                head.bias = head.decoder.bias = nn.Parameter(bias, head.bias.requires_grad)
                head.decoder.weight, head.decoder.out_features = new.weight, new_num_tokens
        self.base_model.embeddings.word_embeddings = new
        for module in self.modules():
            if isinstance(module, BertPreTrainedModel):
                module.config = config
        return new

"""What all models share: tied weights, initialisation, resizing. Loading and saving are in pretrained.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from minibert.config import BertConfig
from minibert.outputs import ModelOutput
from minibert.weights.pretrained import Pretrained


class BertPreTrainedModel(Pretrained, nn.Module):
    """What all models share: a config, initialisation, tied weights, resizing; loading and saving are `Pretrained`."""

    config_class = BertConfig
    base_model_prefix: ClassVar[str] = "bert"
    tied_weights: ClassVar[dict[str, str]] = {}  # a parameter's other name -> its own name
    new_heads: ClassVar[tuple[str, ...]] = ()  # parameters that may start untrained on a pretrained encoder
    _arguments: ClassVar[tuple[str, ...]]  # the names that forward takes

    def __init__(self, config: BertConfig):
        super().__init__()
        if not isinstance(config, BertConfig):
            raise TypeError(f"config must be a minibert.BertConfig, got {type(config).__name__}")
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        code = cls.forward.__code__
        cls._arguments = code.co_varnames[1 : code.co_argcount]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in self._arguments:
                raise TypeError(
                    f"{type(self).__name__} takes no argument {name!r}; it takes {', '.join(self._arguments)}"
                )
        return super().__call__(*args, **kwargs)

    def _init_all_weights(self) -> None:
        for child in self.children():
            if not isinstance(child, BertPreTrainedModel):  # which has done it itself
                child.apply(self._init_weights)
        self.tie_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Section A.2 as released (google-research/bert, modeling.py): normal, cut at two standard deviations."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # The inverse of the distribution function, ten times as fast as nn.init.trunc_normal_ and as exact
            probability = math.erf(2 / math.sqrt(2))
            module.weight.uniform_(-probability, probability).erfinv_().mul_(
                math.sqrt(2) * self.config.initializer_range
            )
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif getattr(module, "bias", None) is not None:
            module.bias.zero_()

    def tie_weights(self) -> None:
        """Make every alias in `tied_weights` the very parameter that it names."""
        for alias, owner in self.tied_weights.items():
            module, _, name = alias.rpartition(".")
            setattr(self.get_submodule(module), name, self.get_parameter(owner))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # .to(), .half(), .to_empty() ... may put a new parameter in each place: one must stay one
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.tie_weights()  # assign=True puts a new parameter in each place
        return result

    def finish(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple[Any, ...]:
        """The record itself, or the tuple of its fields where the call or the config asks for one."""
        as_record = self.config.return_dict if return_dict is None else return_dict
        return output if as_record else output.to_tuple()

    @property
    def encoder_model(self) -> nn.Module:
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
        return self.encoder_model.embeddings.word_embeddings

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only what enters each layer and compute the rest again in the backward pass."""
        self.encoder_model.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.encoder_model.encoder.gradient_checkpointing = False

    def resize_token_embeddings(self, new_num_tokens: int) -> nn.Embedding:
        """Cut or extend the vocabulary, with the tied decoder and its bias; new rows are initialised, new biases 0.

        The parameters are new objects: give an optimizer made before this call the new ones.
        """
        config = replace(self.config, vocab_size=new_num_tokens)  # refuses what is not a size
        kept = min(new_num_tokens, self.config.vocab_size)
        old = self.get_input_embeddings()
        new = nn.Embedding(
            new_num_tokens, config.hidden_size, config.pad_token_id, device=old.weight.device, dtype=old.weight.dtype
        )
        self._init_weights(new)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        self.encoder_model.embeddings.word_embeddings = new
        self.config = self.encoder_model.config = config
        return new

"""HubModel: what transformers' scripts, Trainer, PEFT and accelerate expect of a model beyond BERT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minibert.compat import loading
from minibert.weights.ties import aliases


class _SharedConfig:
    """One object, which an encoder shares with the head on it: whoever shared the old one gets a new one too.

    Only setting is special: without `__get__`, reading finds the model's own attribute. Raises TypeError for what is no
    config, ValueError for one whose fields do not go together.
    """

    def __set__(self, model: HubModel, config: Any) -> None:
        if not isinstance(config, model.config_class):
            raise TypeError(f"config must be a minibert.{model.config_class.__name__}, got {type(config).__name__}")
        config.check()
        old = model.__dict__.get("config")
        for module in model.modules():
            if module is model or (isinstance(module, HubModel) and module.config is old):
                module.__dict__["config"] = config


class HubModel(nn.Module):
    """The base of BertPreTrainedModel: names, switches and counts; resizing the vocabulary.

    A subclass has a `config_class`, `base_model`, `_init_weights(module)` and `post_init()`.
    """

    config: Any = _SharedConfig()
    base_model: Any  # a property there
    config_class: ClassVar[type[Any]]
    device: Any
    dtype: Any
    _init_weights: Callable[[nn.Module], None]
    post_init: Callable[[], None]

    main_input_name: ClassVar[str] = "input_ids"
    is_parallelizable: ClassVar[bool] = False
    supports_gradient_checkpointing: ClassVar[bool] = True
    # Trainer asks: no loss here is divided by `num_items_in_batch`. Without an answer it passes that to a `**kwargs`
    accepts_loss_kwargs: ClassVar[bool] = False
    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "BertLayer"]
    _supports_sdpa: ClassVar[bool] = True
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None
    _keys_to_ignore_on_load_missing: ClassVar[list[str] | None] = None
    _keep_in_fp32_modules: ClassVar[list[str] | None] = None

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """A new model of a copy of a config, as `AutoModel.from_config` makes one. Takes `dtype` and `torch_dtype`."""
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        config = copy.deepcopy(config)
        config.attn_implementation = options.pop("attn_implementation", config.attn_implementation)
        options.pop("trust_remote_code", None)  # nothing is ever executed
        model = cls(config, **options)
        return (
            model if dtype in (None, "auto") else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        )

    @classmethod
    def _as_ours(cls, dtype: Any, device: Any, changes: dict[str, Any], where: dict[str, Any]) -> tuple[Any, Any, dict]:
        """dtype, device and the other arguments of `from_pretrained`, in minibert's words."""
        options = dict(changes)
        loading.take_ignored(options)
        loading.take_location(options, where)
        loading.check_attention(options.get("attn_implementation"))
        dtype = loading.one_of(("dtype", "torch_dtype"), dtype, options.pop("torch_dtype", None))
        device_map = loading.one_device(options.pop("device_map", None))
        return dtype, loading.one_of(("device", "device_map"), device, device_map), options

    @classmethod
    def _prepare(cls, source: Any, config: Any, changes: dict[str, Any], *others: Any) -> tuple[Any, Any]:
        attention = changes.get("attn_implementation")
        changes = {name: value for name, value in changes.items() if name != "attn_implementation"}
        model, report = super()._prepare(source, config, changes, *others)  # type: ignore[misc]
        if attention is not None:
            model.set_attn_implementation(attention)
        return model, report

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def name_or_path(self) -> str:
        """Where the model was loaded from, empty for a new one."""
        return self.__dict__.get("_loaded_from", "")

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]], device=self.device)}

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        return aliases(self)

    all_tied_weights_keys = _tied_weights_keys

    @classmethod
    def can_generate(cls) -> bool:
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def init_weights(self) -> None:
        """Initialise what has not been yet; a loaded model stays as it is."""
        self.post_init()

    def tie_weights(self, **ignored: Any) -> None:
        """Make the vocabulary projection the word embeddings again and its bias the head's, as in a new model.

        Raises ValueError where their sizes differ.
        """
        decoder, embeddings = self.get_output_embeddings(), self.get_input_embeddings()
        if decoder is None:
            return
        owners = {"weight": embeddings.weight, "bias": getattr(self.cls.predictions, "bias", None)}  # type: ignore[union-attr]
        for name, owner in owners.items():
            own = getattr(decoder, name)
            if own is owner or own is None or owner is None:
                continue
            if own.shape != owner.shape:
                raise ValueError(f"decoder.{name} {tuple(own.shape)} cannot be a parameter {tuple(owner.shape)}")
            setattr(decoder, name, owner)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model holds, a tied parameter counted once; without nn.Embedding's, if asked for."""
        excluded = {id(m.weight) for m in self.modules() if exclude_embeddings and isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if id(p) not in excluded and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, unless told otherwise, the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put other word embeddings in. A tied decoder keeps those that it has: see `tie_weights`."""
        self.base_model.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary, in models that have one."""
        predictions = getattr(getattr(self, "cls", None), "predictions", None)
        return getattr(predictions, "decoder", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put another projection to the vocabulary in the place of the one there.

        Raises TypeError for a model that has none.
        """
        if self.get_output_embeddings() is None:
            raise TypeError(f"{type(self).__name__} has no projection to the vocabulary")
        predictions: Any = self.cls.predictions  # type: ignore[union-attr]
        predictions.decoder, predictions.bias = new_embeddings, new_embeddings.bias

    def get_position_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.position_embeddings

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Take "sdpa" or "eager", which are one here: the fused kernel computes, maps are there when asked for.

        Raises ValueError for any other name.
        """
        self.config.attn_implementation = attn_implementation

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, keep only what enters each layer and compute the rest again in the backward pass.

        Raises ValueError for other arguments of torch.utils.checkpoint than `use_reentrant`, which is False here
        whatever is asked for (the results are the same, and frozen embeddings need it); and for anything but every
        layer, on the device.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers!r}, offload={offload!r}: every layer is recomputed, and what it needs "
                "stays where it is; leave both out"
            )
        unknown = sorted(set(activation_checkpointing_kwargs or ()) - {"use_reentrant", "preserve_rng_state"})
        if unknown:
            raise ValueError(f"gradient_checkpointing_kwargs {', '.join(unknown)}: only use_reentrant is taken")
        self.base_model.encoder.gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        self.base_model.encoder.gradient_checkpointing = False

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **others: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **others)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Let gradients flow to the embeddings' output although the embeddings are frozen, as adapters need it."""
        self.disable_input_require_grads()
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        self.__dict__["_require_grads_hook"] = hook

    def disable_input_require_grads(self) -> None:
        hook = self.__dict__.pop("_require_grads_hook", None)
        if hook is not None:
            hook.remove()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Cut or extend the vocabulary, with the tied decoder and its bias, whose new numbers are 0.

        The parameters are new objects: give an optimizer made before this call the new ones.

        Args:
            new_num_tokens: None for as many as there are.
            pad_to_multiple_of: round the number up to a multiple of this one.
            mean_resizing: draw new rows around the mean of the old ones, as transformers does (Hewitt 2021,
                "Initializing new word embeddings for pretrained language models"); else as in a new model.

        Returns the word embeddings. Raises ValueError for a number that is no size of a vocabulary.
        """
        old = self.get_input_embeddings()
        size = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if type(pad_to_multiple_of) is not int or pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r}: must be a whole number from 1")
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        config = copy.copy(self.config)
        config.vocab_size = size  # refuses what is not a size
        config.check()
        if size != old.num_embeddings:
            self._resize(old, size, mean_resizing)
        self.config = config
        return old

    @torch.no_grad()
    def _resize(self, embeddings: nn.Embedding, size: int, mean_resizing: bool) -> None:
        old = embeddings.weight
        kept = min(size, len(old))
        new = nn.Embedding(size, old.shape[1], embeddings.padding_idx, device=old.device, dtype=old.dtype)
        if size > kept and mean_resizing:
            new.weight[kept:] = rows_around_the_mean(old, size - kept)
        else:
            self._init_weights(new)
        new.weight[:kept] = old[:kept]
        weight = nn.Parameter(new.weight, old.requires_grad)
        embeddings.weight, embeddings.num_embeddings = weight, size
        decoder = self.get_output_embeddings()
        if decoder is None:
            return
        if decoder.weight is old:
            decoder.weight = weight
        else:  # somebody has untied it
            rows = rows_around_the_mean(decoder.weight, size - kept) if size > kept else decoder.weight[:0]
            decoder.weight = nn.Parameter(torch.cat([decoder.weight[:kept], rows]), decoder.weight.requires_grad)
        if decoder.bias is not None:
            predictions: Any = self.cls.predictions  # type: ignore[union-attr]
            bias = nn.functional.pad(decoder.bias[:kept], (0, size - kept))
            decoder.bias = predictions.bias = nn.Parameter(bias, decoder.bias.requires_grad)
        decoder.out_features = size


def rows_around_the_mean(rows: Tensor, count: int) -> Tensor:
    """`count` new rows drawn from the normal distribution that `rows` have, its covariance shrunk to 1e-9 of theirs.

    rows (n, D) -> (count, D). Where the covariance is not positive definite, the mean itself. Drawn as transformers
    draws them: one seed gives the same bits.
    """
    from torch.distributions import MultivariateNormal, constraints

    values = rows.detach().float()
    mean = values.mean(0)
    covariance = 1e-9 * ((values - mean).T @ (values - mean) / len(values))
    if constraints.positive_definite.check(covariance).all():
        return MultivariateNormal(mean, covariance_matrix=covariance).sample((count,)).to(rows.dtype)
    return mean.expand(count, -1).to(rows.dtype)

"""from_pretrained and save_pretrained, shared by all models."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin
from torch.overrides import TorchFunctionMode

from minibert.weights import checkpoint, hub
from minibert.weights.checkpoint import LoadReport, Stored
from minibert.weights.ties import KeepsTies, aliases

logger = logging.getLogger("minibert")

_WHERE = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "variant")
_NEW = ("newly initialised", "mismatched")  # what stands in no file, or with another shape
_IGNORED_WHEN_SAVING = {"safe_serialization", "token", "save_peft_format", "save_original_format", "save_function",
                        "distributed_checkpoint", "private", "repo_id", "commit_message"}  # fmt: skip
# The encoder's own parameters: a model of somebody else's may have others, but these must come from the file
_ENCODER = re.compile(
    r"(^|\.)(embeddings\.((word|position|token_type)_embeddings|LayerNorm)|encoder\.layer\.\d+\."
    r"(attention\.self\.(query|key|value)|(attention\.)?output\.(dense|LayerNorm)|intermediate\.dense))"
    r"\.(weight|bias)$"
)

T = TypeVar("T", bound="Pretrained")


class Pretrained(KeepsTies):
    """Loading and saving for a module that has a `config`, no buffers, `_init_weights(module)` and `_as_ours`."""

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str]  # the attribute that holds the encoder, in models that have it
    # dtype, device, changes and `where` in other libraries' words -> the first three in ours
    _as_ours: ClassVar[Callable[..., tuple[Any, Any, dict]]]
    new_heads: ClassVar[tuple[str, ...]] = ()  # beginnings of names that may be absent from a checkpoint

    @overload
    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str] | hub.Source | None = ...,
        *,
        output_loading_info: Literal[False] = ...,
        revision: str | None = ...,
        cache_dir: str | os.PathLike[str] | None = ...,
        local_files_only: bool = ...,
        token: str | bool | None = ...,
        dtype: torch.dtype | str | None = ...,
        device: torch.device | str | None = ...,
        **options: Any,
    ) -> T: ...

    @overload
    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str] | hub.Source | None = ...,
        *,
        output_loading_info: Literal[True],
        revision: str | None = ...,
        cache_dir: str | os.PathLike[str] | None = ...,
        local_files_only: bool = ...,
        token: str | bool | None = ...,
        dtype: torch.dtype | str | None = ...,
        device: torch.device | str | None = ...,
        **options: Any,
    ) -> tuple[T, LoadReport]: ...

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike | hub.Source | None = None,
        *,
        config: Any | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **changes: Any,
    ) -> T | tuple[T, LoadReport]:
        """Load a model, in eval mode.

        Args:
            pretrained_model_name_or_path: a directory, a bundled model, or a name on the Hub; `revision`, `cache_dir`,
                `local_files_only`, `token`, `subfolder` and `variant` are explained at `minibert.weights.hub.Source`,
                with the errors. None if both `config` and `state_dict` are given.
            config: instead of the one beside the weights: a config, or where one lies.
            dtype: of the parameters; default that of the file, but float32 for the bundled model, which is in float16
                only to be small ("auto": that of the file, always).
            device: where the parameters go; default the CPU.
            state_dict: tensors by name, instead of those in files.
            ignore_mismatched_sizes: initialise anew what has another shape in the file (the head, for another number
                of labels), instead of an error.
            output_loading_info: return (model, report), the report saying what became of every tensor.
            **changes: fields of the config (`num_labels=3`), or further arguments of the class
                (`add_pooling_layer=False`), or what transformers takes: see `minibert.compat.loading`.

        Raises:
            ValueError: the config or the weights are damaged, contradict each other, or lack a tensor.
            TypeError: an argument that the class does not have.
        """
        where = {
            "revision": revision,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
            "subfolder": subfolder,
            "variant": variant,
        }
        dtype, device, changes = cls._as_ours(dtype, device, changes, where)
        source = _source(pretrained_model_name_or_path, config, state_dict, where)
        if dtype is None and source is not None and source.is_bundled:
            dtype = torch.float32
        dtype, device, name = as_dtype(dtype), as_device(device), "the state dict" if source is None else source.name
        model, report = cls._prepare(source, config, changes, state_dict, ignore_mismatched_sizes)
        if missing := report.named("missing"):
            raise ValueError(f"{name} lacks weights of {cls.__name__}: {', '.join(missing)}{_hint(cls, report)}")
        model._fill(report, dtype, device)
        model.__dict__["_loaded_from"] = name if source is not None else ""
        _notify(cls.__name__, name, report)
        return (model.eval(), report) if output_loading_info else model.eval()

    @classmethod
    def inspect_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike | hub.Source,
        *,
        config: Any | None = None,
        **where_and_changes: Any,
    ) -> tuple[T, LoadReport]:
        """What `from_pretrained` would make of a checkpoint: the model, without memory, and the report.

        Takes the same arguments, except for `dtype`, `device` and `output_loading_info`. Missing weights are in the
        report, and no error.
        """
        where = {name: where_and_changes.pop(name) for name in _WHERE if name in where_and_changes}
        return cls._prepare(hub.as_source(pretrained_model_name_or_path, **where), config, where_and_changes)

    @classmethod
    def _prepare(
        cls: type[T],
        source: hub.Source | None,
        config: Any | None,
        changes: dict[str, Any],
        state_dict: Mapping[str, Tensor] | None = None,
        ignore_mismatched_sizes: bool = False,
    ) -> tuple[T, LoadReport]:
        """Build the model, without memory if it is one of ours, and match its parameters with what is stored."""
        options = {name: changes[name] for name in _options(cls) if name in changes}
        changes = {name: value for name, value in changes.items() if name not in options}
        if isinstance(config, (str, os.PathLike)):
            config = load_config(cls.config_class, hub.as_source(config), changes)
        elif config is None:
            config = load_config(cls.config_class, source, changes)
        elif changes:
            raise TypeError(f"give either config or its fields ({', '.join(changes)}), not both")
        else:
            config = copy.deepcopy(config)  # the caller may go on changing it
        if state_dict is None:
            stored = checkpoint.open_weights(source)
        else:
            stored = _in_memory(state_dict)
        if _is_ours(cls):
            with torch.device("meta"), Uninitialised():
                model = cls(config, **options)  # has sizes only; what is read takes the place of its parameters
        else:  # a constructor may do anything: what it makes and the file does not have must stay as it made it
            model = cls(config, **options)
        report = checkpoint.compare(
            stored,
            {key: _shape(value, stored.get(key)) for key, value in model.state_dict().items()},
            tied=aliases(model),
            new_heads=cls.new_heads,
            prefix=f"{cls.base_model_prefix}." if hasattr(model, cls.base_model_prefix) else "",
            buffers={name for name, _ in model.named_buffers()},
            may_be_new=(lambda name: False) if _is_ours(cls) else (lambda name: not _ENCODER.search(name)),
            ignore_mismatched=ignore_mismatched_sizes,
        )
        return model, report

    def _fill(self, report: LoadReport, dtype: torch.dtype | None, device: torch.device) -> None:
        """Put the stored tensors in the place of those there, and initialise new heads."""
        loaded = [tensor for tensor in report.tensors if tensor.status in ("loaded", "renamed")]
        stored = [tensor.stored for tensor in loaded]
        if dtype is None:  # a file of several types becomes what holds them all
            floats = [tensor.dtype for tensor in stored if tensor.dtype in checkpoint.WEIGHT_DTYPES]
            dtype = functools.reduce(torch.promote_types, floats, floats[0] if floats else torch.float32)
        if device.type == "cpu" and all(tensor.dtype == dtype for tensor in stored):
            data = checkpoint.read(stored)
        else:  # one by one, so that at most one tensor is there twice
            data = [_moved(checkpoint.read([tensor])[0], dtype, device) for tensor in stored]
        state = {tensor.name: value for tensor, value in zip(loaded, data, strict=True)}
        if _is_ours(type(self)):
            self._initialise_modules({key.rpartition(".")[0] for key in report.named(*_NEW)}, dtype, device)
        else:
            self._apply(lambda tensor: _moved(tensor, dtype, device, only=torch.get_default_dtype()))
        self.load_state_dict(state, strict=False, assign=True)

    def _initialise_modules(self, names: set[str], dtype: torch.dtype, device: torch.device) -> None:
        """Give modules on the meta device memory and initial values."""
        tied = aliases(self)
        for name in sorted(names):
            module = self.get_submodule(name)
            keys = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            blank = {key: torch.empty_like(self.get_parameter(key), dtype=dtype, device=device) for key in keys}
            self.load_state_dict({k: v for k, v in blank.items() if k not in tied}, strict=False, assign=True)
            self._init_weights(module)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        **others: Any,
    ) -> None:
        """Write config.json and model.safetensors (above a size: several files and an index), whole or not at all.

        What was in the directory stays until all is on disk; other files there stay for good. A tied parameter is
        stored once. transformers and sentence-transformers open the result.

        Args:
            is_main_process: False to do nothing, in all processes but one of a distributed run.
            state_dict: what to write instead of the model's own.
            push_to_hub: must be False; `huggingface_hub.upload_folder` uploads what was written.
            variant: written into the files' names, model.VARIANT.safetensors.
            **others: what transformers takes besides; without effect here, as only safetensors is written.

        Raises NotADirectoryError if `save_directory` is a file; OSError if it cannot be written, and then nothing has
        changed; ValueError for an argument that cannot be followed; TypeError for one that nobody knows.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True: save to a directory, then upload it with huggingface_hub.upload_folder")
        if unknown := sorted(set(others) - _IGNORED_WHEN_SAVING):
            raise TypeError(f"save_pretrained takes no argument {', '.join(unknown)}")
        if others.get("safe_serialization") is False:
            logger.warning("safe_serialization=False: minibert writes safetensors all the same")
        if not is_main_process:
            return
        tied = aliases(self)
        tensors = self.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor for name, tensor in tensors.items() if name not in tied or tied[name] not in tensors}
        with hub.replacing(save_directory, stale=lambda name: checkpoint.is_shard(name, variant)) as staging:
            write_model(staging, type(self).__name__, self.config, tensors, max_shard_size, variant)


def write_model(
    directory: Path,
    architecture: str,
    config: Any,
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> None:
    """Write config.json and the weights of a model of the class `architecture`."""
    dtypes = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    dtype = str(next(dtypes, torch.float32)).removeprefix("torch.")
    values = {**config.to_dict(), "architectures": [architecture], "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    checkpoint.write(directory, tensors, max_shard_size, variant)


def _source(name: Any, config: Any, state_dict: Any, where: dict[str, Any]) -> hub.Source | None:
    """Where a model comes from, None if config and tensors are given."""
    if torch.get_default_device().type == "meta":
        raise RuntimeError("from_pretrained under torch.device('meta') would lose what it reads: call it outside")
    if name is not None:
        return hub.as_source(name, **where)
    if config is None or state_dict is None:
        raise ValueError("give pretrained_model_name_or_path, or both config and state_dict")
    return None


def _in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors that are in no file, as if they had been read; copies, so that a model never shares them.

    Raises ValueError for what is not a dense tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"state_dict[{name!r}] is a {type(tensor).__name__}, not a dense tensor")
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return {
        name: Stored(Path("the state dict"), name, copy.dtype, tuple(copy.shape), copy.nbytes, in_memory=copy)
        for name, copy in copies.items()
    }


def _is_ours(cls: type) -> bool:
    """Whether the constructor is one of this package's, of which all that it makes is known."""
    return cls.__init__.__module__.partition(".")[0] == __name__.partition(".")[0]


def _shape(tensor: Tensor, stored: Stored | None) -> tuple[int, ...]:
    """Of a tensor of a model, which for one that is still without a size (nn.LazyLinear) is that of what is stored."""
    if isinstance(tensor, UninitializedTensorMixin):
        return () if stored is None else stored.shape
    return tuple(tensor.shape)


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device, only: torch.dtype | None = None) -> Tensor:
    """On the device, and if it is floating point (of the type `only`) in another type."""
    is_cast = tensor.is_floating_point() and only in (None, tensor.dtype)
    return tensor.to(device, dtype if is_cast else tensor.dtype)


class Uninitialised(TorchFunctionMode):
    """Makes operations in place, which is how parameters are initialised, do nothing.

    On the meta device they would compute nothing either, but some are written in Python there, in modules of torch
    whose import takes longer than everything else here.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type by its torch or short name ("bfloat16", "bf16"); None stays None."""
    if dtype is None or dtype == "auto":
        return None
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
    names.update({str(known).removeprefix("torch."): known for known in checkpoint.WEIGHT_DTYPES})
    found = names.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in checkpoint.WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be None or one of {', '.join(names)}")
    return found


def as_device(device: torch.device | str | None, computes: bool = False) -> torch.device:
    """The device, the CPU for None. Raises ValueError for one that torch does not know, that is not here, or that holds
    no numbers though something is to be computed there.
    """
    try:
        device = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    if computes and device.type == "meta":
        raise ValueError("device='meta' holds no numbers to compute with")
    if device.type == "cuda":  # nothing is put there: a process that only starts others must not hold a GPU
        if not torch.cuda.is_available():
            raise ValueError(f"device={str(device)!r}: torch finds no CUDA GPU here; use 'cpu'")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={str(device)!r}: torch finds {torch.cuda.device_count()} CUDA GPUs here")
        return device
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device says in its own way that it is not here
        raise ValueError(f"device={str(device)!r}: {str(error).splitlines()[0]}") from None
    return device


def _options(cls: type) -> list[str]:
    """Arguments of a class beside the config."""
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "config")]


def load_config(config_class: type[Any], source: hub.Source, changes: dict[str, Any]) -> Any:
    """The config of a model, with changed fields. Raises TypeError for a change that is none of its fields."""
    unknown = [name for name in changes if not config_class.knows(name)]
    if unknown:
        raise TypeError(f"from_pretrained takes no argument {', '.join(unknown)} (nor is it a field of the config)")
    return config_class.from_pretrained(source, **changes)


def _hint(cls: type[Pretrained], report: LoadReport) -> str:
    """What may explain missing weights."""
    missing, unexpected = report.named("missing"), report.named("unexpected")
    if "add_pooling_layer" in _options(cls) and all(name.startswith("pooler.") for name in missing):
        return "; if you do not need pooler_output, load with add_pooling_layer=False"
    return f"; it has what no BERT class has: {_shortened(unexpected)}" if unexpected else ""


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _notify(model: str, name: str, report: LoadReport) -> None:
    """At most one line each about a new head and about tensors that no BERT class knows."""
    if other := sorted(report.mismatched_keys):
        given = ", ".join(f"{key} ({old} in the file, {new} here)" for key, old, new in other)
        logger.warning("%s from %s: of another shape, so they start untrained: %s", model, name, given)
    if new := report.named("newly initialised"):
        logger.warning("%s from %s: %s start untrained; train them before use", model, name, ", ".join(new))
    if unexpected := report.named("unexpected"):
        logger.warning("%s from %s: not used, and of no BERT class: %s", model, name, _shortened(unexpected))

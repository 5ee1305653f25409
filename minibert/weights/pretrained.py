"""from_pretrained and save_pretrained, shared by all models."""

from __future__ import annotations

import inspect
import json
import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minibert.weights import checkpoint, hub
from minibert.weights.checkpoint import LoadReport
from minibert.weights.ties import KeepsTies, aliases

logger = logging.getLogger("minibert")

_WHERE = ("revision", "cache_dir", "local_files_only", "token")

T = TypeVar("T", bound="Pretrained")


class Pretrained(KeepsTies):
    """Loading and saving for a module that has a `config`, no buffers, and `_init_weights(module)`."""

    config_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str]  # the attribute that holds the encoder, in models that have it
    new_heads: ClassVar[tuple[str, ...]] = ()  # beginnings of names that may be absent from a checkpoint

    @classmethod
    def from_pretrained(
        cls: type[T],
        name_or_path: str | os.PathLike | hub.Source,
        *,
        config: Any | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        output_loading_info: bool = False,
        **changes: Any,
    ) -> T | tuple[T, LoadReport]:
        """Load a model, in eval mode.

        Args:
            name_or_path: a directory, a bundled model, or a name on the Hub; `revision`, `cache_dir`,
                `local_files_only` and `token` are explained at `minibert.weights.hub.Source`, with the errors.
            config: instead of the one beside the weights.
            dtype: of the parameters; default that of the file, but float32 for the bundled model, which is in float16
                only to be small ("auto": that of the file, always).
            device: where the parameters go; default the CPU.
            output_loading_info: return (model, report), the report saying what became of every tensor.
            **changes: fields of the config (`num_labels=3`), or further arguments of the class
                (`add_pooling_layer=False`).

        Raises:
            ValueError: the config or the weights are damaged, contradict each other, or lack a tensor.
            TypeError: an argument that the class does not have.
        """
        source = hub.as_source(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        if dtype is None and source.is_bundled:
            dtype = torch.float32
        dtype, device = as_dtype(dtype), as_device(device)
        model, report = cls._prepare(source, config, changes)
        if missing := report.named("missing"):
            raise ValueError(f"{source.name} lacks weights of {cls.__name__}: {', '.join(missing)}{_hint(cls, report)}")
        model._fill(report, dtype, device)
        _notify(cls.__name__, source.name, report)
        return (model.eval(), report) if output_loading_info else model.eval()

    @classmethod
    def inspect_pretrained(
        cls: type[T],
        name_or_path: str | os.PathLike | hub.Source,
        *,
        config: Any | None = None,
        **where_and_changes: Any,
    ) -> tuple[T, LoadReport]:
        """What `from_pretrained` would make of a checkpoint: the model, without memory, and the report.

        Takes the same arguments, except for `dtype`, `device` and `output_loading_info`. Missing weights are in the
        report, and no error.
        """
        where = {name: where_and_changes.pop(name) for name in _WHERE if name in where_and_changes}
        return cls._prepare(hub.as_source(name_or_path, **where), config, where_and_changes)

    @classmethod
    def _prepare(cls: type[T], source: hub.Source, config: Any | None, changes: dict[str, Any]) -> tuple[T, LoadReport]:
        """Build the model without memory, and match its parameters with what is stored."""
        options = {name: changes[name] for name in _options(cls) if name in changes}
        changes = {name: value for name, value in changes.items() if name not in options}
        if config is None:
            config = load_config(cls.config_class, source, changes)
        elif changes:
            raise TypeError(f"give either config or its fields ({', '.join(changes)}), not both")
        stored = checkpoint.open_files(source.weights())
        with torch.device("meta"), _Uninitialised():
            model = cls(config, **options)  # has sizes only; what is read takes the place of its parameters
        report = checkpoint.compare(
            stored,
            {key: tuple(value.shape) for key, value in model.state_dict().items()},
            tied=aliases(model),
            new_heads=cls.new_heads,
            prefix=f"{cls.base_model_prefix}." if hasattr(model, cls.base_model_prefix) else "",
        )
        return model, report

    def _fill(self, report: LoadReport, dtype: torch.dtype | None, device: torch.device) -> None:
        """Put the stored tensors in the place of the empty ones, tie, and initialise new heads."""
        loaded = [tensor for tensor in report.tensors if tensor.status in ("loaded", "renamed")]
        stored = [tensor.stored for tensor in loaded]
        if dtype is None:  # a file of several types becomes what holds them all
            dtype = stored[0].dtype
            for other in {tensor.dtype for tensor in stored}:
                dtype = torch.promote_types(dtype, other)
        if device.type == "cpu" and all(tensor.dtype == dtype for tensor in stored):
            data = checkpoint.read(stored)
        else:  # one by one, so that at most one tensor is there twice
            data = [checkpoint.read([tensor])[0].to(device, dtype) for tensor in stored]
        state = {tensor.name: value for tensor, value in zip(loaded, data, strict=True)}
        new = report.named("newly initialised")
        for key in new:
            state[key] = torch.empty(self.get_parameter(key).shape, dtype=dtype, device=device)
        self.load_state_dict(state, strict=False, assign=True)
        for module in {key.rpartition(".")[0]: None for key in new}:
            self._init_weights(self.get_submodule(module))

    def save_pretrained(self, directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and model.safetensors (above a size: several files and an index), whole or not at all.

        What was in the directory stays until all is on disk; other files there stay for good. A tied parameter is
        stored once. transformers and sentence-transformers open the result.

        Raises NotADirectoryError if `directory` is a file; OSError if it cannot be written, and then nothing has
        changed; ValueError for a size that cannot be understood.
        """
        tied = aliases(self)
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name not in tied}
        with hub.replacing(directory, stale=checkpoint.is_shard) as staging:
            write_model(staging, type(self).__name__, self.config, tensors, max_shard_size)


def write_model(
    directory: Path,
    architecture: str,
    config: Any,
    tensors: dict[str, Tensor],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json and the weights of a model of the class `architecture`."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values = {**config.to_dict(), "architectures": [architecture], "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    checkpoint.write(directory, tensors, max_shard_size)


class _Uninitialised(TorchFunctionMode):
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


def as_device(device: torch.device | str | None) -> torch.device:
    """The device, the CPU for None. Raises ValueError for one that torch does not know or that is not here."""
    try:
        device = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch finds no CUDA GPU here; use 'cpu'")
    return device


def _options(cls: type) -> list[str]:
    """Arguments of a class beside the config."""
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "config")]


def load_config(config_class: type[Any], source: hub.Source, changes: dict[str, Any]) -> Any:
    """The config of a model, with changed fields. Raises TypeError for a change that is none of its fields."""
    known = [field.name for field in fields(config_class)]
    unknown = [name for name in changes if name not in known]
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
    if new := report.named("newly initialised"):
        logger.warning("%s from %s: %s start untrained; train them before use", model, name, ", ".join(new))
    if unexpected := report.named("unexpected"):
        logger.warning("%s from %s: not used, and of no BERT class: %s", model, name, _shortened(unexpected))

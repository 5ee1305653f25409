"""The tensors of a checkpoint: rename, compare with what a model needs, report, write. (tensors.py reads them.)"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibert.weights.files import of_variant
from minibert.weights.tensors import ALIGNMENT, DTYPES, Stored, raw_bytes, same_bytes
from minibert.weights.tensors import open_files as open_files
from minibert.weights.tensors import open_weights as open_weights
from minibert.weights.tensors import read as read

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# From names in files to names in models. Wrappers (DistributedDataParallel, torch.compile) put a prefix on all names;
_WRAPPERS = ("module.", "_orig_mod.")
# the first checkpoints call the parameters of a LayerNorm as TensorFlow does;
_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# models with a head hold the encoder under a prefix ("bert."), a bare BertModel has its parts at the top;
_ENCODER_PARTS = ("embeddings.", "encoder.", "pooler.")
# and these are no parameters: older versions stored them, models compute them.
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")

# What a file may hold beyond what one class uses: the parts that other BERT classes have
_OTHER_HEADS = ("cls.", "classifier.", "qa_outputs.", "pooler.", "bert.pooler.")


def rename(name: str, prefix: str) -> str:
    """The name in a model whose encoder is under `prefix` ("bert." or "") of a tensor that a file calls `name`."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    for old, new in _SUFFIXES.items():
        if name == old or name.endswith("." + old):
            name = name[: -len(old)] + new
    part = name.removeprefix("bert.")
    return prefix + part if part.startswith(_ENCODER_PARTS) else name


def rename_all(names: Iterable[str], prefix: str) -> dict[str, str]:
    """From names in a model to names in the file, one to one.

    Raises ValueError if two tensors of the file are the same parameter.
    """
    sources: dict[str, str] = {}
    for name in names:
        if (other := sources.setdefault(rename(name, prefix), name)) != name:
            raise ValueError(f"{other} and {name} are the same parameter, {rename(name, prefix)}")
    return sources


def shards(tensors: Mapping[str, Tensor], max_size: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in order: one file if they fit, else model-00001-of-00002.safetensors ...

    A tensor larger than `max_size` bytes has a file of its own.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def is_shard(name: str, variant: str | None = None) -> bool:
    """Whether a file's name is one that `write` gives."""
    part = "" if variant is None else re.escape("." + variant)
    pattern = rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json"
    return bool(re.fullmatch(pattern, name))


def write(
    directory: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str = "5GB", variant: str | None = None
) -> None:
    """Write tensors to safetensors files, with an index if there is more than one.

    Raises ValueError for a size that cannot be understood.
    """
    files = shards(tensors, as_bytes(max_shard_size))
    files = {of_variant(file, variant): names for file, names in files.items()}
    for file, names in files.items():
        write_file(directory / file, {name: tensors[name] for name in names})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / of_variant("model.safetensors.index.json", variant)).write_text(text, encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file whose tensors can stay memory-mapped.

    safetensors' own writer lets the data start at any multiple of 8 bytes and sorts it by name. Here it starts at a
    multiple of 64, and the few tensors whose size is not one come last, so that all but those lie aligned.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    ordered = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT != 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name in ordered:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(raw_bytes(tensors[name].detach().cpu()))


def as_bytes(size: int | str) -> int:
    """A size in bytes, also written as "500MB" or "5GB" (powers of 1000).

    Raises ValueError for anything else.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]B)", text)
    number = int(text) if text.isdecimal() else int(float(match[1]) * units[match[2]]) if match else 0
    if not number:
        raise ValueError(f"max_shard_size={size!r}: must be a number of bytes, or a string such as '500MB' or '5GB'")
    return number


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor. `status` is one of:

    loaded; renamed (its name in the file is `source`); tied alias (the same parameter as another, stored or not);
    expected extra (of another BERT class, or a buffer that is computed); unexpected; newly initialised; missing;
    mismatched (of another shape in the file, and so initialised anew).
    """

    name: str
    status: str
    shape: tuple[int, ...]
    stored: Stored | None = None

    @property
    def source(self) -> str | None:
        return None if self.stored is None else self.stored.name

    @property
    def dtype(self) -> torch.dtype | str | None:
        return None if self.stored is None else self.stored.dtype

    @property
    def sha256(self) -> str | None:
        """Of the bytes in the file, which is read for it."""
        return None if self.stored is None else self.stored.sha256


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a model and of its files.

    `missing_keys`, `unexpected_keys` and `mismatched_keys`, attributes and keys, are as in transformers.
    """

    tensors: tuple[TensorReport, ...]

    def named(self, *statuses: str) -> list[str]:
        """Names of the tensors with one of the given statuses."""
        return [tensor.name for tensor in self.tensors if tensor.status in statuses]

    @property
    def missing_keys(self) -> set[str]:
        return set(self.named("newly initialised", "missing"))

    @property
    def unexpected_keys(self) -> set[str]:
        return set(self.named("expected extra", "unexpected"))

    @property
    def mismatched_keys(self) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """(name, shape in the file, shape here)."""
        mismatched = [tensor for tensor in self.tensors if tensor.status == "mismatched"]
        return {(tensor.name, tensor.stored.shape, tensor.shape) for tensor in mismatched if tensor.stored is not None}

    def keys(self) -> list[str]:
        return ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"]

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{key!r}: a report has {', '.join(self.keys())}")
        return [] if key == "error_msgs" else getattr(self, key)  # what would be one is raised here

    def to_dict(self) -> list[dict[str, Any]]:
        """The manifest, ready for JSON; reads the files for the hashes."""
        return [
            {
                "name": tensor.name,
                "status": tensor.status,
                "source": tensor.source,
                "file": None if tensor.stored is None else tensor.stored.file.name,
                "shape": list(tensor.shape),
                "dtype": None if tensor.dtype is None else str(tensor.dtype).removeprefix("torch."),
                "sha256": tensor.sha256,
            }
            for tensor in self.tensors
        ]


def compare(
    stored: Mapping[str, Stored],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    tied: Mapping[str, str],
    new_heads: Collection[str],
    prefix: str,
    buffers: Collection[str] = (),
    may_be_new: Callable[[str], bool] = lambda name: False,
    ignore_mismatched: bool = False,
) -> LoadReport:
    """Match the tensors of a checkpoint with the parameters of a model.

    Args:
        shapes: of the model's state dict.
        tied: alias -> owner, names in the model.
        new_heads: beginnings of names; a head that is wholly absent may be newly initialised.
        prefix: of the encoder in the model.
        buffers: names of tensors that may have any type.
        may_be_new: whether a tensor may be absent, beside those of `new_heads`.
        ignore_mismatched: take what has another shape for absent, instead of an error.

    Raises ValueError listing every tensor of the wrong shape or type, or a tie that the file contradicts.
    """
    names = rename_all(stored, prefix)
    found = {name: stored[source] for name, source in names.items()}
    aliases = {alias: found.pop(alias, None) for alias in tied}
    for alias, owner in tied.items():
        if owner not in found and aliases[alias] is not None:  # stored under its other name only
            found[owner] = aliases[alias]
            aliases[alias] = None
    parameters = {name: shape for name, shape in shapes.items() if name not in tied}
    mismatched = {name for name in parameters if name in found and found[name].shape != parameters[name]}
    mismatched = mismatched if ignore_mismatched else set()
    _check_fit({name: found[name] for name in parameters if name in found.keys() - mismatched}, parameters, buffers)
    for alias, owner in tied.items():
        _check_tie(aliases[alias], found.get(owner))
    absent = tuple(head for head in new_heads if not any(name.startswith(head) for name in parameters.keys() & found))
    reports = []
    for name, shape in shapes.items():
        if name in tied:
            reports.append(TensorReport(name, "tied alias", shape, aliases[name]))
        elif name in mismatched:
            reports.append(TensorReport(name, "mismatched", shape, found[name]))
        elif name in found:
            status = "loaded" if found[name].name == name else "renamed"
            reports.append(TensorReport(name, status, shape, found[name]))
        else:
            status = "newly initialised" if name.startswith(absent) or may_be_new(name) else "missing"
            reports.append(TensorReport(name, status, shape))
    for name, extra in found.items():
        if name not in parameters:
            expected = name.startswith(_OTHER_HEADS) or is_buffer(name)
            status = "expected extra" if expected else "unexpected"
            reports.append(TensorReport(name, status, extra.shape, extra))
    return LoadReport(tuple(reports))


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that older versions stored, but that is computed and no parameter."""
    return name.endswith(_BUFFERS)


def _check_fit(found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], buffers: Collection[str]) -> None:
    wrong = [
        f"{tensor.name} is {tensor.shape} of {tensor.dtype}, not {shapes[name]} of a floating-point type"
        for name, tensor in found.items()
        if tensor.shape != shapes[name] or (tensor.dtype not in WEIGHT_DTYPES and name not in buffers)
    ]
    if wrong:
        file = next(iter(found.values())).file
        hint = "; ignore_mismatched_sizes=True initialises anew what has another shape"
        raise ValueError(f"{file} does not fit the model that the config describes: {'; '.join(wrong)}{hint}")


def _check_tie(alias: Stored | None, owner: Stored | None) -> None:
    if alias is not None and owner is not None and not same_bytes(alias, owner):
        raise ValueError(f"{alias.file}: {alias.name} differs from {owner.name}, but in BERT they are one parameter")

"""Tensors on disk: safetensors files and PyTorch's pickled ones are opened, checked and read.

Reading never runs code, and results do not depend on how a file is laid out: what stays memory-mapped lies at a
multiple of 64 bytes, as torch's own memory does, and everything else is copied to such an address (kernels may round
differently elsewhere).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from minibert.weights import hub
from minibert.weights.files import refuse_pointer

ALIGNMENT = 64  # bytes; that of memory from torch's CPU allocator
_CHUNK = 16 << 20  # bytes that one thread reads at a time
_ATTEMPTS = 10  # to open files that others are replacing

# safetensors' names of the types that occur in BERT checkpoints
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


class OpenFile:
    """A file as it was when it was opened: what a save puts in its place later is another file.

    It is opened once and mapped once, privately: pages that are written to (training) are copied, the file never
    changes. Raises OSError if it cannot be opened, ValueError if it is empty.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            self._status = os.fstat(file.fileno())
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @property
    def size(self) -> int:
        return self._status.st_size

    def is_current(self) -> bool:
        """Whether it is what its path names now, unchanged."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return hub.identity(now) == hub.identity(self._status)

    def bytes(self, offset: int, count: int) -> np.ndarray:
        """A view of the mapping. Raises OSError if the file was made shorter in place, before that crashes us."""
        if self.mapping.size() < offset + count:
            raise OSError(f"{self.path} ended while it was read: another process has changed it")
        return np.frombuffer(self.mapping, np.uint8, count, offset)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: at `offset` in a safetensors file, or in memory, after a .bin file has been read."""

    file: Path
    name: str
    dtype: torch.dtype | str  # a string where torch or minibert does not know the type
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0
    in_memory: Tensor | None = None
    opened: OpenFile | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tensor's bytes as stored, little-endian and in row-major order."""
        raw = self if self.in_memory is not None else replace(self, dtype=torch.uint8, shape=(self.nbytes,))
        return hashlib.sha256(raw_bytes(read([raw])[0])).hexdigest()


def open_weights(source: hub.Source) -> dict[str, Stored]:
    """The tensors of a model, all of one save, even if another process is saving there at the moment.

    Raises what `Source.weights` and `open_files` raise; `hub.Replaced` if another file of the model that was read
    before, such as its config, is not that of these weights, or if others save there all the time.
    """
    for _ in range(_ATTEMPTS):
        try:
            tensors = open_files(source.weights())
        except (FileNotFoundError, hub.Replaced):
            if not source.settle():
                raise
        else:
            # Settled now, and every file the one that has its name now: so all were of the state that is settled
            if not source.settle() and all(file.is_current() for file in {t.opened for t in tensors.values()} if file):
                source.check_unchanged()
                return tensors
    raise hub.Replaced(f"{source.name} is written to by another process again and again: try later")


def open_files(paths: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of one checkpoint's files, by name in the file. The data of safetensors files is not read yet.

    Raises ValueError naming the file if it is damaged, a pointer of Git LFS, holds anything but tensors, or repeats a
    name; OSError if it cannot be opened.
    """
    tensors: dict[str, Stored] = {}
    for path in paths:
        refuse_pointer(path)
        for stored in _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path):
            if stored.name in tensors:
                raise ValueError(f"{stored.name} is in both {tensors[stored.name].file} and {path}")
            tensors[stored.name] = stored
    return tensors


def _open_safetensors(path: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = OpenFile(path)
        with safe_open(path, framework="pt"):  # checks the whole header: sizes, overlaps, gaps, range
            pass
        if not opened.is_current():
            raise hub.Replaced(f"{path} was replaced while it was opened: open it again")
        length = int.from_bytes(opened.mapping[:8], "little")
        header = json.loads(opened.mapping[8 : 8 + length])
        header.pop("__metadata__", None)
        return [_locate(opened, name, entry, 8 + length) for name, entry in header.items()]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None


def _locate(opened: OpenFile, name: str, entry: dict[str, Any], start: int) -> Stored:
    begin, end = entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"], entry["dtype"])
    shape = tuple(entry["shape"])
    wrong_size = isinstance(dtype, torch.dtype) and math.prod(shape) * dtype.itemsize != end - begin
    if wrong_size or not 0 <= begin <= end <= opened.size - start:
        raise ValueError(f"{name} {shape} cannot lie at bytes {begin} to {end}")
    return Stored(opened.path, name, dtype, shape, end - begin, start + begin, opened=opened)


def _open_pickle(path: Path) -> list[Stored]:
    try:
        opened = OpenFile(path)
        is_zip = opened.mapping[:4] == b"PK\x03\x04"  # since torch 1.6; it can be mapped
        if is_zip:
            _check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on storage types that old files use
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        if not is_zip:
            _check_storages(path)
        if not opened.is_current():
            raise hub.Replaced(f"{path} was replaced while it was opened: open it again")
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of any type: a damaged pickle can make torch do anything but run code
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} asks for {unsafe[1]}, and a pickle that holds more than tensors can run any code; it was not "
                "opened. If you trust it: torch.load(path, weights_only=False), and save what it holds with "
                "safetensors.torch.save_file"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint: {reason}") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # as training scripts save it, beside their own state
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not the tensors of a model by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path}: {name!r} is a {type(tensor).__name__}, not a dense tensor")
    return [
        Stored(path, name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, 0, tensor.detach(), opened)
        for name, tensor in content.items()
    ]


def _check_zip(path: Path) -> None:
    """Compare the content of an archive with its checksums, which torch.load does not, and refuse compression.

    Raises zipfile.BadZipFile and others.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save never does")
            if entry.CRC:  # torch can be told to leave it out
                with archive.open(entry) as content:
                    while content.read(1 << 20):
                        pass


class _Storages(pickle.Unpickler):
    """Notes which storages a pickle asks for. Nothing that it names is looked up, so nothing of it can run."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.keys: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (dict,), {"__init__": lambda *_: None})

    def persistent_load(self, pid: Any) -> None:
        self.keys.add(pid[2])


def _check_storages(path: Path) -> None:
    """Raise ValueError if a file from before torch 1.6 refers to data that it does not hold.

    torch.load leaves such tensors as it found the memory. The file is a magic number, two other values, the content,
    a list of keys and then the data of each key.
    """
    with open(path, "rb") as file:
        for _ in range(3):
            _Storages(file).load()
        content = _Storages(file)
        content.load()
        if content.keys != set(_Storages(file).load()):
            raise ValueError("it refers to data that it does not hold")


def read(tensors: Collection[Stored]) -> list[Tensor]:
    """The data of tensors, each at a multiple of 64 bytes: mapped from the file where it lies so, else copied.

    Raises ValueError naming file and tensor for a type that torch or minibert does not know; OSError if the file
    cannot be read.
    """
    for stored in tensors:
        if not isinstance(stored.dtype, torch.dtype):
            raise ValueError(f"{stored.file}: {stored.name} is of type {stored.dtype}, which minibert does not read")
    results = [_mapped(stored) for stored in tensors]
    absent = [(i, stored) for i, stored in enumerate(tensors) if results[i] is None]
    for (i, _), copy in zip(absent, _copy([stored for _, stored in absent]), strict=True):
        results[i] = copy
    return [tensor for tensor in results if tensor is not None]


def _mapped(stored: Stored) -> Tensor | None:
    """The data where they lie, or None if they lie at an address that will not do."""
    if stored.in_memory is not None:
        return _aligned(stored.in_memory)
    if stored.offset % ALIGNMENT or not stored.nbytes:
        return None
    return _view(stored.opened.bytes(stored.offset, stored.nbytes), stored)


def _copy(tensors: list[Stored]) -> list[Tensor]:
    """Read tensors into fresh memory, each into a piece of its own: it is given back when that tensor is not needed."""
    places = [_empty(stored.nbytes) for stored in tensors]
    jobs = [
        (place[begin : begin + _CHUNK], stored, begin)
        for stored, place in zip(tensors, places, strict=True)
        for begin in range(0, stored.nbytes, _CHUNK)
    ]
    if jobs:
        with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
            list(pool.map(_read_into, jobs))
    return [_view(place, stored) for place, stored in zip(places, tensors, strict=True)]


def _empty(nbytes: int) -> np.ndarray:
    """Aligned memory. NumPy asks for huge pages, which halves the time: most of it goes into touching new memory."""
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def _read_into(job: tuple[np.ndarray, Stored, int]) -> None:
    place, stored, begin = job
    np.copyto(place, stored.opened.bytes(stored.offset + begin, len(place)))


def _view(data: np.ndarray, stored: Stored) -> Tensor:
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    return torch.from_numpy(data).view(stored.dtype).view(stored.shape)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor as it would lie on disk, row by row."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def same_bytes(a: Stored, b: Stored) -> bool:
    """Whether two tensors are equal to the bit, NaNs included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = read([a, b])
    return first.data_ptr() == second.data_ptr() or np.array_equal(raw_bytes(first), raw_bytes(second))

"""The one recipe for writing a file: whatever happens, and when, it is what it was or what it shall be, whole."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write to, which takes the place of `path` in one step when the block ends well.

    It lies in the same directory under a name of its own, so that two writers never share it, and is on disk before it
    counts: a crash, a full disk or a power cut leave the old file or the new one. If the block fails, the old file is
    as it was. A symbolic link stays one, and what it points to is replaced. A pipe or a device is written to directly.

    Raises OSError, which names `path`, where it or its directory cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists() and not target.is_file():
        with naming(path):
            yield target
        return
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    partial.touch(exist_ok=False)  # with the permissions that any new file gets
    try:
        with suppress(FileNotFoundError):
            shutil.copymode(target, partial)
        with naming(path):
            yield partial
            sync(partial)
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    sync(target.parent)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Make `content` the content of a file, text in UTF-8; `replacing` says what a crash leaves."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Have errors say `path` that say no file: writing to an open one does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def locked(path: str | os.PathLike[str], seconds: float = -1) -> Iterator[None]:
    """Be the only one, of all processes and threads, within this lock file, which is gone afterwards.

    Waits for whoever is, or raises filelock.Timeout after so many seconds.
    """
    from filelock import FileLock

    with FileLock(path).acquire(timeout=seconds):
        try:
            yield
        finally:
            with suppress(OSError):  # who waits for this file sees that it is gone, and makes one anew
                os.unlink(path)


def remove_partials(directory: str | os.PathLike[str]) -> None:
    """Remove what killed processes left of files that they were writing; for whoever is alone in the directory."""
    for name in os.listdir(directory):
        if _PARTIAL.fullmatch(name):
            Path(directory, name).unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Force a file's or a directory's content to disk."""
    if os.name == "nt":
        return  # a directory cannot be opened there, nor a file forced to disk that was opened for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_pointer(path: str | os.PathLike[str]) -> None:
    """Raise ValueError for the pointer that Git LFS leaves where a large file was not fetched."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")


def of_variant(name: str, variant: str | None) -> str:
    """The name that a file has for a variant: the last dot but of an index, which ends in .json, begins its suffix."""
    if variant is None:
        return name
    stem, dot, suffix = name.rpartition(".")
    if "-of-" in stem:  # model.fp16-00001-of-00002.safetensors
        first, dash, numbers = stem.partition("-")
        return f"{first}.{variant}{dash}{numbers}{dot}{suffix}"
    return f"{stem}.{variant}{dot}{suffix}"

"""Text files to blocks of whole documents: plain, .gz or .xz, in constant memory; errors name the file and line."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from minibert.pretraining.sentences import split_sentences
from minibert.weights.files import refuse_pointer

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")
_HEAD = 1 << 16  # bytes of a file that are looked at before any work begins


@dataclass(frozen=True)
class Block:
    """A piece of a text file that ends where a document ends."""

    path: Path
    first_line: int
    data: bytes

    def text(self) -> str:
        """Raises ValueError, naming file and line, for what is not text in UTF-8."""
        if b"\0" in self.data:
            raise self._error(self.data.index(b"\0"), "a NUL byte: the file is binary, or UTF-16")
        try:
            return self.data.decode("utf-8-sig" if self.first_line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(error.start, f"byte 0x{self.data[error.start]:02x} is not UTF-8") from None

    def _error(self, position: int, problem: str) -> ValueError:
        line = self.first_line + self.data.count(b"\n", 0, position)
        return ValueError(f"{self.path}, line {line}: {problem}; the corpus must be UTF-8 text")


def check_texts(files: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The paths, after a look at the beginning of each file.

    Raises FileNotFoundError for what is no file, ValueError for one that is empty, damaged, a pointer of Git LFS, or
    whose beginning is not UTF-8.
    """
    if isinstance(files, (str, os.PathLike)):
        files = [files]
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("files is empty: name at least one text file (.txt, .txt.gz or .txt.xz)")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        refuse_pointer(path)
        with _opened(path) as (stream, _):
            head = _read(stream, _HEAD, path)
        Block(path, 1, head if len(head) < _HEAD else head[: head.rfind(b"\n") + 1]).text()
    return paths


def blocks(paths: list[Path], size: int, progress: tqdm | None = None) -> Iterator[Block]:
    """Cut files into blocks of about `size` bytes, at blank lines; a document of 8 blocks or more at a line's end."""
    for path in paths:
        first_line, rest, done = 1, b"", 0
        with _opened(path) as (stream, raw):
            while data := _read(stream, size, path):
                rest += data
                end = _document_end(rest, size)
                if end:
                    if rest[:end].strip():
                        yield Block(path, first_line, rest[:end])
                    first_line += rest.count(b"\n", 0, end)
                    rest = rest[end:]
                if progress is not None:
                    progress.update(raw.tell() - done)
                    done = raw.tell()
        if rest.strip():
            yield Block(path, first_line, rest)


def documents(text: str, prose: bool) -> Iterator[list[str]]:
    """The sentences of each document of a text: a line each, or found by rules in running English prose."""
    lines: list[str] = []
    for line in chain(text.split("\n"), [""]):
        line = line.strip()
        if line:
            lines.append(line)
        elif lines:
            yield split_sentences(" ".join(lines)) if prose else lines
            lines = []


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text of a file, and the file itself, which tells how far the reading is."""
    unpacked = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
    with path.open("rb") as raw, unpacked(raw) if unpacked else nullcontext(raw) as stream:
        yield stream, raw


def _read(stream: BinaryIO, size: int, path: Path) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _document_end(data: bytes, size: int) -> int:
    """Where the last whole document in `data` ends, 0 if none does. One of 8 blocks or more is cut at a line."""
    end = 0
    for match in _BLANK_LINE.finditer(data, max(0, len(data) - 2 * size)):
        end = match.end()
    if not end and len(data) >= 8 * size:
        end = data.rfind(b"\n") + 1
    return end

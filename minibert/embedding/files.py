"""A file of texts, one a line, to a .npy of vectors: in constant memory, and resumed where it was interrupted."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np
from torch import Tensor
from tqdm import tqdm

from minibert.checks import check_count
from minibert.embedding.encoder import SentenceEncoder
from minibert.embedding.options import Options
from minibert.embedding.texts import CHUNK_CHARACTERS
from minibert.terminal import PACKED, STANDARD_INPUT, opened, text_of
from minibert.weights import files as disk

_LINES = 256  # at once; more is no faster, and they are what an interruption costs
_SAVE_EVERY = 1.0  # seconds; a kill costs these too
_HEADER = 128  # bytes of a .npy's header; numpy leaves room in it for any number of rows
_READ = 1 << 20


@dataclass
class Progress:
    """What has been done: so many lines, which are the first `offset` bytes of the input, with this hash."""

    lines: int = 0
    offset: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    truncated: int = 0
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Embedded:
    """texts: rows of the result. truncated: how many texts were longer than max_seq_length tokens, and cut. resumed:
    how many rows an earlier run had computed.
    """

    output: str
    texts: int
    dimension: int
    truncated: int
    max_seq_length: int
    resumed: int


def embed_file(
    encoder: SentenceEncoder,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    show_progress_bar: bool | None = None,
    processes: int | None = None,
    **options: Any,
) -> Embedded:
    """Embed each line of a file of UTF-8 into a float32 array (lines, D) in the file `output`.

    source: a path, unpacked if it ends in .gz or .xz, or "-" for standard input.
    Row i is of line i; an empty line is an empty text. `output` appears when all is done, and until then what was
    there stays. Rows are kept in OUTPUT.partial, itself a valid .npy of what is finished, with its state in
    OUTPUT.progress: after Ctrl-C, a kill or an error the same call goes on from there. Standard input cannot be
    resumed; its finished rows stay in OUTPUT.partial.

    options are those of `SentenceEncoder.encode` that change vectors: prompt_name, prompt, normalize, truncate_dim;
    and batch_size. processes: spread the work over so many new ones, as there.

    Raises ValueError for a line that is not UTF-8 or has a carriage return in it, if the unfinished work is of another
    input or other settings, and if another process writes to `output`; OSError for files that cannot be read or
    written.
    """
    chosen = encoder.options(**options)
    if processes is not None:
        check_count("processes", processes)
    output, resumable = Path(output), os.fspath(source) != STANDARD_INPUT
    if output.is_dir() or (resumable and output.exists() and output.samefile(source)):
        raise ValueError(f"output {output} is {'a directory' if output.is_dir() else 'the input'}: name another file")
    if output.exists() and not output.is_file():  # a device, say, whose place the finished file would take
        raise ValueError(f"output {output} is no ordinary file: name another")
    width = encoder.width(chosen.truncate_dim)
    with _alone(output), opened(os.fspath(source)) as stream:
        begin = _begin(output, width, _settings(encoder, chosen), resumable)
        digest = _skip(stream, begin, output)
        plain = resumable and Path(source).suffix.lower() not in PACKED
        size = os.fstat(stream.fileno()).st_size if plain else None
        with (
            _Rows(output, width, begin, resumable) as rows,
            _bar(size, begin, show_progress_bar) as bar,
            closing(_embedded(encoder, _chunks(stream, begin.lines), chosen, processes)) as results,
        ):
            for vectors, cut, read in results:
                digest.update(read)
                rows.append(vectors.float().cpu().numpy(), len(read), digest.hexdigest(), cut)
                bar.update(len(vectors) if size is None else len(read))
                bar.set_postfix(texts=rows.progress.lines, refresh=False)
        rows.finish()
    done = rows.progress
    return Embedded(str(output), done.lines, width, done.truncated, encoder.max_seq_length, begin.lines)


def _embedded(
    encoder: SentenceEncoder, chunks: Iterator[tuple[list[str], bytes]], options: Options, processes: int | None
) -> Iterator[tuple[Tensor, int, bytes]]:
    """The vectors of each chunk, how many of its texts were cut, and the bytes that it was read from."""
    if processes is None:
        for texts, read in chunks:
            yield *encoder.embed(texts, options), read
        return
    waiting: deque[bytes] = deque()

    def parts() -> Iterator[list[str]]:
        for texts, read in chunks:
            waiting.append(read)
            yield texts

    with encoder.start_multi_process_pool([encoder.device] * processes) as pool:
        for vectors, cut in pool.embed(parts(), options):
            yield vectors, cut, waiting.popleft()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Be the only process that writes to an output. Raises ValueError where another one does."""
    target = _target(output)
    if not target.parent.is_dir():  # the lock would make one
        raise FileNotFoundError(f"{output}: there is no directory {target.parent}")
    with ExitStack() as stack:
        try:
            stack.enter_context(disk.locked(target.with_name(f".{target.name}.lock"), 0))
        except filelock.Timeout:
            said = f"{output} is being written by another process: wait for it, or name another output"
            raise ValueError(said) from None
        yield


def _begin(output: Path, width: int, settings: dict[str, Any], resumable: bool) -> Progress:
    """Where an earlier run of the same work stopped, else the beginning."""
    rows, told = partial(output), state(output)
    if not (told.exists() and rows.exists()):
        return Progress(settings=settings)
    if not resumable:
        raise ValueError(f"{rows} is unfinished work on a file: finish or delete it, with {told}")
    try:
        progress = Progress(**json.loads(told.read_bytes()))
        differing = [name for name in settings if settings[name] != progress.settings[name]]
        if not differing:
            _check_rows(rows, progress.lines, width)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{told} is damaged ({error!r}): delete it to begin anew") from None
    if differing:
        raise ValueError(
            f"{rows} was begun with another {' and '.join(differing)}: delete {told} to begin anew, or name "
            "another output"
        )
    return progress


def _check_rows(rows: Path, lines: int, width: int) -> None:
    """Raise ValueError unless a file holds these finished rows, each of them whole."""
    with rows.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        begins = file.tell()
    size = rows.stat().st_size
    if dtype != np.dtype("<f4") or fortran_order or begins != _HEADER or len(shape) != 2 or shape[1] != width:
        raise ValueError(f"{rows} does not hold rows of {width} numbers")
    if shape[0] < lines or size < _HEADER + 4 * width * lines:
        whole = max(0, (size - _HEADER) // (4 * width))
        raise ValueError(f"{rows} was cut: it holds {min(whole, shape[0])} of {lines} rows")


def _settings(encoder: SentenceEncoder, options: Options) -> dict[str, Any]:
    """What decides over the vectors. The model goes by its weights, wherever they lie."""
    tokenizer = [repr(encoder.tokenizer), sorted(encoder.tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(tokenizer).encode())
    for tensor in (*encoder.plain.state_dict().values(), *encoder.after.state_dict().values()):
        digest.update(tensor.float().cpu().contiguous().numpy())
    return {
        "model": digest.hexdigest(),
        "dtype": str(getattr(encoder.model, "plan", encoder.plain).dtype),
        "pooling": f"{encoder.pooling} {encoder.after}",
        "max_seq_length": encoder.max_seq_length,
        "prompt": options.prompt,
        "normalize": options.normalize,
        "truncate_dim": options.truncate_dim,
    }


def partial(output: str | os.PathLike[str]) -> Path:
    """Where the rows are until all is done."""
    output = _target(output)
    return output.with_name(f"{output.name}.partial")


def state(output: str | os.PathLike[str]) -> Path:
    """Where it is said how far they go."""
    output = _target(output)
    return output.with_name(f"{output.name}.progress")


def _target(output: str | os.PathLike[str]) -> Path:
    """The file itself: a symbolic link stays one, and what it points to is replaced, on its own file system."""
    return Path(os.path.realpath(output) if os.path.islink(output) else output)


def _skip(stream: BinaryIO, progress: Progress, output: Path) -> Any:
    """Read over what is done, and return its hash to go on with. ValueError if it is not what was read then."""
    digest, left = hashlib.sha256(), progress.offset
    while left and (data := stream.read(min(left, _READ))):
        digest.update(data)
        left -= len(data)
    if digest.hexdigest() != progress.sha256:
        raise ValueError(
            f"the first {progress.lines} lines of the input are not those that {partial(output)} was made from: "
            f"delete {state(output)} to begin anew, or name another output"
        )
    return digest


def _chunks(stream: BinaryIO, done: int) -> Iterator[tuple[list[str], bytes]]:
    """Lists of texts, and the bytes that they were read from. What is before a bad line is given before the error."""
    texts: list[str] = []
    read, number = bytearray(), done
    try:
        for number, line in enumerate(stream, done + 1):
            texts.append(text_of(line, number))
            read += line
            if len(texts) == _LINES or len(read) >= CHUNK_CHARACTERS:
                yield texts, bytes(read)
                texts, read = [], bytearray()
    except (ValueError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        if texts:
            yield texts, bytes(read)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"what is packed is damaged after line {number}: {error}") from error
    if texts:
        yield texts, bytes(read)


def _bar(size: int | None, progress: Progress, show: bool | None) -> tqdm:
    disable = None if show is None else not show
    if size is None:
        return tqdm(desc="embed", unit="text", initial=progress.lines, disable=disable)
    kind: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return tqdm(desc="embed", total=size, initial=progress.offset, disable=disable, **kind)


class _Rows:
    """OUTPUT.partial, with OUTPUT.progress. A row counts when the state says so; what lies behind is overwritten."""

    def __init__(self, output: Path, width: int, progress: Progress, resumable: bool):
        self.output, self.width, self.progress, self.resumable = output, width, progress, resumable

    def __enter__(self) -> _Rows:
        self.file = open(partial(self.output), "r+b" if self.progress.lines else "wb")
        self.save()
        return self

    def _end(self) -> int:
        return _HEADER + 4 * self.width * self.progress.lines

    def append(self, rows: np.ndarray, read: int, sha256: str, truncated: int) -> None:
        old = self.progress
        with disk.naming(partial(self.output)):
            self.file.seek(self._end())
            self.file.write(np.ascontiguousarray(rows, "<f4"))
        # In one assignment, which Ctrl-C cannot tear apart
        self.progress = Progress(
            old.lines + len(rows), old.offset + read, sha256, old.truncated + truncated, old.settings
        )
        if time.monotonic() - self.saved > _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Rows first, and when they are on disk what says that they are there."""
        shape = (self.progress.lines, self.width)
        with disk.naming(partial(self.output)):
            self.file.seek(0)
            np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            self.file.truncate(self._end())
            self.file.flush()
            os.fsync(self.file.fileno())
        if self.resumable:
            disk.write(state(self.output), json.dumps(asdict(self.progress)))
        self.saved = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # On a full disk neither works; why the work stopped is told already then, and what the state says is there
        with suppress(OSError) if kind is not None else nullcontext():
            try:
                self.save()
            finally:
                self.file.close()

    def finish(self) -> None:
        target = _target(self.output)
        os.replace(partial(self.output), target)
        disk.sync(target.parent)
        state(self.output).unlink(missing_ok=True)

"""A file of texts, one a line, to a .npy of vectors: in constant memory, and resumed where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from minibert.embedding.encoder import Options, SentenceEncoder
from minibert.embedding.texts import CHUNK_CHARACTERS

STANDARD_INPUT = "-"
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
    how many rows an earlier run had computed."""

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
    **options: Any,
) -> Embedded:
    """Embed each line of `source` (UTF-8; "-" for standard input) into a float32 array (lines, D) in the file `output`.

    Row i is of line i; an empty line is an empty text. `output` appears when all is done, and until then what was
    there stays. Rows are kept in OUTPUT.partial, itself a valid .npy of what is finished, with its state in
    OUTPUT.progress: after Ctrl-C, a kill or an error the same call goes on from there. Standard input cannot be
    resumed; its finished rows stay in OUTPUT.partial.

    options are those of `SentenceEncoder.encode` that change vectors: prompt_name, prompt, normalize, truncate_dim;
    and batch_size.

    Raises ValueError for a line that is not UTF-8, and if the unfinished work is of another input or other settings;
    OSError for files that cannot be read or written.
    """
    chosen = encoder.options(**options)
    output, resumable = Path(output), os.fspath(source) != STANDARD_INPUT
    if output.is_dir() or (resumable and output.exists() and output.samefile(source)):
        raise ValueError(f"output {output} is {'a directory' if output.is_dir() else 'the input'}: name another file")
    width = encoder.width(chosen.truncate_dim)
    begin = _begin(output, _settings(encoder, chosen), resumable)
    with _opened(source) as stream:
        digest = _skip(stream, begin, output)
        size = os.fstat(stream.fileno()).st_size if resumable else None
        with _Rows(output, width, begin, resumable) as rows, _bar(size, begin, show_progress_bar) as bar:
            for texts, read in _chunks(stream, begin.lines):
                vectors, cut = encoder.embed(texts, chosen)
                digest.update(read)
                rows.append(vectors.float().cpu().numpy(), len(read), digest.hexdigest(), cut)
                bar.update(len(read) if resumable else len(texts))
                bar.set_postfix(texts=rows.progress.lines, refresh=False)
    rows.finish()
    done = rows.progress
    return Embedded(str(output), done.lines, width, done.truncated, encoder.max_seq_length, begin.lines)


def run(
    source: str,
    output: str,
    *,
    model: str,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    **options: Any,
) -> None:
    """`minibert embed`: load, embed, and say what became of it. Results go to standard output, the rest to error."""
    encoder = SentenceEncoder.from_pretrained(model, revision=revision, device=device, dtype=dtype)
    if source == STANDARD_INPUT:
        print("standard input cannot be resumed: if this is interrupted, it starts anew", file=sys.stderr)
    elif _state(Path(output)).exists():
        print(f"{_partial(Path(output))} is there: going on", file=sys.stderr)
    try:
        done = embed_file(encoder, source, output, **options)
    except KeyboardInterrupt:
        again = "" if source == STANDARD_INPUT else "; the same command goes on from there"
        print(f"\nwhat was finished is in {_partial(Path(output))}{again}", file=sys.stderr)
        raise
    resumed = f", {done.resumed} of them from before" if done.resumed else ""
    print(f"{done.output}: {done.texts} texts{resumed}, {done.dimension} numbers each, float32")
    if done.truncated:
        which = "1 text had" if done.truncated == 1 else f"{done.truncated} texts had"
        was = "was" if done.truncated == 1 else "were"
        print(f"{which} more than {done.max_seq_length} tokens and {was} cut", file=sys.stderr)


def _begin(output: Path, settings: dict[str, Any], resumable: bool) -> Progress:
    """Where an earlier run of the same work stopped, else the beginning."""
    partial, state = _partial(output), _state(output)
    if not (state.exists() and partial.exists()):
        return Progress(settings=settings)
    if not resumable:
        raise ValueError(f"{partial} is unfinished work on a file: finish or delete it, with {state}")
    try:
        progress = Progress(**json.loads(state.read_bytes()))
        if partial.stat().st_size < _HEADER + progress.lines:
            raise ValueError(f"{partial} is too short")
        differing = [name for name in settings if settings[name] != progress.settings[name]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{state} is damaged ({error!r}): delete it to begin anew") from None
    if differing:
        raise ValueError(
            f"{partial} was begun with another {' and '.join(differing)}: delete {state} to begin anew, or name "
            "another output"
        )
    return progress


def _settings(encoder: SentenceEncoder, options: Options) -> dict[str, Any]:
    """What decides over the vectors. The model goes by its weights, wherever they lie."""
    tokenizer = [repr(encoder.tokenizer), sorted(encoder.tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(tokenizer).encode())
    plain = getattr(encoder.model, "model", encoder.model)
    for tensor in (*plain.state_dict().values(), *encoder.after.state_dict().values()):
        digest.update(tensor.float().cpu().contiguous().numpy())
    return {
        "model": digest.hexdigest(),
        "dtype": str(getattr(encoder.model, "plan", plain).dtype),
        "pooling": f"{encoder.pooling} {encoder.after}",
        "max_seq_length": encoder.max_seq_length,
        "prompt": options.prompt,
        "normalize": options.normalize,
        "truncate_dim": options.truncate_dim,
    }


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _state(output: Path) -> Path:
    return output.with_name(f"{output.name}.progress")


@contextmanager
def _opened(source: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    if os.fspath(source) == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    with open(source, "rb") as stream:
        yield stream


def _skip(stream: BinaryIO, progress: Progress, output: Path) -> Any:
    """Read over what is done, and return its hash to go on with. ValueError if it is not what was read then."""
    digest, left = hashlib.sha256(), progress.offset
    while left and (data := stream.read(min(left, _READ))):
        digest.update(data)
        left -= len(data)
    if digest.hexdigest() != progress.sha256:
        raise ValueError(
            f"the first {progress.lines} lines of the input are not those that {_partial(output)} was made from: "
            f"delete {_state(output)} to begin anew, or name another output"
        )
    return digest


def _chunks(stream: BinaryIO, number: int) -> Iterator[tuple[list[str], bytes]]:
    """Lists of texts, and the bytes that they were read from. What is before a bad line is given before the error."""
    texts: list[str] = []
    read = bytearray()
    for line in stream:
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            if texts:
                yield texts, bytes(read)
            raise ValueError(f"line {number + 1} is not UTF-8: {error}") from None
        texts.append(text.rstrip("\r\n"))
        read += line
        number += 1
        if len(texts) == _LINES or len(read) >= CHUNK_CHARACTERS:
            yield texts, bytes(read)
            texts, read = [], bytearray()
    if texts:
        yield texts, bytes(read)


def _bar(size: int | None, progress: Progress, show: bool | None) -> tqdm:
    kind = {"unit": "text"} if size is None else {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return tqdm(
        desc="embed", total=size, initial=progress.offset, disable=None if show is None else not show, **kind
    )  # fmt: skip


class _Rows:
    """OUTPUT.partial, with OUTPUT.progress. A row counts when the state says so; what lies behind is overwritten."""

    def __init__(self, output: Path, width: int, progress: Progress, resumable: bool):
        self.output, self.width, self.progress, self.resumable = output, width, progress, resumable

    def __enter__(self) -> _Rows:
        self.file = open(_partial(self.output), "r+b" if self.progress.lines else "wb")
        self.save()
        return self

    def _end(self) -> int:
        return _HEADER + 4 * self.width * self.progress.lines

    def append(self, rows: np.ndarray, read: int, sha256: str, truncated: int) -> None:
        old = self.progress
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
        self.file.seek(0)
        shape = (self.progress.lines, self.width)
        np.lib.format.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self.file.truncate(self._end())
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.resumable:
            beside = _state(self.output).with_name(f"{self.output.name}.progress-new")
            beside.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            os.replace(beside, _state(self.output))
        self.saved = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        self.save()
        self.file.close()

    def finish(self) -> None:
        os.replace(_partial(self.output), self.output)
        _state(self.output).unlink(missing_ok=True)

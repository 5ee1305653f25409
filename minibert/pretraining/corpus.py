"""Text files to token ids on disk, in parallel and in constant memory.

`build_corpus` writes a directory that `Corpus` opens without reading it:

    tokens-00000.npy ...   the token ids of all sentences, one after the other (uint16; uint32 for large vocabularies)
    sentences.npy          (sentences + 1,) int64: where each sentence starts, counted over all token files
    documents.npy          (documents + 1,) int64: the first sentence of each document
    vocab.txt, corpus.json the vocabulary used, and what was found (written last: it marks the corpus as complete)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from minibert.pretraining.sentences import split_sentences

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BLOCK_BYTES = 4 << 20  # text handed to a worker at a time: about a million tokens, one file of the result
CACHED_WORDS = 400_000  # a worker forgets its words beyond this many, so that memory stays flat
FORMAT = 1

_BLANK_LINE = re.compile(rb"\n[ \t\r]*\n")


@dataclass(frozen=True)
class CorpusReport:
    """What `build_corpus` found: counts over all files, and the share of tokens that the vocabulary does not have."""

    documents: int
    sentences: int
    tokens: int
    unknown_tokens: int
    single_sentence_documents: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.sentences:,} sentences, {self.tokens:,} tokens "
            f"({self.tokens / self.sentences:.1f} a sentence), "
            f"{self.unknown_tokens / self.tokens:.3%} unknown, "
            f"{self.single_sentence_documents:,} documents of a single sentence"
        )


class Corpus:
    """A tokenized corpus on disk, memory-mapped: opening it costs nothing, whatever its size.

    `sentences` and `documents` are the offset arrays described at the top of this file.

    Raises FileNotFoundError where `directory` holds no finished corpus.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        manifest = self.directory / "corpus.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"no finished corpus in {self.directory} (corpus.json is missing)")
        info = json.loads(manifest.read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"{manifest} has format {info['format']}, this version reads format {FORMAT}")
        self.report = CorpusReport(**info["report"])
        self.fingerprint: str = info["fingerprint"]
        self.lowercase: bool = info["lowercase"]
        self.vocab_file = self.directory / "vocab.txt"
        self.vocab_size: int = info["vocab_size"]
        self.sentences = np.load(self.directory / "sentences.npy", mmap_mode="r")
        self.documents = np.load(self.directory / "documents.npy", mmap_mode="r")
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(self.directory.glob("tokens-*.npy"))]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def tokens(self, start: int, length: int) -> np.ndarray:
        """(length,) token ids from position `start`; within one document, as a document is never cut by a file."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = start - self._starts[shard]
        return self._shards[shard][offset : offset + length]


# --- vocabulary ---------------------------------------------------------------------------------------------------


def train_vocab(
    files: Iterable[str | os.PathLike],
    vocab_file: str | os.PathLike,
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int = 1000,
    progress: bool | None = None,
) -> Path:
    """Train a WordPiece vocabulary on text files and write it as `vocab.txt`, one piece a line, special tokens first.

    Words are split as BERT splits them (white space, punctuation, CJK characters). Characters beyond the
    `limit_alphabet` most frequent ones become [UNK].
    """
    tokenizer = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"), lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        limit_alphabet=limit_alphabet,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=sys.stderr.isatty() if progress is None else progress,
    )
    lines = (line for block in _blocks(_checked(files), 1 << 20) for line in block.text().split("\n"))
    tokenizer.train_from_iterator(lines, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    path = Path(vocab_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    return path


def _bert_tokenizer(model: models.Model, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


# --- text to blocks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A piece of a text file that ends where a document ends."""

    path: Path
    first_line: int
    data: bytes

    def text(self) -> str:
        if b"\0" in self.data:
            raise self._error(self.data.index(b"\0"), "a NUL byte: the file is binary, or UTF-16")
        try:
            return self.data.decode("utf-8-sig" if self.first_line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(error.start, f"byte 0x{self.data[error.start]:02x} is not UTF-8") from None

    def _error(self, position: int, problem: str) -> ValueError:
        line = self.first_line + self.data.count(b"\n", 0, position)
        return ValueError(f"{self.path}, line {line}: {problem}; the corpus must be UTF-8 text")


def _checked(files: Iterable[str | os.PathLike]) -> list[Path]:
    if isinstance(files, str | os.PathLike):
        files = [files]
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("files is empty: name at least one text file (.txt, .txt.gz or .txt.xz)")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
    return paths


def _blocks(paths: list[Path], size: int, progress: tqdm | None = None) -> Iterator[_Block]:
    """Cut files into blocks of about `size` bytes, at blank lines."""
    for path in paths:
        first_line, rest, done, found = 1, b"", 0, False
        with path.open("rb") as raw:
            stream = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, lambda file, _: file)(raw, "rb")
            while data := _read(stream, size, path):
                rest += data
                end = _document_end(rest, size)
                if end:
                    if rest[:end].strip():
                        found = True
                        yield _Block(path, first_line, rest[:end])
                    first_line += rest.count(b"\n", 0, end)
                    rest = rest[end:]
                if progress is not None:
                    progress.update(raw.tell() - done)
                    done = raw.tell()
        if rest.strip():
            yield _Block(path, first_line, rest)
        elif not found:
            raise ValueError(f"{path} holds no text")


def _read(stream: BinaryIO, size: int, path: Path) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _document_end(data: bytes, size: int) -> int:
    """Where the last whole document in `data` ends, 0 if none does. One of 8 blocks or more is cut at a line."""
    end = 0
    for match in _BLANK_LINE.finditer(data, max(0, len(data) - 2 * size)):
        end = match.end()
    if not end and len(data) >= 8 * size:
        end = data.rfind(b"\n") + 1
    return end


# --- blocks to token files ----------------------------------------------------------------------------------------


class _WordPieces:
    """Token ids of many lines at once. WordPiece looks at one word at a time, so that each distinct word is tokenized
    once (by `tokenizers`) and looked up from then on: the same ids, several times faster."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.unknown_id = tokenizer.token_to_id("[UNK]")
        self._forget()

    def _forget(self) -> None:
        self._row: dict[str, int] = {}
        self._starts = np.zeros(0, np.int64)  # of each known word in _ids
        self._lengths = np.zeros(0, np.int64)
        self._ids = np.zeros(0, np.int64)

    def __call__(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all lines in one array, and the number of tokens of each line."""
        words = " ".join(lines).split(" ")
        self._learn(set(words))
        rows = np.fromiter(map(self._row.__getitem__, words), np.int64, len(words))
        lengths = self._lengths[rows]
        ends = np.cumsum(lengths)
        # position in _ids of each token: where its word starts there, plus its place within the word
        places = np.repeat(self._starts[rows] - (ends - lengths), lengths) + np.arange(ends[-1])
        last_words = np.cumsum([line.count(" ") + 1 for line in lines]) - 1
        return self._ids[places], np.diff(ends[last_words], prepend=0)

    def _learn(self, words: set[str]) -> None:
        if len(self._row) + len(words) > CACHED_WORDS:
            self._forget()
        new = sorted(words - self._row.keys())
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(new, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(ids), np.int64)])
        self._row.update(zip(new, range(len(self._row), len(self._row) + len(new)), strict=True))


def _documents(text: str, prose: bool) -> Iterator[list[str]]:
    """The sentences of each document of a text."""
    lines: list[str] = []
    for line in chain(text.split("\n"), [""]):
        line = line.strip()
        if line:
            lines.append(line)
        elif lines:
            yield split_sentences(" ".join(lines)) if prose else lines
            lines = []


_pieces: _WordPieces  # one a worker process


def _start_worker(vocab_file: str, lowercase: bool) -> None:
    global _pieces
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _pieces = _WordPieces(_bert_tokenizer(models.WordPiece.from_file(vocab_file, unk_token="[UNK]"), lowercase))


def _write_shard(block: _Block, prose: bool, directory: Path, number: int, dtype: str, key: str) -> dict[str, Any]:
    """Tokenize a block and write its two files, unless they are there from an earlier run. Returns its counts."""
    name, digest = f"{number:05d}.npy", hashlib.sha256(key.encode() + block.data).hexdigest()
    record = directory / f"shard-{number:05d}.json"
    if record.is_file():
        known = json.loads(record.read_text())
        if known["digest"] == digest:
            return known
    documents = list(_documents(block.text(), prose))
    sentences, sizes = list(chain.from_iterable(documents)), np.fromiter(map(len, documents), np.int64)
    tokens, lengths = _pieces(sentences)
    # a sentence of nothing but control characters has no tokens: leave it out
    owner = np.repeat(np.arange(len(sizes)), sizes)[lengths > 0]
    sizes, lengths = np.bincount(owner, minlength=len(sizes)), lengths[lengths > 0]
    sizes = sizes[sizes > 0]
    for kind, array in (("tokens", tokens.astype(dtype)), ("lengths", lengths), ("sizes", sizes)):
        with replacing(directory / f"{kind}-{name}") as partial, partial.open("wb") as file:
            np.save(file, array)
    info = {
        "digest": digest,
        "documents": len(sizes),
        "sentences": len(lengths),
        "tokens": len(tokens),
        "unknown_tokens": int((tokens == _pieces.unknown_id).sum()),
        "single_sentence_documents": int((sizes == 1).sum()),
    }
    with replacing(record) as partial:
        partial.write_text(json.dumps(info))
    return info


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, that takes the place of `path` in one step when all went well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def build_corpus(
    files: Iterable[str | os.PathLike],
    directory: str | os.PathLike,
    vocab_file: str | os.PathLike,
    *,
    lowercase: bool = True,
    prose: bool = False,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Corpus:
    """Tokenize text files (plain, .gz or .xz) into `directory`: one sentence a line, a blank line between documents.

    With `prose` a document is running text, whose sentences are found by rules (`split_sentences`).
    Parts that an interrupted run finished are kept: start it again with the same arguments. Nothing is done where
    the same text and vocabulary are already there.

    Raises ValueError, naming the file and where possible the line, on text that would silently make nonsense: not
    UTF-8, empty, a single document (no "next sentence of another document"), or only documents of one sentence.
    """
    paths, vocab_file, directory = _checked(files), Path(vocab_file), Path(directory)
    pieces = vocab_file.read_text(encoding="utf-8").splitlines()
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise ValueError(f"{vocab_file} lacks the special tokens {', '.join(missing)}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.json").unlink(missing_ok=True)
    key = hashlib.sha256(f"{FORMAT} {lowercase} {prose} ".encode() + vocab_file.read_bytes()).hexdigest()
    dtype = "uint16" if len(pieces) <= 1 << 16 else "uint32"
    off, total = None if progress is None else not progress, sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, disable=off) as bar:  # None: tqdm looks if it is on a terminal
        blocks = _blocks(paths, BLOCK_BYTES, bar)
        jobs = ((block, prose, directory, i, dtype, key) for i, block in enumerate(blocks))
        shards = list(_in_parallel(_write_shard, jobs, num_workers or os.cpu_count(), (str(vocab_file), lowercase)))
    report = CorpusReport(**{f.name: sum(s[f.name] for s in shards) for f in fields(CorpusReport)})
    _check(report, paths)
    shutil.copyfile(vocab_file, directory / "vocab.txt")
    for kind, name in (("lengths", "sentences.npy"), ("sizes", "documents.npy")):
        _join(directory, kind, len(shards), name)
    fingerprint = _fingerprint(directory, len(shards))
    with replacing(directory / "corpus.json") as partial:
        info = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "lowercase": lowercase,
            "vocab_size": len(pieces),
            "report": asdict(report),
        }
        partial.write_text(json.dumps(info, indent=1))
    return Corpus(directory)


def _in_parallel(function: Callable, jobs: Iterable[tuple], processes: int, initial: tuple) -> Iterator[Any]:
    """Results in the order of `jobs`. A job more than there are processes is read ahead, so that memory stays flat."""
    if processes == 1:
        _start_worker(*initial)
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    with ProcessPoolExecutor(processes, context, _start_worker, initial) as workers:
        running: deque[Future] = deque()
        for job in jobs:
            running.append(workers.submit(function, *job))
            if len(running) > processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _check(report: CorpusReport, paths: list[Path]) -> None:
    where = ", ".join(map(str, paths))
    if report.documents < 2:
        raise ValueError(
            f"{where}: one document in all, but half of the sentence pairs need a second one; "
            "put a blank line between documents"
        )
    if report.single_sentence_documents > 0.95 * report.documents:
        raise ValueError(
            f"{where}: {report.single_sentence_documents:,} of {report.documents:,} documents have a single sentence, "
            "which leaves none that follows another; blank lines belong between documents, not between sentences"
        )


def _fingerprint(directory: Path, count: int) -> str:
    """A hash of the tokens and of their division into sentences and documents, however they are cut into files."""
    digest = hashlib.sha256()
    names = [*(f"tokens-{i:05d}.npy" for i in range(count)), "sentences.npy", "documents.npy"]
    for name in names:
        digest.update(np.load(directory / name, mmap_mode="r"))
    return digest.hexdigest()


def _join(directory: Path, kind: str, count: int, name: str) -> None:
    """Join the per-shard sizes `kind` to one array of offsets, shard by shard."""
    parts = [np.load(directory / f"{kind}-{i:05d}.npy", mmap_mode="r") for i in range(count)]
    with replacing(directory / name) as partial:
        total = 1 + sum(map(len, parts))
        offsets = np.lib.format.open_memmap(partial, mode="w+", dtype=np.int64, shape=(total,))
        at = 1
        for part in parts:
            offsets[at : at + len(part)] = offsets[at - 1] + np.cumsum(part)
            at += len(part)
        offsets.flush()

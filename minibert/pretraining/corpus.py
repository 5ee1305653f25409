"""Text files to token ids on disk, in parallel and in constant memory.

`build_corpus` writes a directory that `Corpus` opens without reading it:

    tokens-00000.npy ...   the token ids of all sentences, one after the other (uint16; uint32 for large vocabularies)
    sentences.npy          (sentences + 1,) int64: where each sentence starts, counted over all token files
    documents.npy          (documents + 1,) int64: the first sentence of each document
    tokenizer.json ...     the tokenizer used, as `BertTokenizer.from_pretrained` reads it
    corpus.json            what was found (written last: it marks the corpus as complete)
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from minibert.pretraining.ids import TokenIds
from minibert.pretraining.texts import Block, blocks, check_texts, documents
from minibert.pretraining.vocabulary import check_vocab
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import files as disk

BLOCK_BYTES = 4 << 20  # text handed to a worker at a time: about a million tokens, one file of the result
MAX_UNKNOWN = 0.05  # share of [UNK] above which the vocabulary is not one for this text
FORMAT = 2


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
        self.vocab_size: int = info["vocab_size"]
        self.sentences = np.load(self.directory / "sentences.npy", mmap_mode="r")
        self.documents = np.load(self.directory / "documents.npy", mmap_mode="r")
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(self.directory.glob("tokens-*.npy"))]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def __reduce__(self) -> tuple[type[Corpus], tuple[Path]]:
        return Corpus, (self.directory,)  # another process maps the files itself

    @cached_property
    def tokenizer(self) -> BertTokenizer:
        """The tokenizer that made it."""
        return BertTokenizer.from_pretrained(self.directory)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """(length,) token ids from position `start`; within one document, as a document is never cut by a file."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = start - self._starts[shard]
        return self._shards[shard][offset : offset + length]


# --- blocks to token files ----------------------------------------------------------------------------------------


_token_ids: TokenIds  # one a worker process


def _start_worker(tokenizer: str) -> None:
    global _token_ids
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _token_ids = TokenIds(Tokenizer.from_str(tokenizer))


def _start_process(tokenizer: str) -> None:
    _start_worker(tokenizer)
    if (parent := multiprocessing.parent_process()) is not None:  # which may be killed, and cannot say goodbye then
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _write_shard(block: Block, prose: bool, directory: Path, number: int, dtype: str, key: str) -> dict[str, Any]:
    """Tokenize a block and write its two files, unless they are there from an earlier run. Returns its counts."""
    name, digest = f"{number:05d}.npy", hashlib.sha256(key.encode() + block.data).hexdigest()
    record = directory / f"shard-{number:05d}.json"
    if record.is_file():
        known = json.loads(record.read_text())
        if known["digest"] == digest:
            return {**known, "file": str(block.path)}
    found = list(documents(block.text(), prose))
    sentences, sizes = list(chain.from_iterable(found)), np.fromiter(map(len, found), np.int64)
    tokens, lengths = _token_ids(sentences)
    # a sentence of nothing but control characters has no tokens: leave it out
    owner = np.repeat(np.arange(len(sizes)), sizes)[lengths > 0]
    sizes, lengths = np.bincount(owner, minlength=len(sizes)), lengths[lengths > 0]
    sizes = sizes[sizes > 0]
    for kind, array in (("tokens", tokens.astype(dtype)), ("lengths", lengths), ("sizes", sizes)):
        with disk.replacing(directory / f"{kind}-{name}") as partial, partial.open("wb") as file:
            _save(file, [array], len(array), array.dtype)
    info = {
        "digest": digest,
        "file": str(block.path),
        "documents": len(sizes),
        "sentences": len(lengths),
        "tokens": len(tokens),
        "unknown_tokens": int((tokens == _token_ids.unknown_id).sum()),
        "single_sentence_documents": int((sizes == 1).sum()),
    }
    disk.write(record, json.dumps(info))
    return info


def build_corpus(
    files: Iterable[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    tokenizer: BertTokenizer | str | os.PathLike[str],
    *,
    lowercase: bool = True,
    prose: bool = False,
    max_unknown: float = MAX_UNKNOWN,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Corpus:
    """Tokenize text files (plain, .gz or .xz) into `directory`: one sentence a line, a blank line between documents.

    Parts that an interrupted run finished are kept: start it again with the same arguments. Nothing is done where
    the same text and tokenizer are already there.

    Args:
        tokenizer: what tokenizes, whole: casing, accents, added tokens. Special tokens in the text are text. Or the
            path of a vocab.txt, for which `lowercase` says whether capitals and accents are dropped.
        prose: a document is running English prose, whose sentences are found by rules (`split_sentences`).
        max_unknown: share of unknown tokens from which on the vocabulary is not one for this text.

    Raises ValueError, naming the file and where possible the line, on text that would silently make nonsense: not
    UTF-8, empty, a single document (no "next sentence of another document"), only documents of one sentence, or a
    vocabulary that does not know it.
    """
    paths, directory = check_texts(files), Path(directory)
    if not 0.0 <= max_unknown <= 1.0:
        raise ValueError(f"max_unknown is {max_unknown}, but must be from 0 to 1")
    if not isinstance(tokenizer, BertTokenizer):
        check_vocab(tokenizer)
        tokenizer = BertTokenizer(tokenizer, do_lower_case=lowercase)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "corpus.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(directory)
    backend = tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(f"{FORMAT} {prose} {backend}".encode()).hexdigest()
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    off, total = None if progress is None else not progress, sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, disable=off) as bar:  # None: tqdm looks if it is on a terminal
        jobs = ((block, prose, directory, i, dtype, key) for i, block in enumerate(blocks(paths, BLOCK_BYTES, bar)))
        # What is read in one go is done before other processes have started
        processes = num_workers or (1 if total <= BLOCK_BYTES else os.cpu_count() or 1)
        shards = list(_in_parallel(_write_shard, jobs, processes, (backend,)))
    report = CorpusReport(**{f.name: sum(s[f.name] for s in shards) for f in fields(CorpusReport)})
    _check(report, paths, {shard["file"] for shard in shards if shard["sentences"]}, max_unknown, prose)
    for kind, name in (("lengths", "sentences.npy"), ("sizes", "documents.npy")):
        _join(directory, kind, len(shards), name)
    info = {
        "format": FORMAT,
        "fingerprint": _fingerprint(directory, len(shards)),
        "vocab_size": vocab_size,
        "report": asdict(report),
    }
    for left in directory.glob("*-[0-9]*.*"):  # of a longer text that was here before
        if int(left.stem.rpartition("-")[2]) >= len(shards):
            left.unlink()
    disk.write(directory / "corpus.json", json.dumps(info, indent=1))
    return Corpus(directory)


def _in_parallel(function: Callable, jobs: Iterable[tuple], processes: int, initial: tuple) -> Iterator[Any]:
    """Results in the order of `jobs`. A job more than there are processes is read ahead, so that memory stays flat."""
    if processes == 1:
        _start_worker(*initial)
        yield from (function(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    with ProcessPoolExecutor(processes, context, _start_process, initial) as workers:
        running: deque[Future] = deque()
        for job in jobs:
            running.append(workers.submit(function, *job))
            if len(running) > processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _check(report: CorpusReport, paths: list[Path], with_text: set[str], max_unknown: float, prose: bool) -> None:
    where = ", ".join(map(str, paths))
    for path in paths:
        if str(path) not in with_text:
            raise ValueError(f"{path} holds no text")
    if report.documents < 2:
        raise ValueError(
            f"{where}: one document in all, but half of the sentence pairs need a second one; "
            "put a blank line between documents"
        )
    if report.single_sentence_documents > 0.95 * report.documents:
        rules = "the rules for prose know English sentences only" if prose else "one sentence a line is expected"
        raise ValueError(
            f"{where}: {report.single_sentence_documents:,} of {report.documents:,} documents have a single sentence, "
            "which leaves none that follows another; blank lines belong between documents, not between sentences, "
            f"and {rules}"
        )
    if report.unknown_tokens > max_unknown * report.tokens:
        raise ValueError(
            f"{where}: {report.unknown_tokens / report.tokens:.1%} of the tokens are unknown to the vocabulary, more "
            f"than {max_unknown:.1%}; is it of another language, or of another casing? A vocabulary that is trained on "
            "the text may need a larger alphabet (limit_alphabet) or size (vocab_size)"
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

    def offsets() -> Iterator[np.ndarray]:
        end = np.zeros(1, np.int64)
        yield end
        for part in parts:
            ends = end[-1] + np.cumsum(part)
            yield ends
            end = ends if len(ends) else end

    with disk.replacing(directory / name) as partial, partial.open("wb") as file:
        _save(file, offsets(), 1 + sum(map(len, parts)), np.dtype(np.int64))


def _save(file: BinaryIO, parts: Iterable[np.ndarray], length: int, dtype: np.dtype) -> None:
    """Write a .npy (length,) whose content comes in parts.

    Neither numpy's own writer, which does not say that a disk is full, nor a memory map, which ends the process then.
    """
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
    for part in parts:
        file.write(np.ascontiguousarray(part, dtype).data)

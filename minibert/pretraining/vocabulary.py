"""A WordPiece vocabulary, trained on text files."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from minibert.pretraining.texts import blocks, check_texts
from minibert.text.wordpiece import read_vocab
from minibert.weights import files as disk

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COVERED = 0.9995  # share of a text's characters that its alphabet must have, unless it is limited
SMALLEST_ALPHABET = 1000
_BLOCK = 1 << 20  # bytes read at a time


def train_vocab(
    files: Iterable[str | os.PathLike[str]],
    vocab_file: str | os.PathLike[str],
    *,
    vocab_size: int = 30522,
    lowercase: bool = True,
    min_frequency: int = 2,
    limit_alphabet: int | None = None,
    progress: bool | None = None,
) -> Path:
    """Train a WordPiece vocabulary on text files and write it as `vocab.txt`, one piece a line, special tokens first.

    Words are split as BERT splits them (white space, punctuation, CJK characters). Characters beyond the
    `limit_alphabet` most frequent ones become [UNK]. By default the alphabet has up to 1000 of them, and in a script of
    thousands as many as it takes to leave out one character in 2000 at most. The same text gives the same vocabulary.

    Raises ValueError for a size that has no room, FileNotFoundError and ValueError for files that are no text.
    """
    check_sizes(vocab_size, limit_alphabet)
    paths = check_texts(files)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters = _characters(paths, tokenizer.normalizer)
    if limit_alphabet is None:
        limit_alphabet = max(SMALLEST_ALPHABET, min(_needed(characters), vocab_size // 2))
    alphabet = list(characters)[:limit_alphabet]
    # Named in this order they get the same numbers each time, by which the trainer breaks ties
    continuing = [f"##{char}" for char in sorted(alphabet) if _goes_on(char, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        show_progress=sys.stderr.isatty() if progress is None else progress,
    )
    lines = (line for block in blocks(paths, _BLOCK) for line in block.text().split("\n"))
    tokenizer.train_from_iterator(lines, trainer)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    path = Path(vocab_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, "".join(f"{piece}\n" for piece, _ in pieces))
    return path


def _characters(paths: list[Path], normalizer: normalizers.Normalizer) -> dict[str, int]:
    """How often each character occurs in a text as the tokenizer sees it, without blanks; the most frequent first."""
    counts = np.zeros(0x110000, np.int64)
    for block in blocks(paths, _BLOCK):
        counts += np.bincount(np.frombuffer(block.text().encode("utf-32-le"), np.uint32), minlength=len(counts))
    found: Counter[str] = Counter()
    for code in np.flatnonzero(counts).tolist():
        for char in normalizer.normalize_str(chr(code)):
            if not char.isspace():
                found[char] += int(counts[code])
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _needed(characters: dict[str, int]) -> int:
    """How many of the characters make up the share of the text that its alphabet must have."""
    sums = np.cumsum(list(characters.values()))
    return int(np.searchsorted(sums, COVERED * sums[-1]) + 1) if len(sums) else 0


def _goes_on(char: str, tokenizer: Tokenizer) -> bool:
    """Whether a character may stand within a word, as punctuation and Chinese may not."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{char}a"))) == 1


def check_sizes(vocab_size: int, limit_alphabet: int | None) -> None:
    """Raise ValueError for a vocabulary that cannot be."""
    if type(vocab_size) is not int or not len(SPECIAL_TOKENS) < vocab_size <= 10_000_000:
        raise ValueError(f"vocab_size is {vocab_size!r}, but must be a whole number from 6 to 10000000")
    if limit_alphabet is not None and (type(limit_alphabet) is not int or limit_alphabet < 1):
        raise ValueError(f"limit_alphabet is {limit_alphabet!r}, but must be a whole number, at least 1")


def check_vocab(vocab_file: str | os.PathLike[str]) -> None:
    """Raise ValueError for a vocabulary that lacks one of BERT's special tokens, FileNotFoundError for none."""
    if Path(vocab_file).is_file():
        disk.refuse_pointer(vocab_file)
    vocab = read_vocab(vocab_file)
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise ValueError(f"{vocab_file} lacks the special tokens {', '.join(missing)}")

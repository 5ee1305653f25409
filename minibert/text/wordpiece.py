"""BERT's WordPiece as a backend of the `tokenizers` library: built from a vocabulary, copied, written as vocab.txt."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

# Begins the token that stands for an id which the vocabulary leaves out. No text holds it: NUL characters are cleaned
# away before words are looked up.
PLACEHOLDER = "\0"
MOST_PLACEHOLDERS = 1 << 24
_PLACEHOLDERS = re.compile(rf" ?{PLACEHOLDER}[0-9]+")


def new_backend(vocab: str | os.PathLike[str] | Mapping[str, int] | None, unk_token: str) -> Tokenizer:
    """A tokenizer that splits text as google-research/bert's tokenization.py does."""
    if isinstance(vocab, (str, os.PathLike)):
        vocab = read_vocab(vocab)
    if not isinstance(vocab, Mapping) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise TypeError(
            "vocab must be the path of a vocab.txt or a dict from token to id; from_pretrained reads the rest"
        )
    if unk_token not in vocab:
        raise ValueError(f"the vocabulary of {len(vocab)} tokens lacks unk_token={unk_token!r}, which it must have")
    backend = Tokenizer(WordPiece(without_gaps(vocab), unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def set_normalizer(backend: Tokenizer, do_lower_case: bool, strip_accents: bool | None, chinese: bool) -> None:
    """Set the casing; a backend that normalizes in a way of its own (read from tokenizer.json) stays as it is."""
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=backend.normalizer.clean_text,
            handle_chinese_chars=chinese,
            strip_accents=strip_accents,
            lowercase=do_lower_case,
        )


def sharing(backend: Tokenizer) -> Tokenizer:
    """A tokenizer of its own with the same vocabulary, which is not copied: it takes some 30 microseconds.

    What one call needs set otherwise (truncation) is set on such a one. So `backend` never changes while others use it,
    and calls from many threads, or from a process forked in the midst of one, need no lock.
    """
    own = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(backend, part)) is not None:
            setattr(own, part, value)
    own.encode_special_tokens = backend.encode_special_tokens
    added = sorted(backend.get_added_tokens_decoder().items())
    own.add_tokens([token for _, token in added])
    return own


def without_gaps(vocab: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary with a placeholder for each id that no token has, as where a vocab.txt has a line twice.

    The backend numbers added tokens from the count of tokens on, and so must not find the last id taken. Raises
    ValueError where two tokens have one id, and for a gap of millions.
    """
    by_id: dict[int, str] = {}
    for token, index in vocab.items():
        if by_id.setdefault(index, token) != token:
            raise ValueError(f"vocab: {by_id[index]!r} and {token!r} have the same id {index}")
    size = max(by_id, default=-1) + 1
    if size - len(by_id) > MOST_PLACEHOLDERS:
        raise ValueError(f"vocab: {len(by_id)} tokens with ids up to {size - 1}: ids must be numbered from 0 on")
    return dict(vocab) | {f"{PLACEHOLDER}{i}": i for i in range(size) if i not in by_id}


def close_gaps(backend: Tokenizer) -> Tokenizer:
    """The tokenizer itself, or one like it with placeholders. ValueError where an added token has a taken id."""
    vocab = backend.get_vocab(with_added_tokens=False)
    filled = without_gaps(vocab)
    tokens = {index: token for token, index in vocab.items()}
    added = backend.get_added_tokens_decoder()
    for index, token in added.items():
        if tokens.get(index, token.content) != token.content:
            raise ValueError(f"added token {token.content!r} has id {index}, which is that of {tokens[index]!r}")
    if len(filled) == len(vocab):
        return backend
    model = backend.model
    backend.model = WordPiece(
        filled,
        unk_token=model.unk_token,
        max_input_chars_per_word=model.max_input_chars_per_word,
        continuing_subword_prefix=model.continuing_subword_prefix,
    )
    return backend


def without_placeholders(text: str) -> str:
    """Decoded text without what stands for ids that no token has."""
    return _PLACEHOLDERS.sub("", text) if PLACEHOLDER in text else text


def read_vocab(path: str | os.PathLike[str]) -> dict[str, int]:
    """The pieces of a vocab.txt with their ids.

    Raises FileNotFoundError, or ValueError for a file that is empty or not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"vocab: there is no file {os.fspath(path)!r}")
    try:
        vocab = WordPiece.read_file(os.fspath(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"vocab: {os.fspath(path)!r} cannot be read: {error}") from None
    if not vocab:
        raise ValueError(f"vocab: {os.fspath(path)!r} is empty")
    return vocab


def vocab_lines(backend: Tokenizer) -> str:
    """The text of a vocab.txt. An id without a token (a duplicate line in the original) becomes a blank line."""
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=False).items()}
    lines = ["" if tokens[index].startswith(PLACEHOLDER) else tokens[index] for index in range(len(tokens))]
    return "".join(f"{line}\n" for line in lines)


# What decode's clean-up joins, in the order in which transformers does it
_JOINS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_up(text: str) -> str:
    """Join what tokenizing had to separate, such as a full stop from the word before it."""
    for spaced, joined in _JOINS:
        text = text.replace(spaced, joined)
    return text

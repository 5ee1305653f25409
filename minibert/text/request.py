"""Texts on their way through the backend: what may come in, how it is cut, and the rows that come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tokenizers import Encoding, Tokenizer

from minibert.checks import check_unicode, shown
from minibert.text.encoding import BatchEncoding
from minibert.text.padding import Padding
from minibert.text.wordpiece import sharing

ATTRIBUTES = {  # a column of the result -> the attribute of an Encoding that it is read from
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}


@dataclass(frozen=True)
class Request:
    """Texts to encode and how, kept so that the alignment with the text can be worked out later."""

    backend: Tokenizer
    batch: list
    add_special_tokens: bool
    is_split_into_words: bool
    split_special_tokens: bool
    cut: dict[str, Any] | None
    overflow: bool

    def batch_encoding(self, names: Sequence[str], pad: Padding, tensors: str | None) -> BatchEncoding:
        """Encode and pad; `names` are the columns wanted. Following the text's offsets costs time, so it waits."""
        # Who splits text into words will ask for word_ids; and without offsets, tokenizers 0.23 gives rows cut off from
        # a second text the type of the first
        with_offsets = "offset_mapping" in names or self.is_split_into_words or self.overflow
        encodings, samples = self.encode(with_offsets)
        columns = {name: [getattr(row, ATTRIBUTES[name]) for row in encodings] for name in names if name in ATTRIBUTES}
        length = pad.length(columns["input_ids"])
        if "length" in names:
            columns["length"] = [max(len(row), length) for row in columns["input_ids"]]
        if self.overflow:
            columns["overflow_to_sample_mapping"] = samples
        data = pad.columns(columns, length, tensors)
        if with_offsets:
            return BatchEncoding(data, pad.encodings(encodings, length))
        return BatchEncoding(data, lambda: pad.encodings(self.encode(offsets=True)[0], length))

    def encode(self, offsets: bool) -> tuple[list[Encoding], list[int]]:
        """The rows, and for each the number of its text; without `offsets` they know only ids and types."""
        self._check_room()
        try:
            encodings = self._run(self.batch, offsets)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the backend is not an Exception
            raise self._explain(error) from None
        if not self.overflow:
            return encodings, []
        groups = [[encoding, *encoding.overflowing] for encoding in encodings]
        return list(chain.from_iterable(groups)), [i for i, group in enumerate(groups) for _ in group]

    def _run(self, batch: list, offsets: bool) -> list[Encoding]:
        backend = self.backend
        if self.cut is not None or backend.truncation is not None or backend.padding is not None:
            backend = sharing(backend)  # and never set on the one that other calls may be using just now
            if self.cut is not None:
                backend.enable_truncation(**self.cut)
        if self.split_special_tokens != backend.encode_special_tokens:
            backend = sharing(backend) if backend is self.backend else backend
            backend.encode_special_tokens = self.split_special_tokens
        run = backend.encode_batch if offsets else backend.encode_batch_fast
        return run(batch, is_pretokenized=self.is_split_into_words, add_special_tokens=self.add_special_tokens)

    def _check_room(self) -> None:
        if self.cut is None:
            return
        pairs = any(_is_pair(item, self.is_split_into_words) for item in self.batch)
        special = self.backend.num_special_tokens_to_add(pairs) if self.add_special_tokens else 0
        limit, stride = self.cut["max_length"], self.cut.get("stride", 0)
        if limit < special:
            raise ValueError(f"max_length={limit} leaves no room: {special} special tokens are added")
        if stride and stride >= limit - special:
            raise ValueError(f"stride={stride} must be below {limit - special}, max_length less the special tokens")

    def _explain(self, error: BaseException) -> Exception:
        """A ValueError that names the text which the backend could not encode."""
        for i, item in enumerate(self.batch):
            where = f"[{i}]" if len(self.batch) > 1 else ""
            parts = item if _is_pair(item, self.is_split_into_words) else [item]
            for name, part in zip(("text", "text_pair"), parts, strict=False):
                for string in [part] if isinstance(part, str) else part:
                    try:
                        check_unicode(string, f"{name}{where}")
                    except ValueError as surrogate:
                        return surrogate
            try:
                self._run([item], offsets=False)
            except BaseException as own:
                how = ", ".join(f"{name}={value!r}" for name, value in (self.cut or {}).items())
                return ValueError(f"text{where} cannot be encoded{how and ' with '}{how}: {own}")
        return error if isinstance(error, Exception) else RuntimeError(str(error))


def _is_pair(item: Any, is_split_into_words: bool) -> bool:
    if is_split_into_words:
        return bool(item) and not isinstance(item[0], str)
    return not isinstance(item, str)


def _is_text(value: Any, is_split_into_words: bool) -> bool:
    if not is_split_into_words:
        return isinstance(value, str)
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def as_batch(text: Any, text_pair: Any, split: bool) -> tuple[list, bool]:
    """The texts or pairs as a list, checked, and whether they came as one."""
    is_batched = isinstance(text, (list, tuple)) and not (split and _is_text(text, split))
    one = "a list of words" if split else "a str"
    if not is_batched and not _is_text(text, split):
        raise TypeError(f"text must be {one}, or a list of them or of pairs; got {shown(text)}")
    if is_batched and not text:
        raise ValueError("text is an empty list: give at least one text")
    if is_batched and text_pair is not None:
        if not isinstance(text_pair, (list, tuple)):
            raise TypeError(f"text_pair must be a list, as text is; got {shown(text_pair)}")
        if len(text) != len(text_pair):
            raise ValueError(f"text has {len(text)} items and text_pair {len(text_pair)}: they must match")
    if not is_batched and not (text_pair is None or _is_text(text_pair, split)):
        raise TypeError(f"text_pair must be {one}, as text is; got {shown(text_pair)}")
    if not is_batched:
        return [(text, text_pair) if text_pair else text], False  # an empty text_pair is none, as in transformers
    for i, item in enumerate(text):
        is_pair = text_pair is None and isinstance(item, (list, tuple)) and len(item) == 2
        if not (_is_text(item, split) or (is_pair and all(_is_text(part, split) for part in item))):
            raise TypeError(f"text[{i}] must be {one}{'' if text_pair else ' or a pair of them'}, got {shown(item)}")
    if text_pair is None:
        return list(text), True
    for i, item in enumerate(text_pair):
        if not _is_text(item, split):
            raise TypeError(f"text_pair[{i}] must be {one}, got {shown(item)}")
    return list(zip(text, text_pair, strict=True)), True

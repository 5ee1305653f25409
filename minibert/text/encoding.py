"""What the tokenizer returns: padded ids and masks, and the way from tokens back to words and characters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

# The backend keeps truncation as a state of its own, so setting it and encoding must not be torn apart by a thread
backend_lock = threading.Lock()

ATTRIBUTES = {  # a column of the result -> the attribute of an Encoding that it is read from
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
    "offset_mapping": "offsets",
}


class TokenSpan(NamedTuple):
    start: int
    end: int  # one past the last token


class CharSpan(NamedTuple):
    start: int
    end: int  # one past the last character


class BatchEncoding(dict):
    """A dict of lists or tensors whose keys are attributes too: `batch.input_ids` is `batch["input_ids"]`.

    `model(**batch)` takes it as it is, `batch[i]` is the `tokenizers.Encoding` of row i. The methods below map between
    tokens, words and characters of the text. Those that take a row and a position may be called with the position
    alone, which then is one of row 0. They return None where nothing corresponds, as for [CLS] and padding.

    The alignment is worked out the first time somebody asks for it, and stays behind when a batch is pickled before
    that (a DataLoader's workers do so); `return_offsets_mapping=True` has it computed at once.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: list[Encoding] | Callable[[], list[Encoding]] | None = None,
    ):
        super().__init__(data or {})
        self._encodings = encoding

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self._known_encodings()[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"this BatchEncoding has {', '.join(self)}, no {name}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"_encodings": None if callable(self._encodings) else self._encodings}

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to `device`, in place, and return the batch itself."""
        for key, value in self.items():
            if hasattr(value, "to"):
                self[key] = value.to(device=device, non_blocking=non_blocking)
        return self

    @property
    def encodings(self) -> list[Encoding] | None:
        """One `tokenizers.Encoding` a row; None for a batch that was not made from text."""
        if callable(self._encodings):
            self._encodings = self._encodings()
        return self._encodings

    @property
    def is_fast(self) -> bool:
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1, or 2 for pairs; None for a batch that was not made from text."""
        return self.encodings[0].n_sequences if self.encodings else None

    def _known_encodings(self) -> list[Encoding]:
        if self.encodings is None:
            raise ValueError(
                "this batch has no alignment with a text: it comes from pad(), was built from ids, or was pickled "
                "before anyone asked for it (pass return_offsets_mapping=True to keep it)"
            )
        return self.encodings

    def _locate(self, row_or_index: int, index: int | None) -> tuple[Encoding, int]:
        row, index = (0, row_or_index) if index is None else (row_or_index, index)
        if index < 0:
            raise ValueError(f"positions are counted from 0, got {index}")
        return self._known_encodings()[row], index

    def tokens(self, batch_index: int = 0) -> list[str]:
        return self._known_encodings()[batch_index].tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the number of its word in the text (or in the list of words), None for special tokens."""
        return self._known_encodings()[batch_index].word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token 0 or 1, the text of the pair that it comes from, None for special tokens."""
        return self._known_encodings()[batch_index].sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._locate(batch_or_token_index, token_index)
        return encoding.token_to_sequence(token)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        encoding, token = self._locate(batch_or_token_index, token_index)
        return encoding.token_to_word(token)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        encoding, token = self._locate(batch_or_token_index, token_index)
        return _span(CharSpan, encoding.token_to_chars(token))

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._locate(batch_or_char_index, char_index)
        return encoding.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        encoding, char = self._locate(batch_or_char_index, char_index)
        return encoding.char_to_word(char, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        encoding, word = self._locate(batch_or_word_index, word_index)
        return _span(TokenSpan, encoding.word_to_tokens(word, sequence_index))

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        encoding, word = self._locate(batch_or_word_index, word_index)
        return _span(CharSpan, encoding.word_to_chars(word, sequence_index))


def _span(kind: Callable[[int, int], Any], bounds: tuple[int, int] | None) -> Any:
    return None if bounds is None else kind(*bounds)


@dataclass(frozen=True)
class Padding:
    """How the rows of a batch come to one length: strategy None (not at all), "longest" or "max_length"."""

    strategy: str | None
    max_length: int | None
    multiple: int | None
    left: bool
    token: str
    token_id: int

    def length(self, ids: Sequence[Sequence[int]]) -> int:
        """The length that rows are filled up to; 0 where they stay as they are."""
        if self.strategy is None:
            return 0
        length = self.max_length if self.strategy == "max_length" else max(map(len, ids))
        return -(-length // self.multiple) * self.multiple if self.multiple else length

    def columns(self, columns: Mapping[str, list], length: int, tensors: str | None) -> dict[str, Any]:
        """Fill up the columns that have a value for each token and make tensors ("pt"), arrays ("np") or lists."""
        fills = {"input_ids": self.token_id, "token_type_ids": 0, "attention_mask": 0}
        fills |= {"special_tokens_mask": 1, "offset_mapping": (0, 0)}
        if tensors is None:
            return {name: self._fill(rows, length, fills[name]) if name in fills else rows
                    for name, rows in columns.items()}  # fmt: skip
        arrays = {name: self._array(name, rows, length, fills.get(name)) for name, rows in columns.items()}
        if tensors == "np":
            return arrays
        import torch  # only here: a tokenizer alone has no need of it

        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def encodings(self, encodings: list[Encoding], length: int) -> list[Encoding]:
        side = "left" if self.left else "right"
        for encoding in encodings:
            encoding.pad(length, direction=side, pad_id=self.token_id, pad_token=self.token)
        return encodings

    def _fill(self, rows: list[list], length: int, fill: Any) -> list[list]:
        gaps = ([fill] * (length - len(row)) for row in rows)
        return [gap + row if self.left else row + gap for row, gap in zip(rows, gaps, strict=True)]

    def _array(self, name: str, rows: list, length: int, fill: Any) -> np.ndarray:
        """int64 (B, T), or (B, T, 2) for offsets. One pass over the real tokens, none over the padding."""
        if fill is None:  # not a column of tokens
            return _plain_array(name, rows)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        width = max(length, int(lengths.max()))
        if width > length and lengths.min() < width:
            raise ValueError(
                f"return_tensors needs rows of one length, but {name} has {lengths.min()} to {width} values a row"
                + (f" and padding ends at {length}" if length else "")
                + ": pass padding=True and, if a row is too long, truncation=True"
            )
        size = len(fill) if isinstance(fill, tuple) else 1
        flat = chain.from_iterable(rows)
        values = np.fromiter(chain.from_iterable(flat) if size > 1 else flat, np.int64, size * int(lengths.sum()))
        shape = (len(rows), width, size) if size > 1 else (len(rows), width)
        if lengths.min() == width:
            return values.reshape(shape)
        positions = np.arange(width)
        filled = positions >= (width - lengths)[:, None] if self.left else positions < lengths[:, None]  # (B, T)
        array = np.full(shape, fill, np.int64)
        array[filled] = values.reshape(-1, *shape[2:])
        return array


def _plain_array(name: str, values: list) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot become a tensor, its rows differ in length: {error}") from None


@dataclass(frozen=True)
class Request:
    """Texts to encode and how, kept so that the alignment with the text can be worked out later."""

    backend: Tokenizer
    batch: list
    add_special_tokens: bool
    is_split_into_words: bool
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
        run = backend.encode_batch if offsets else backend.encode_batch_fast
        with backend_lock:
            if self.cut is None:
                backend.no_truncation()
            else:
                backend.enable_truncation(**self.cut)
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
                    place = next((k for k, char in enumerate(string) if "\ud800" <= char <= "\udfff"), None)
                    if place is not None:
                        return ValueError(
                            f"{name}{where} is not Unicode text: lone surrogate {string[place]!r} at character {place}"
                        )
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
        raise TypeError(f"text must be {one}, or a list of them or of pairs; got {_show(text)}")
    if is_batched and not text:
        raise ValueError("text is an empty list: give at least one text")
    if is_batched and text_pair is not None:
        if not isinstance(text_pair, (list, tuple)):
            raise TypeError(f"text_pair must be a list, as text is; got {_show(text_pair)}")
        if len(text) != len(text_pair):
            raise ValueError(f"text has {len(text)} items and text_pair {len(text_pair)}: they must match")
    if not is_batched and not (text_pair is None or _is_text(text_pair, split)):
        raise TypeError(f"text_pair must be {one}, as text is; got {_show(text_pair)}")
    if not is_batched:
        return [(text, text_pair) if text_pair else text], False  # an empty text_pair is none, as in transformers
    for i, item in enumerate(text):
        is_pair = text_pair is None and isinstance(item, (list, tuple)) and len(item) == 2
        if not (_is_text(item, split) or (is_pair and all(_is_text(part, split) for part in item))):
            raise TypeError(f"text[{i}] must be {one}{'' if text_pair else ' or a pair of them'}, got {_show(item)}")
    if text_pair is None:
        return list(text), True
    for i, item in enumerate(text_pair):
        if not _is_text(item, split):
            raise TypeError(f"text_pair[{i}] must be {one}, got {_show(item)}")
    return list(zip(text, text_pair, strict=True)), True


def _show(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"

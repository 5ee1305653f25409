"""What the tokenizer returns: ids and masks, and the way from tokens back to words and characters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from tokenizers import Encoding

from minibert.checks import check_choice
from minibert.text.padding import tensor


class TokenSpan(NamedTuple):
    """Which tokens a word became."""

    start: int
    end: int  # one past the last token


class CharSpan(NamedTuple):
    """Which characters of the text a token came from."""

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
        encoding: Encoding | list[Encoding] | Callable[[], list[Encoding]] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        """Encoding may be a function that works the alignment out when it is asked for; the others: see
        `convert_to_tensors` and `n_sequences`, which is otherwise that of the encodings.
        """
        super().__init__(data or {})
        self._encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if isinstance(key, slice) and self._encodings is None:
            return {name: value[key] for name, value in self.items()}
        return self._known_encodings()[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"this BatchEncoding has {', '.join(self)}, no {name}") from None

    def __getstate__(self) -> dict[str, Any]:
        known = None if callable(self._encodings) else self._encodings
        return {"_encodings": known, "_n_sequences": self._n_sequences}

    def copy(self) -> BatchEncoding:
        """Another dict of the same values, with the same alignment."""
        return type(self)(self, self._encodings, n_sequences=self._n_sequences)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchEncoding:
        # What works the alignment out never changes: it is not copied
        return type(self)(deepcopy(dict(self), memo), self._encodings, n_sequences=self._n_sequences)

    @property
    def data(self) -> dict[str, Any]:
        """The batch itself: transformers' is no dict, but holds one under this name."""
        return self

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Make tensors ("pt") or arrays ("np") of what is neither yet, in place; return the batch itself.

        prepend_batch_axis makes a batch of one row of a single row. Raises ValueError for rows of different lengths.
        """
        if check_choice("tensor_type", tensor_type, (None, "pt", "np")) is None:
            return self
        for name, value in self.items():
            self[name] = tensor(name, [value] if prepend_batch_axis else value, tensor_type)
        return self

    def __or__(self, other: Mapping[str, Any]) -> BatchEncoding:
        """Another batch with the values of both, `other`'s where both have them; it keeps the alignment."""
        joined = self.copy()
        joined.update(other)
        return joined

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to `device`, in place, and return the batch itself.

        Raises TypeError for what is no device: ids have no other type to be cast to.
        """
        import torch  # is there already where tensors are

        if not isinstance(device, (str, int, torch.device)):
            raise TypeError(f"device must be a torch.device, its name or its number; got {device!r}")
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
        if self._n_sequences is None and self.encodings:
            self._n_sequences = self.encodings[0].n_sequences
        return self._n_sequences

    def _known_encodings(self) -> list[Encoding]:
        if self.encodings is None:
            raise ValueError(
                "this batch has no alignment with a text: it comes from pad(), was built from ids, or was pickled "
                "before anyone asked for it (pass return_offsets_mapping=True to keep it)"
            )
        return self.encodings

    def _locate(self, row_or_index: int, index: int | None) -> tuple[Encoding, int]:
        """The row, and the position in it. A negative row counts from the last one; positions are never negative."""
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

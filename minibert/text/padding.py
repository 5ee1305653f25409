"""How rows of different lengths become one batch: filled up, and made tensors, arrays or lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding


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
        return {name: tensor(name, array, tensors) for name, array in arrays.items()}

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
            return plain_array(name, rows)
        lengths = list(map(len, rows))
        least, width = min(lengths), max(length, *lengths)
        if length < width > least:
            raise ValueError(
                f"return_tensors needs rows of one length, but {name} has {least} to {width} values a row"
                + (f" and padding ends at {length}" if length else "")
                + ": pass padding=True and, if a row is too long, truncation=True"
            )
        size = len(fill) if isinstance(fill, tuple) else 1
        flat = chain.from_iterable(rows)
        values = np.fromiter(chain.from_iterable(flat) if size > 1 else flat, np.int64, size * sum(lengths))
        shape = (len(rows), width, size) if size > 1 else (len(rows), width)
        if least == width:
            return values.reshape(shape)
        positions, ends = np.arange(width), np.array(lengths)[:, None]
        filled = positions >= width - ends if self.left else positions < ends  # (B, T)
        array = np.full(shape, fill, np.int64)
        array[filled] = values.reshape(-1, *shape[2:])
        return array


def tensor(name: str, value: Any, kind: str) -> Any:
    """A column as a tensor ("pt") or an array ("np"); one that is of the kind stays as it is."""
    if kind == "np":
        return value if isinstance(value, np.ndarray) else plain_array(name, value)
    import torch  # only here: a tokenizer alone has no need of it

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        value = [row.numpy() for row in value]
    return torch.from_numpy(plain_array(name, value))


def plain_array(name: str, values: Any) -> np.ndarray:
    """Lists as an array. ValueError where rows differ in length, or hold what is no number."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} cannot become a tensor, its rows differ in length: {error}") from None
    return array.astype(np.int64) if array.size == 0 else array

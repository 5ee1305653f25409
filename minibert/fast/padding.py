"""Packed batches: the tokens of all texts in one row after another, without the padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from minibert.inputs import kernel_mask


@dataclass(frozen=True)
class Picked:
    """M of the N computed tokens: their places among the N, (M,), and for each row their places within it."""

    index: Tensor
    per_row: list[Tensor]

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each row are picked."""
        return [len(tokens) for tokens in self.per_row]


@dataclass(frozen=True)
class Packing:
    """Where the N computed tokens of a batch of B rows and T columns lie.

    index: (N,) places b * T + t of the computed tokens in reading order, or None if all B * T are computed.
    lengths: how many tokens of each row are computed. masks: for rows whose attention is more than "every computed
    token sees every computed token", what `scaled_dot_product_attention` would take, (1 or H, 1 or T, T).
    """

    shape: tuple[int, int]
    index: Tensor | None
    lengths: list[int]
    masks: dict[int, Tensor]

    @property
    def tokens(self) -> int:
        """N."""
        return sum(self.lengths)

    @property
    def firsts(self) -> Tensor:
        """The place of each row's first token among the N, (B,)."""
        return torch.tensor([0, *accumulate(self.lengths[:-1])])

    def columns(self, row: int) -> Tensor:
        """Which of the T columns the computed tokens of a row come from."""
        T = self.shape[1]
        if self.index is None:
            return torch.arange(T)
        start = sum(self.lengths[:row])
        return self.index[start : start + self.lengths[row]] - row * T

    def pack(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) or (1, T, ...) -> (N, ...)."""
        if x_BT.shape[:2] != self.shape:
            x_BT = x_BT.expand(*self.shape, *x_BT.shape[2:])
        flat = x_BT.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, x_N: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...), zeros at padding."""
        if self.index is not None:
            B, T = self.shape
            x_N = x_N.new_zeros(B * T, *x_N.shape[1:]).index_copy_(0, self.index, x_N)
        return x_N.view(*self.shape, *x_N.shape[1:])

    def pick(self, wanted_BT: Tensor) -> Picked:
        """The wanted tokens (boolean). ValueError if one of them is padding."""
        kept = self.pack(wanted_BT)
        if int(kept.sum()) != int(wanted_BT.sum()):
            raise ValueError("positions: true at a token that attention_mask calls padding")
        return Picked(kept.nonzero().squeeze(1), [part.nonzero().squeeze(1) for part in kept.split(self.lengths)])


@dataclass(frozen=True)
class Batch:
    """What an engine computes: N packed tokens, by word, segment and position (3, N), or with embeddings for words.

    picked: the tokens whose last hidden state is wanted, None for all.
    """

    packing: Packing
    ids_3N: Tensor
    embeds_ND: Tensor | None = None
    picked: Picked | None = None


def packing(attention_mask: Tensor | None, B: int, T: int, dtype: torch.dtype, whole: bool = False) -> Packing:
    """Plan a batch: padding is dropped where nothing can depend on it, which is wherever a row's first token is real.

    Other rows (padded on the left, or masked altogether) are computed whole, because the pooler reads their first
    token; so are batches whose mask says who attends to whom, and all rows if `whole` asks for what padding holds.
    """
    mask = kernel_mask(attention_mask, dtype)
    if mask is None:
        return Packing((B, T), None, [T] * B, {})
    if whole or attention_mask.ndim > 2:
        return Packing((B, T), None, [T] * B, dict(enumerate(mask.expand(B, *mask.shape[1:]))))
    keep = attention_mask.bool()
    beheaded = ~keep[:, 0]
    masks = {row: mask[row] for row in beheaded.nonzero().squeeze(1).tolist()}
    keep = keep | beheaded[:, None]
    return Packing((B, T), keep.flatten().nonzero().squeeze(1), keep.sum(1).tolist(), masks)


def pack_ids(plan: Packing, words: Tensor | None, segments: Tensor | None, positions: Tensor | None) -> Tensor:
    """(3, N): word (0 if embeddings are given instead), segment and position of each computed token."""
    given = (words, segments, torch.arange(plan.shape[1])[None] if positions is None else positions)
    zeros = None if words is not None and segments is not None else torch.zeros(plan.tokens, dtype=torch.long)
    return torch.stack([zeros if each is None else plan.pack(each).long() for each in given])


def pack_rows(rows: Sequence[Sequence[int]], segments: Sequence[Sequence[int]] | None = None) -> Batch:
    """Lists of ids, one a text, as they are: no padding is made to be taken out again.

    Raises ValueError for what is no list of ids, or for segments of other lengths.
    """
    words = _flat("rows", rows)
    lengths = list(map(len, rows))
    B, T, N = len(rows), max(lengths), len(words)
    ids_3N = np.zeros((3, N), np.int64)
    ids_3N[0] = words
    if segments is not None:
        kinds = _flat("segments", segments)
        if list(map(len, segments)) != lengths:
            raise ValueError("segments must be as long as rows, one number a token")
        ids_3N[1] = kinds
    ids_3N[2] = list(chain.from_iterable(map(range, lengths)))
    keep = None if N == B * T else np.arange(T) < np.array(lengths)[:, None]  # (B, T)
    index = None if keep is None else torch.from_numpy(np.flatnonzero(keep))
    return Batch(Packing((B, T), index, lengths, {}), torch.from_numpy(ids_3N))


def rounded(tokens: int) -> int:
    """So many rows go through products in the place of any number: a multiple of 4, and beyond 64 a sixteenth more.

    For each number of rows oneDNN makes code and keeps it, some 0.6 MB a product: a thousand calls of random lengths
    took 600 MB. Some rows more cost next to nothing, as it is the weights that take time.
    """
    step = max(4, 1 << max(0, (tokens - 1).bit_length() - 5))
    return max(1, -(-tokens // step)) * step


def up_to(count: int, x: Tensor, dim: int = 0) -> Tensor:
    """Zeros behind what there is, up to so many in dimension 0 or -1."""
    missing = count - x.shape[dim]
    if not missing:
        return x
    return torch.constant_pad_nd(x, (0, missing) if dim == -1 else (0, 0) * (x.ndim - 1) + (0, missing))


def _flat(name: str, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """All ids in one row. What they are is asked of all at once, and one by one only where something is wrong."""
    try:
        flat = np.array(list(chain.from_iterable(rows)))
        if flat.ndim == 1 and flat.dtype == np.int64 and all(map(len, rows)):
            return flat
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    check_rows(name, rows)
    raise ValueError(f"{name} must be lists of whole numbers, one list a text")


def check_rows(name: str, rows: Sequence[Sequence[int]]) -> None:
    """Raise ValueError unless rows are lists of whole numbers, one a text, none empty."""
    if not len(rows):
        raise ValueError(f"{name} is an empty list: give at least one text")
    for number, row in enumerate(rows):
        whole = isinstance(row, (Sequence, Tensor)) and not isinstance(row, str) and len(row) > 0
        if whole and isinstance(row, Tensor):
            whole = row.ndim == 1 and not row.is_floating_point() and row.dtype != torch.bool
        elif whole:
            whole = all(type(item) is int for item in row)
        if not whole:
            raise ValueError(f"{name}[{number}] must be a list of at least one id, got {row!r}")


def pad(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids, one a text, to input_ids and attention_mask (B, T)."""
    check_rows("input_ids", rows)
    ids = [torch.as_tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=fill), mask.long()

"""Packed batches: the tokens of all texts in one row after another, without the padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.inputs import kernel_mask


@dataclass(frozen=True)
class Picked:
    """M of the N computed tokens: their places among the N, (M,), and for each row their places within it."""

    index: Tensor
    per_row: list[Tensor]


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

    def columns(self, row: int) -> Tensor:
        """Which of the T columns the computed tokens of a row come from."""
        T = self.shape[1]
        if self.index is None:
            return torch.arange(T)
        start = sum(self.lengths[:row])
        return self.index[start : start + self.lengths[row]] - row * T

    def pack(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) or (1, T, ...) -> (N, ...)."""
        x_BT = x_BT.expand(*self.shape, *x_BT.shape[2:])
        flat = x_BT.reshape(-1, *x_BT.shape[2:])
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


def packing(attention_mask: Tensor | None, B: int, T: int, dtype: torch.dtype) -> Packing:
    """Plan a batch: padding is dropped where nothing can depend on it, which is wherever a row's first token is real.

    Other rows (padded on the left, or masked altogether) are computed whole, because the pooler reads their first
    token; so are batches whose mask says who attends to whom.
    """
    mask = kernel_mask(attention_mask, dtype)
    if mask is None:
        return Packing((B, T), None, [T] * B, {})
    if attention_mask.ndim > 2:
        return Packing((B, T), None, [T] * B, dict(enumerate(mask.expand(B, *mask.shape[1:]))))
    keep = attention_mask.bool()
    whole = ~keep[:, 0]
    masks = {row: mask[row] for row in whole.nonzero().squeeze(1).tolist()}
    keep = keep | whole[:, None]
    return Packing((B, T), keep.flatten().nonzero().squeeze(1), keep.sum(1).tolist(), masks)


def pad(ids: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Lists of ids, one a text, to input_ids and attention_mask (B, T)."""
    if not len(ids):
        raise ValueError("input_ids is an empty list: give at least one text")
    rows = [torch.as_tensor(row) for row in ids]
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.numel() == 0 or row.is_floating_point() or row.dtype == torch.bool:
            raise ValueError(f"input_ids[{number}] must be a list of at least one id, got {ids[number]!r}")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill), mask.long()

"""Attention on a GPU over texts packed one after another: each attends to itself alone.

`torch.nn.attention.varlen` (torch 2.10) runs FlashAttention on such rows as they are, in half precision. Elsewhere,
and where a mask says more than where texts end, the texts are put into padded rows for
`scaled_dot_product_attention` and taken out again. Both need nothing of the GPU's numbers on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class Texts:
    """Where S texts lie among the N packed tokens.

    starts: (S + 1,) int32 on the device, rising; tokens from starts[S] on belong to no text. longest: the tokens of
    the longest text, or more. varlen: use FlashAttention. mask: what a text's tokens may attend to, in the form of
    `scaled_dot_product_attention`, (S, 1 or H, 1 or longest, longest).
    """

    starts: Tensor
    longest: int
    varlen: bool
    mask: Tensor | None = None


def varlen_obstacle(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why FlashAttention cannot be used, or "" if it can."""
    if device.type != "cuda":
        return f"FlashAttention needs CUDA, the model is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "FlashAttention needs a GPU of compute capability 8.0 (Ampere) or later"
    if head_size % 8 or head_size > 256:
        return f"FlashAttention needs heads of a multiple of 8 up to 256 features, these have {head_size}"
    return ""


def attend(qkv_N3D: Tensor, heads: int, texts: Texts, asking: tuple[Tensor, Texts] | None = None) -> Tensor:
    """Multi-head attention of each text, (N, 3 * D) -> (N, D).

    asking: (index, texts) of M tokens, in the order of their texts, that alone ask: the result is (M, D).
    What comes out for tokens that belong to no text means nothing.
    """
    N, D3 = qkv_N3D.shape
    query, key, value = qkv_N3D.view(N, 3, heads, D3 // 3 // heads).unbind(1)  # 3 times (N, H, K)
    if not texts.varlen:
        context = _padded_attention(query, key, value, texts)
        return context if asking is None else context.index_select(0, asking[0])
    own = texts
    if asking is not None:
        index, own = asking
        query = query.index_select(0, index)
    context = varlen_attn(query, key, value, own.starts, texts.starts, own.longest, texts.longest)  # (M, H, K)
    return context.reshape(len(query), D3 // 3)


def _padded_attention(query: Tensor, key: Tensor, value: Tensor, texts: Texts) -> Tensor:
    """(N, H, K) each -> (N, D), by way of (S, H, longest, K)."""
    S, T = len(texts.starts) - 1, texts.longest
    place = _places(texts, len(query), S * T)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(S * T + 1, *x.shape[1:]).index_copy_(0, place, x)
        return rows[: S * T].view(S, T, *x.shape[1:]).transpose(1, 2)  # (S * T, H, K) -> (S, H, T, K)

    mask = texts.mask
    if mask is None:
        lengths = texts.starts.diff()
        mask = (torch.arange(T, device=query.device) < lengths[:, None])[:, None, None]  # (S, 1, 1, T)
    context = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), attn_mask=mask)
    # Kernels differ in what they give a token that may attend to nothing; torch's own on the CPU gives zeros
    nothing = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask == -torch.inf).all(-1, keepdim=True)
    context = context.masked_fill(nothing, 0.0).transpose(1, 2).reshape(S * T, -1)  # (S, H, T, K) -> (S * T, D)
    return context.index_select(0, place.clamp(max=S * T - 1))


def _places(texts: Texts, N: int, nowhere: int) -> Tensor:
    """Where each of N tokens stands among the padded rows, text * longest + place in it; `nowhere` if in no text."""
    starts = texts.starts.long()
    token = torch.arange(N, device=starts.device)
    text = torch.searchsorted(starts, token, right=True) - 1
    first = starts.index_select(0, text)
    return torch.where(token < starts[-1], text * texts.longest + token - first, nowhere)

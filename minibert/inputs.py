"""What a model accepts: shapes, ranges and masks, checked once per call before anything is computed."""

from __future__ import annotations

import math
import warnings
from typing import TypeGuard

import torch
from torch import Tensor

from minibert.config import BertConfig

IGNORED = -100  # a label that takes no part in the loss, as in torch's cross_entropy


def is_recorded(tensor: Tensor) -> bool:
    """Whether this call is being recorded, to be run later on other values: nothing may depend on those of today.

    torch.compile and torch.export, torch.jit.trace and what ONNX makes of it, the capture of a CUDA graph.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor with a number in each place: no list, no array, nothing sparse or nested."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _kind(value: object) -> str:
    """What came in the place of a dense tensor of another type, for errors."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype) if _is_dense(value) else f"a nested or sparse one ({value.layout})"


def _bounds(tensor: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest value; None where values cannot be asked for.

    So it is while a call is recorded, and for tensors without values: meta, fake, under vmap, under make_fx.
    """
    if tensor.is_meta or tensor.numel() == 0 or is_recorded(tensor):
        return None
    try:
        low, high = (bound.item() for bound in tensor.aminmax())
    except RuntimeError:
        if _holds_values(tensor):
            raise
        return None
    return (low, high) if isinstance(low, (int, float)) else None  # a symbol is none of these


def _holds_values(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be asked for."""
    try:
        tensor.reshape(-1)[0].item()
    except RuntimeError:
        return False
    return True


def kernel_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask in the form that `attention` takes: None, or boolean or added scores that broadcast to (B, H, T, T)."""
    if attention_mask is None:
        return None
    if attention_mask.ndim == 2:
        # Unmasked kernels are faster, and transformers chooses so too
        attention_mask = attention_mask.bool()
        bounds = _bounds(attention_mask)
        if bounds is not None and bounds[0]:
            return None
        return attention_mask[:, None, None, :]  # (B, T) -> (B, 1, 1, T)
    if attention_mask.ndim == 3:
        attention_mask = attention_mask[:, None]  # (B, T, T) -> (B, 1, T, T)
    return attention_mask.to(dtype) if attention_mask.is_floating_point() else attention_mask.bool()


def input_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None, ndim: int = 2) -> torch.Size:
    """The leading sizes, (B, T), of whichever of the two inputs is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, tensor = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    expected = ndim if inputs_embeds is None else ndim + 1
    if not _is_dense(tensor):
        raise ValueError(f"{name} must be a tensor, got {_kind(tensor)}")
    if tensor.ndim != expected or 0 in tensor.shape:
        raise ValueError(f"{name} must have {expected} dimensions, none of them 0; got shape {tuple(tensor.shape)}")
    return tensor.shape[:ndim]


def check_inputs(
    config: BertConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> None:
    """Raise ValueError for what would otherwise be an index error, a crash of the device or a silently wrong result."""
    B, T = input_shape(input_ids, inputs_embeds)
    if T > config.max_position_embeddings:
        raise ValueError(f"input of {T} tokens: max_position_embeddings allows {config.max_position_embeddings}")
    if inputs_embeds is not None and (
        inputs_embeds.shape[2] != config.hidden_size or not inputs_embeds.is_floating_point()
    ):
        raise ValueError(
            f"inputs_embeds must be floating point of shape {(B, T, config.hidden_size)}, "
            f"got {inputs_embeds.dtype} {tuple(inputs_embeds.shape)}"
        )
    check_ids("input_ids", input_ids, [(B, T)], config.vocab_size)
    check_ids("token_type_ids", token_type_ids, [(B, T), (1, T)], config.type_vocab_size)
    check_ids("position_ids", position_ids, [(B, T), (1, T)], config.max_position_embeddings)
    if attention_mask is not None:
        _check_mask(attention_mask, B, config.num_attention_heads, T)
    elif input_ids is not None:
        _warn_of_padding(config, input_ids)


def as_ids(ids: Tensor | None) -> Tensor | None:
    """Whole numbers of any width as the type that torch's embeddings take."""
    return ids if ids is None or ids.dtype == torch.long else ids.long()


def check_ids(
    name: str, ids: Tensor | None, shapes: list[tuple[int, ...]], limit: int, ignored: int | None = None
) -> None:
    """Raise ValueError unless `ids` is None or whole numbers of one of `shapes`, from 0 to limit - 1 or `ignored`."""
    if ids is None:
        return
    if not _is_dense(ids) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be a tensor of whole numbers (torch.long), got {_kind(ids)}")
    if tuple(ids.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(ids.shape)}")
    if is_recorded(ids):
        return
    ids = ids.long()  # torch cannot compare the widest unsigned types
    bounds = _bounds(ids if ignored is None else torch.where(ids == ignored, 0, ids))
    if bounds is not None and (bounds[0] < 0 or bounds[1] >= limit):
        also = "" if ignored is None else f", or {ignored} for none"
        found = bounds[0] if bounds[0] < 0 else bounds[1]
        raise ValueError(f"{name} must be from 0 to {limit - 1}{also}; got {found}")


def _check_mask(mask: Tensor, B: int, H: int, T: int) -> None:
    if not _is_dense(mask) or mask.is_complex():
        raise ValueError(f"attention_mask must be a tensor of 0 and 1, got {_kind(mask)}")
    sizes = {2: [(B,), (T,)], 3: [(B, 1), (T, 1), (T,)], 4: [(B, 1), (H, 1), (T, 1), (T,)]}.get(mask.ndim)
    if sizes is None or any(size not in allowed for size, allowed in zip(mask.shape, sizes, strict=True)):
        raise ValueError(
            f"attention_mask must have shape {(B, T)}, {(B, T, T)} or {(B, H, T, T)}, got {tuple(mask.shape)}"
        )
    # torch cannot compare the widest unsigned types
    bounds = None if mask.dtype == torch.bool else _bounds(mask if mask.is_floating_point() else mask.long())
    if bounds is not None:
        _check_mask_values(mask, *bounds)


def _check_mask_values(mask: Tensor, low: float, high: float) -> None:
    """Refuse what would be read as something else than was meant: scores as 0 and 1, or 0 and 1 as scores."""
    is_binary = low >= 0 and high <= 1  # also false for NaN
    if is_binary and mask.is_floating_point():
        is_binary = bool(((mask == 0) | (mask == 1)).all())
    if mask.ndim == 2:
        if not is_binary:
            raise ValueError(f"a 2D attention_mask must hold 1 (token) and 0 (padding), got {low:g} to {high:g}")
    elif not mask.is_floating_point():
        if not is_binary:
            raise ValueError(
                f"a {mask.ndim}D attention_mask of whole numbers must hold 1 (may be attended) and 0 (may not), got "
                f"{low:g} to {high:g}; numbers that are to be added to the scores must be floating point"
            )
    elif is_binary and high == 1:
        raise ValueError(
            f"a {mask.ndim}D attention_mask of floating-point numbers is added to the scores, and this one holds 0 and "
            "1: pass mask.bool() or mask.long() for 1 (may be attended) and 0 (may not), or 0 and -inf to be added"
        )
    elif not high < math.inf:  # NaN too
        raise ValueError(f"a {mask.ndim}D attention_mask must hold no NaN and no +inf, got {low:g} to {high:g}")


_warned: set[str] = set()


def _warn_of_padding(config: BertConfig, input_ids: Tensor) -> None:
    """Once in a process: padding without a mask is attended to like text, the commonest mistake with BERT."""
    if "padding" in _warned or config.pad_token_id is None or is_recorded(input_ids):
        return
    bounds = _bounds(input_ids.long() == config.pad_token_id)
    if bounds is not None and bounds[1]:
        _warned.add("padding")
        warnings.warn(
            f"input_ids contain the padding id {config.pad_token_id} but no attention_mask came with them: padding is "
            "attended to like text. Pass the tokenizer's attention_mask.",
            stacklevel=2,
        )


def check_targets(name: str, targets: Tensor, B: int, num_labels: int) -> None:
    """Raise ValueError unless `targets` are floating-point numbers (B, num_labels), or (B,) for one label."""
    shapes = [(B, num_labels)] + [(B,)] * (num_labels == 1)
    if not _is_dense(targets):
        raise ValueError(f"{name} must be a tensor, got {_kind(targets)}")
    if not targets.is_floating_point() or tuple(targets.shape) not in shapes:
        raise ValueError(
            f"{name} must be floating point of shape {' or '.join(map(str, shapes))}, "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )

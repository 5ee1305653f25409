"""The fast path: the same parameters in a faster shape. `optimize` is its only public name."""

from __future__ import annotations

import os

import torch

from minibert.base import BertPreTrainedModel
from minibert.fast.exact import check_exact
from minibert.fast.optimized import OptimizedModel
from minibert.fast.plan import NAMES, cpu_plan

__all__ = ["optimize"]

_DEFAULT = {"1": True, "0": False}  # MINIBERT_COMPILE

_DTYPES = ("auto", "int8", *NAMES.values())


def optimize(
    model: BertPreTrainedModel, dtype: str | torch.dtype | None = None, compile: bool | None = None
) -> OptimizedModel:
    """An inference-only module with the call and the outputs of `model`, as fast as this machine allows.

    dtype: what matrix products are computed in. None, the model's own dtype: outputs differ by rounding only.
    "bfloat16" and "int8" are faster and less exact; "auto" is bfloat16 where this CPU is fast at it, else float32. On a
    CPU that has no products in bfloat16 it takes compile=True: weights are kept in it, the rest is float32.
    Outputs always come in the model's own dtype.

    compile: True makes all layers one compiled graph on a CPU, some tenths faster, most so for short texts: that takes
    a C++ compiler and, once for a shape of models and a CPU, some 30 to 100 seconds, which is announced. It is kept on
    disk, and None, the default, uses what is there and compiles nothing; False: never. MINIBERT_COMPILE, 1 or 0 in the
    environment, says what None means.

    It computes as in eval mode, whatever mode the model is in. Parameters are shared with `model`, apart from a second
    copy of the weights in the layout that the kernels read. Change them, and it is time to optimize again: the next
    call raises RuntimeError. (Changes in place through `.data` or numpy are noticed on a CPU, where they change most
    of a tensor.) `explain()` on the result tells what was chosen and why.

    Raises TypeError for what is not a minibert model, or not exactly one: a subclass, a hook, an adapter or another
    module in a layer's place, a `forward` put in the place of one. ValueError for a dtype that does not exist or that
    this CPU would only emulate slowly.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"model must be a minibert model, got {type(model).__name__}")
    name = NAMES.get(dtype, "int8" if dtype == torch.int8 else dtype)
    if name is not None and name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be None or one of {', '.join(_DTYPES)}")
    if compile not in (None, True, False):
        raise ValueError(f"compile={compile!r}: must be True, False, or None for what is compiled already")
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"model is on {model.device}: optimize works on the CPU and on CUDA GPUs")
    check_exact(model)
    with torch.no_grad():
        if model.device.type == "cuda":
            from minibert.fast.cuda import gpu_plan  # which a CPU has no use for

            return gpu_plan(model, name).build(model)
        compile = _DEFAULT.get(os.environ.get("MINIBERT_COMPILE", "")) if compile is None else compile
        return cpu_plan(model, name, compile).build(model)

"""The fast path: the same parameters in a faster shape. `optimize` is its only public name."""

from __future__ import annotations

from dataclasses import replace

import torch

from minibert.base import BertPreTrainedModel
from minibert.fast.encoder import CpuEncoder
from minibert.fast.optimized import FastVocabularyHead, OptimizedModel
from minibert.fast.plan import NAMES, Plan, cpu_plan

__all__ = ["optimize"]

_DTYPES = ("auto", "int8", *NAMES.values())


def optimize(model: BertPreTrainedModel, dtype: str | torch.dtype | None = None) -> OptimizedModel:
    """An inference-only module with the call and the outputs of `model`, as fast as this machine allows.

    dtype: what matrix products are computed in. None, the model's own dtype: outputs differ by rounding only.
    "bfloat16" and "int8" are faster and less exact; "auto" is bfloat16 where this CPU is fast at it, else float32.
    Outputs always come in the model's own dtype.

    Parameters are shared with `model`, apart from a second copy of the weights in the layout that the kernels read.
    Change them, and it is time to optimize again. `explain()` on the result tells what was chosen and why.

    Raises TypeError for something that is not a minibert model, ValueError for a dtype that does not exist or that
    this CPU would only emulate slowly.
    """
    if not isinstance(model, BertPreTrainedModel):
        raise TypeError(f"model must be a minibert model, got {type(model).__name__}")
    name = NAMES.get(dtype, "int8" if dtype == torch.int8 else dtype)
    if name is not None and name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be None or one of {', '.join(_DTYPES)}")
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"model is on {model.device}: optimize works on the CPU and on CUDA GPUs")
    with torch.no_grad():
        if model.device.type == "cuda":
            from minibert.fast.cuda import on_cuda  # which a CPU has no use for

            return on_cuda(model, name)
        return _on_cpu(model, cpu_plan(model, name))


def _on_cpu(model: BertPreTrainedModel, plan: Plan) -> OptimizedModel:
    encoder = CpuEncoder(model.base_model, plan.kernels)
    words = getattr(getattr(model, "cls", None), "predictions", None)
    head = None if words is None else FastVocabularyHead(words, plan.kernels)
    extra = encoder.nbytes + (0 if head is None else head.nbytes)
    receipt = f"memory: {extra / 2**20:.0f} MiB for the second copy of the weights"
    return OptimizedModel(model, encoder, head, replace(plan, receipts=(*plan.receipts, receipt)))

"""How weights change: AdamW and its learning rate (appendix A.2)."""

from __future__ import annotations

import torch
from torch import nn


def learning_rate(step: int, peak: float, warmup_steps: int, steps: int) -> float:
    """Linear up to `peak` in `warmup_steps`, then linear down to 0 after the last of `steps`; `step` counts from 0."""
    up = (step + 1) / max(1, warmup_steps)
    down = (steps - step) / max(1, steps - warmup_steps)
    return peak * max(0.0, min(1.0, up, down))


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW with bias correction; biases and LayerNorm weights do not decay (google-research/bert, optimization.py)."""
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[not name.endswith(("bias", "LayerNorm.weight"))].append(parameter)
    groups = [
        {"params": decayed[True], "weight_decay": weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)

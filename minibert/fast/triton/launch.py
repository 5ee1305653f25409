"""What the launchers share: checks of what comes in, and the tile that one program works on."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 65536  # elements of a row that one program holds in registers


def check_floats(**tensors: Tensor | None) -> None:
    """Raise TypeError for a dtype that the kernels do not compute, ValueError for tensors on several devices."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if len({tensor.device for tensor in given.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"all tensors must be on one device, got {places}")


def check_size(size: int, **vectors: Tensor | None) -> None:
    """Raise ValueError unless each vector has `size` elements."""
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}")


def row_tile(columns: int) -> dict[str, int]:
    """Whole rows of `columns` elements: as many as make 4096 elements, eight 16-bit loads of 16 bytes a thread."""
    block = triton.next_power_of_2(columns)
    if block > WIDEST:
        raise ValueError(f"a row of {columns} elements is too wide for this kernel: {WIDEST} is the most")
    rows = max(1, 4096 // max(block, 512))
    warps = min(32, max(4, rows * block // 1024))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}

"""The parts of an encoder that several kernels can compute: `measured` times them on this GPU and keeps the fastest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.activations import Activation
from minibert.fast.encoder import Norm
from minibert.fast.race import Candidates, race
from minibert.model import BertEmbeddings

GELU = ("gelu", "gelu_python")  # names of what the Triton kernels compute
SIZES = {"small": 128, "large": 8192}  # tokens in a probe
LARGE = 1024  # tokens from which on the winners of the large probe are used

Up = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]
Down = Callable[[Tensor, Tensor, Tensor, Tensor, Norm], Tensor]
Embed = Callable[[Tensor, BertEmbeddings, torch.dtype], Tensor]


@dataclass(frozen=True)
class Pieces:
    """up: activation(x W^T + b). down: norm(x W^T + b + residual). embed: the three tables, summed and normalised."""

    up: Up
    down: Down
    embed: Embed


def torch_up(x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    """The widening product and its activation, by torch: (N, D) -> (N, F)."""
    return activation(F.linear(x, weight, bias))


def torch_down(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """Product, residual and LayerNorm, by torch: (N, F or D) and (N, D) -> (N, D)."""
    return norm(F.linear(x, weight, bias).add_(residual))


def torch_embed(ids_3N: Tensor, tables: BertEmbeddings, dtype: torch.dtype) -> Tensor:
    """Embeddings of words, segments and positions, normalised, by torch: (3, N) -> (N, D)."""
    x = tables.word_embeddings(ids_3N[0]) + tables.token_type_embeddings(ids_3N[1])
    return tables.LayerNorm(x + tables.position_embeddings(ids_3N[2])).to(dtype)


def triton_up(x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    """As torch_up, bias and GELU in one kernel."""
    from minibert.fast.triton.bias_gelu import bias_gelu

    return bias_gelu(F.linear(x, weight), bias)


def triton_up_in_one(x: Tensor, weight: Tensor, bias: Tensor, activation: nn.Module, tile: Any) -> Tensor:
    """As torch_up, all in one kernel."""
    from minibert.fast.triton.linear_gelu import linear_gelu

    return linear_gelu(x, weight, bias, tile)


def triton_down(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """As torch_down, all but the product in one kernel."""
    from minibert.fast.triton.layer_norm import layer_norm

    return layer_norm(F.linear(x, weight), norm.weight, norm.bias, norm.eps, bias, residual)


def triton_embed(ids_3N: Tensor, tables: BertEmbeddings, dtype: torch.dtype) -> Tensor:
    """As torch_embed, in one kernel."""
    from minibert.fast.triton.embedding import embedding

    names = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm")
    weights = [getattr(tables, name).weight for name in names]
    return embedding(ids_3N, *weights, tables.LayerNorm.bias, tables.LayerNorm.eps, dtype=dtype)


TORCH = Pieces(torch_up, torch_down, torch_embed)
TRITON = Pieces(triton_up, triton_down, triton_embed)


def triton_obstacle(dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot be used, or "" if they can."""
    if dtype == torch.float64:
        return "the kernels compute in float32, not in float64"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the package triton is not installed"
    return ""


def candidates(activation: str, dtype: torch.dtype) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """For each piece the functions that can compute it, by name; torch's own comes first."""
    up: dict[str, Callable[..., Tensor]] = {"torch": torch_up}
    if activation in GELU:
        from minibert.fast.triton.linear_gelu import TILES

        up["triton gelu"] = triton_up
        if dtype != torch.float32:  # whose tiles are too large
            up |= {"triton product " + "x".join(map(str, t[:3])): partial(triton_up_in_one, tile=t) for t in TILES}
    return {
        "up": up,
        "down": {"torch": torch_down, "triton norm": triton_down},
        "embed": {"torch": torch_embed, "triton": triton_embed},
    }


def arguments(tables: BertEmbeddings, width: int, activation: str, dtype: torch.dtype, N: int) -> dict[str, tuple]:
    """Random numbers for each piece, of this model's sizes: embeddings, feed-forward size, N tokens."""
    V, D = tables.word_embeddings.weight.shape
    device, generator = tables.word_embeddings.weight.device, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    norm = Norm(nn.LayerNorm(D, device=device), dtype)
    ids = torch.stack([torch.randint(rows, (N,), generator=generator) for rows in (V, 1, 1)]).to(device)
    weight = draw(width, D) * D**-0.5
    return {
        "up": (draw(N, D), weight, draw(width), Activation(activation)),
        "down": (draw(N, width), weight.t().contiguous(), draw(D), draw(N, D), norm),
        "embed": (ids, tables, dtype),
    }


@torch.no_grad()
def measured(
    tables: BertEmbeddings, width: int, activation: str, dtype: torch.dtype, seconds: Callable[..., float]
) -> tuple[dict[str, Pieces], list[str]]:
    """The fastest pieces for small and for large batches, and a line on each choice.

    `seconds(function, arguments)` times one. A candidate that fails, or that is further from torch's result than half
    precision can explain, is left out, and the line says so.
    """
    obstacle = triton_obstacle(dtype)
    if obstacle:
        return dict.fromkeys(SIZES, TORCH), [f"kernels: torch's own, since {obstacle}"]
    chosen, receipts = {}, []
    for size, N in SIZES.items():
        inputs, winners = arguments(tables, width, activation, dtype, N), {}
        for piece, functions in candidates(activation, dtype).items():
            name, receipt = _fastest(functions, inputs[piece], dtype, seconds)
            winners[piece] = functions[name]
            receipts.append(f"{piece}, {N} tokens: {receipt}")
        chosen[size] = Pieces(**winners)
    return chosen, receipts


def _fastest(
    functions: dict[str, Callable[..., Tensor]], inputs: tuple, dtype: torch.dtype, seconds: Callable[..., float]
) -> tuple[str, str]:
    def clock(right: Candidates) -> dict[str, float]:
        times = {}
        for name in right:
            with suppress(Exception):  # a tile may not fit this GPU: torch's own remains
                times[name] = seconds(functions[name], inputs)
        return times

    allowed = max(4 * torch.finfo(dtype).eps, 1e-4)
    runs = {name: partial(function, *inputs) for name, function in functions.items()}
    times, obstacles = race(runs, dict.fromkeys(runs, allowed), clock)
    best = min(times, key=times.get)
    ranking = ", ".join(f"{name} {times[name] * 1e6:.0f} us" for name in sorted(times, key=times.get))
    notes = [f"{name} left out: {obstacle}" for name, obstacle in obstacles.items()]
    return best, f"{best} ({'; '.join([ranking, *notes])})"


def cuda_seconds(function: Callable[..., Any], inputs: tuple, replays: int = 9, calls: int = 10) -> float:
    """Median time of a call on the GPU, as part of a CUDA graph: without what its launch takes on the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            function(*inputs)
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return median(times[1:])

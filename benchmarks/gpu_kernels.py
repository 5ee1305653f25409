"""The Triton kernels of minibert at bert-base's sizes, each beside torch's way: the section "kernels" of gpu.py.

A case returns (the kernel, the same in torch, inputs); both give the result and, where there are any, its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
Case = tuple[Function, Function, tuple[Any, ...]]


def sizes(s: Any) -> tuple[int, int, int, int]:
    """N tokens, D, F, V."""
    names = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 30522}
    return (16384 if s.device == "cuda" else 8, *(s.sizes.get(name, size) for name, size in names.items()))


def draw(s: Any, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(s.device, s.dtype).requires_grad_()


def with_gradients(function: Callable[..., Tensor]) -> Function:
    """Result, and gradients of its sum's square, of all inputs that take them."""

    def both(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = function(*inputs)
        leaves = [x for x in inputs if x.is_floating_point()]
        return result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))

    return both


def layer_norm(s: Any) -> Case:
    from minibert.fast.triton.layer_norm import layer_norm

    N, D, _, _ = sizes(s)
    inputs = draw(s, N, D), draw(s, D), draw(s, D), draw(s, D), draw(s, N, D, scale=0.5)
    plain: Function = lambda x, w, b, bias, r: (F.layer_norm(x + bias + r, w.shape, w, b, 1e-12).detach(),)  # noqa: E731
    return (lambda x, w, b, bias, r: (layer_norm(x, w, b, 1e-12, bias, r).detach(),)), plain, inputs


def embedding(s: Any) -> Case:
    from minibert.fast.triton.embedding import embedding

    N, D, _, V = sizes(s)
    ids = torch.randint(2, (3, N), generator=torch.Generator().manual_seed(0)).to(s.device)
    ids[0] = torch.arange(N, device=s.device) % V
    inputs = ids, draw(s, V, D), draw(s, 2, D), draw(s, 512, D), draw(s, D), draw(s, D)

    def plain(ids: Tensor, words: Tensor, segments: Tensor, positions: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total = F.embedding(ids[0], words) + F.embedding(ids[1], segments) + F.embedding(ids[2], positions)
        return F.layer_norm(total, w.shape, w, b, 1e-12)

    return (lambda *x: (embedding(*x, 1e-12).detach(),)), (lambda *x: (plain(*x).detach(),)), inputs


def bias_gelu(s: Any) -> Case:
    from minibert.fast.triton.bias_gelu import bias_gelu

    N, _, width, _ = sizes(s)
    plain: Function = lambda x, b: (F.gelu(x + b).detach(),)  # noqa: E731
    return (lambda *x: (bias_gelu(*x).detach(),)), plain, (draw(s, N, width), draw(s, width))


def linear_gelu(s: Any) -> Case:
    from minibert.fast.triton.linear_gelu import linear_gelu

    N, D, width, _ = sizes(s)
    inputs = draw(s, N, D), draw(s, width, D, scale=D**-0.5), draw(s, width)
    plain: Function = lambda x, w, b: (F.gelu(F.linear(x, w, b)).detach(),)  # noqa: E731
    return (lambda *x: (linear_gelu(*x).detach(),)), plain, inputs


def cross_entropy(s: Any) -> Case:
    from minibert.fast.triton.cross_entropy import cross_entropy

    N, _, _, V = sizes(s)
    M = N // 6
    labels = torch.arange(M, device=s.device) * 7 % V
    logits = draw(s, M, V + -V % 64)
    ours = with_gradients(lambda z: cross_entropy(z, labels, words=V)[0])
    return ours, with_gradients(lambda z: F.cross_entropy(z[:, :V].float(), labels, reduction="none")), (logits,)


CASES: dict[str, Callable[[Any], Case]] = {
    "layer_norm": layer_norm, "embedding": embedding, "bias_gelu": bias_gelu, "linear_gelu": linear_gelu,
    "cross_entropy": cross_entropy,
}  # fmt: skip

"""CUDA graphs for small batches: some hundred launches become one.

A small batch's time is that of launching its kernels. A graph replays them all at once, but for one set of shapes: so
batches are padded to a few sizes ("buckets"), and what varies within one lies in memory, not in shapes.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
TEXTS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Bucket:
    """N tokens, S texts of up to `longest` tokens. A batch has at most so many."""

    N: int
    S: int
    longest: int


def bucket_for(lengths: list[int]) -> Bucket | None:
    """The smallest bucket for texts of these lengths; None if the batch is too large to gain by a graph."""
    tokens, texts, longest = sum(lengths), len(lengths), max(lengths)
    if tokens > TOKENS[-1] or texts > TEXTS[-1]:
        return None
    N, S = TOKENS[bisect_left(TOKENS, tokens)], TEXTS[bisect_left(TEXTS, texts)]
    return Bucket(N, S, N if S == 1 else min(N, max(16, 1 << (longest - 1).bit_length())))


def write_host(ids_3N: Tensor, lengths: list[int], bucket: Bucket, pinned: bool) -> Tensor:
    """The (3 * bucket.N + bucket.S + 1,) numbers that a batch is: ids, padded with 0, and where its texts start.

    Texts that are not there are empty; the tokens of the padding belong to no text.
    """
    N = ids_3N.shape[1]
    host = torch.zeros(3 * bucket.N + bucket.S + 1, dtype=torch.long, pin_memory=pinned)
    host[: 3 * bucket.N].view(3, bucket.N)[:, :N] = ids_3N
    starts = host[3 * bucket.N :]
    starts[1:] = N
    starts[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    return host


@dataclass
class _Slot:
    """A captured graph and the memory that it reads and writes. Without CUDA there is no graph: `run` computes."""

    batch: Tensor
    out: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class Graphs:
    """Runs `encode(batch, bucket)`, batch as from `write_host`, result (bucket.N, D), as one graph a bucket."""

    def __init__(self, encode: Callable[[Tensor, Bucket], Tensor], device: torch.device):
        self.encode, self.device, self.is_cuda = encode, device, device.type == "cuda"
        self.slots: dict[Bucket, _Slot] = {}
        self.lock = threading.Lock()
        self.done: torch.cuda.Event | None = None

    def run(self, ids_3N: Tensor, lengths: list[int], bucket: Bucket) -> Tensor:
        """Ids on the host. Returns (N, D) in memory of its own."""
        host = write_host(ids_3N, lengths, bucket, pinned=self.is_cuda)
        with self.lock:  # calls share the slots: enqueue one whole call after another
            slot = self.slots.get(bucket) or self.capture(bucket)
            if self.done is not None:
                self.done.wait()  # on the GPU: the call before this one may be on another stream
            slot.batch.copy_(host, non_blocking=True)
            if slot.graph is None:
                slot.out = self.encode(slot.batch, bucket)
            else:
                slot.graph.replay()
            out = slot.out[: ids_3N.shape[1]].clone()
            if self.is_cuda:
                self.done = self.done or torch.cuda.Event()
                self.done.record()
        return out

    @torch.no_grad()
    @torch.inference_mode(False)  # whose tensors cannot be written to by a later call outside of it
    def capture(self, bucket: Bucket) -> _Slot:
        slot = _Slot(torch.zeros(3 * bucket.N + bucket.S + 1, dtype=torch.long, device=self.device))
        if self.is_cuda:
            # Compile the kernels and let the libraries allocate, off the stream that is captured
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.encode(slot.batch, bucket)
            torch.cuda.current_stream().wait_stream(side)
            slot.graph = torch.cuda.CUDAGraph()
            # One memory pool for all: graphs never run at the same time, and each result is copied at once
            pool = next((other.graph.pool() for other in self.slots.values()), None)
            with torch.cuda.graph(slot.graph, pool=pool, capture_error_mode="thread_local"):
                slot.out = self.encode(slot.batch, bucket)
        self.slots[bucket] = slot
        return slot

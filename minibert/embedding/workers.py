"""Embedding on several processes of one machine, with the order kept."""

from __future__ import annotations

import pickle
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from minibert.embedding.encoder import Options, SentenceEncoder

_AHEAD = 2  # chunks a worker has waiting, so that none is idle while results are taken in order

_encoder: SentenceEncoder  # in a worker: its own


def embed(encoder: SentenceEncoder, parts: Iterator[list[str]], options: Options, processes: int) -> Iterator[Tensor]:
    """The vectors of each part, in order. Workers are started for it and end with it.

    Raises RuntimeError that names the texts where a worker failed or was killed.
    """
    copy = pickle.dumps(encoder)  # by value: what is encoded with is the model as it is now, trained on or not
    threads = max(1, torch.get_num_threads() // processes)
    waiting: deque[tuple[int, int, Future]] = deque()
    # Not forked: threads of torch and of the tokenizer do not survive that
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (copy, threads)) as pool:
        try:
            number, failure = 0, None
            while True:
                part, failure = _next(parts)
                if part is None:
                    break
                waiting.append((number, number + len(part), pool.submit(_embed, part, options)))
                number += len(part)
                if len(waiting) > _AHEAD * processes:
                    yield _result(*waiting.popleft())
            while waiting:  # what came before a failure is given first
                yield _result(*waiting.popleft())
            if failure is not None:
                raise failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next(parts: Iterator[list[str]]) -> tuple[list[str] | None, Exception | None]:
    """The next part, or None at the end, and what went wrong if that is why."""
    try:
        return next(parts, None), None
    except Exception as error:
        return None, error


def _start(copy: bytes, threads: int) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one acts on it
    torch.set_num_threads(threads)
    _encoder = pickle.loads(copy)


def _embed(texts: list[str], options: Options) -> np.ndarray:
    return _encoder.embed(texts, options)[0].float().cpu().numpy()  # a tensor would be sent by shared memory, and stay


def _result(start: int, end: int, future: Future) -> Tensor:
    try:
        return torch.from_numpy(future.result())
    except BrokenProcessPool as error:
        reason = "a process ended; was it killed, or out of memory? (A script needs `if __name__ == '__main__':`)"
        raise RuntimeError(f"texts[{start}] to texts[{end - 1}]: {reason}") from error
    except Exception as error:
        raise RuntimeError(f"texts[{start}] to texts[{end - 1}]: {type(error).__name__}: {error}") from error

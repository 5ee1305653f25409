"""Embedding on several processes of one machine, with the order kept."""

from __future__ import annotations

import pickle
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minibert.embedding.texts import Text

_AHEAD = 2  # chunks a worker has waiting, so that none is idle while results are taken in order


class Embeds(Protocol):
    """What a worker has a copy of: a SentenceEncoder, whose options are its own affair."""

    def embed(self, texts: list[Text], options: Any) -> tuple[Any, int]: ...
    def to(self, device: str) -> Embeds: ...


_encoder: Embeds  # in a worker: its own


class Pool:
    """Worker processes, each with a copy of the encoder as it is now, trained on or not, on a device of its own.

    They share the threads of this process. `close`, or leaving the `with` block, ends them.
    """

    def __init__(self, encoder: Embeds, devices: Sequence[str | torch.device]):
        if not devices:
            raise ValueError("devices is empty: a pool needs at least one")
        threads = max(1, torch.get_num_threads() // len(devices))
        # In a list, which the worker empties: an argument itself would be kept as long as the process lives
        copy = [pickle.dumps(encoder)]
        # Not forked: threads of torch and of the tokenizer do not survive that
        context = get_context("spawn")
        self._workers = [ProcessPoolExecutor(1, context, _start, (copy, threads, str(device))) for device in devices]
        self._loads = [0] * len(devices)
        try:
            for started in [worker.submit(_ready) for worker in self._workers]:
                _result(started, "a worker process could not start")
        except BaseException:
            self.close()
            raise
        copy.clear()

    def embed(self, parts: Iterator[list[Text]], options: Any) -> Iterator[tuple[Any, int]]:
        """What `SentenceEncoder.embed` gives for each part, in order.

        Raises RuntimeError that names the texts where a worker failed.
        """
        waiting: deque[tuple[int, int, int, Future[Any]]] = deque()

        def first() -> tuple[Any, int]:
            start, end, worker, future = waiting.popleft()
            self._loads[worker] -= 1
            results, cut = _result(future, f"texts[{start}] to texts[{end - 1}]")
            return _map(results, lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value), cut

        number, failure = 0, None
        try:
            while True:
                part, failure = _next(parts)
                if part is None:
                    break
                worker = min(range(len(self._workers)), key=self._loads.__getitem__)
                future = self._workers[worker].submit(_embed, part, options)
                self._loads[worker] += 1
                waiting.append((number, number + len(part), worker, future))
                number += len(part)
                if len(waiting) > _AHEAD * len(self._workers):
                    yield first()
            while waiting:  # what came before a failure is given first
                yield first()
            if failure is not None:
                raise failure
        finally:
            for *_, worker, future in waiting:
                future.cancel()
                self._loads[worker] -= 1

    def close(self) -> None:
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _next(parts: Iterator[list[Text]]) -> tuple[list[Text] | None, Exception | None]:
    """The next part, or None at the end, and what went wrong if that is why."""
    try:
        return next(parts, None), None
    except Exception as error:
        return None, error


def _start(copy: list[bytes], threads: int, device: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one acts on it
    torch.set_num_threads(threads)
    _encoder = pickle.loads(copy.pop()).to(device)


def _ready() -> None:
    """Done once the worker has its encoder."""


def _embed(texts: list[Text], options: Any) -> tuple[Any, int]:
    results, cut = _encoder.embed(texts, options)
    return _map(results, _as_array), cut


def _as_array(value: Any) -> Any:
    """A tensor as an array, in a type that NumPy has; as a tensor it would be sent by shared memory, and stay."""
    if not isinstance(value, Tensor):
        return value
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()


def _map(value: Any, change: Any) -> Any:
    """The same, with each tensor or array in lists and dicts changed."""
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return change(value)


def _result(future: Future[Any], what: str) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        reason = "a process ended; was it killed, or out of memory? (A script needs `if __name__ == '__main__':`)"
        raise RuntimeError(f"{what}: {reason}") from error
    except Exception as error:
        raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error

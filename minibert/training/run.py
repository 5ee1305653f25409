"""A run's directory: all that a run must not lose, in one place, for pretraining and fine-tuning.

run.json         every setting, and hashes of what the derived files were made of
checkpoint.pt    the state; the last one stays until the next is whole and on disk
metrics.jsonl    a JSON object a line, with its `step`
.lock            held by the process that writes

directory = RunDirectory(output)
settled = directory.settle("pretrain", given, defaults, resume=resume, may_change={"steps"})  # touches nothing
with directory.held():  # alone in it from here on
    directory.record(settled)
    if directory.has_checkpoint: state = directory.load()
    with Stop() as stop: ... directory.save(state); directory.log({"step": 1, "loss": 2.0})
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor

from minibert.weights import files

CHECKPOINT, METRICS, RECORD, LOCK = "checkpoint.pt", "metrics.jsonl", "run.json", ".lock"
LARGEST_SEED = 2**63 - 1
_FORMAT = 1


@dataclass(frozen=True)
class Settled:
    """What a run goes by. settings: all of them. resumes: whether it goes on with what is there. changes: a line for
    each setting that differs from the run's own before.
    """

    command: str
    settings: dict[str, Any]
    resumes: bool = False
    changes: tuple[str, ...] = ()


class RunDirectory:
    """The files of a run.

    Args:
        path: the directory; nothing is made before `held` is entered.
        writes: whether this process writes; of several, the first one. The others read only.
    """

    def __init__(self, path: str | os.PathLike[str], *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes

    @classmethod
    def of(cls, path: str | os.PathLike[str] | RunDirectory, *, writes: bool = True) -> RunDirectory:
        """A RunDirectory as it is, anything else as the path of one."""
        return path if isinstance(path, RunDirectory) else cls(path, writes=writes)

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint.is_file()

    # Settings

    def settle(
        self,
        command: str,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        *,
        resume: bool,
        may_change: Collection[str] = (),
    ) -> Settled:
        """Decide on all settings, from what is given now, what the run was begun with, and the defaults. Only reads.

        Settings are what JSON holds. A run that resumes keeps its own, except for those `given` whose names are in
        `may_change`.

        Raises ValueError if a new run is asked for where there is one, or if what is given contradicts the run that
        is there, naming each such option; FileNotFoundError if there is nothing to resume, NotADirectoryError where the
        directory cannot be one.
        """
        self._check_place()
        given, defaults = _as_json(given), _as_json(defaults)
        if not resume:
            self._refuse_another()
            return Settled(command, {**defaults, **given})
        record = self._read()
        if not record and not self.has_checkpoint:
            raise FileNotFoundError(f"nothing to resume in {self.path}: no {RECORD} and no {CHECKPOINT}")
        if record.get("command", command) != command:
            raise ValueError(f"{self.path} holds a run of `minibert {record['command']}`, not of `minibert {command}`")
        before = {**defaults, **record.get("settings", {})} if record else {**defaults, **given}
        different = [name for name, value in given.items() if before.get(name) != value]
        if refused := [name for name in different if name not in may_change]:
            said = "; ".join(
                f"{_option(name)} was {_shown(before.get(name))}, not {_shown(given[name])}" for name in refused
            )
            raise ValueError(f"{self.path} holds a run that cannot go on with other settings: {said}")
        changes = [
            f"{_option(name)} is {_shown(given[name])} from here on, and was {_shown(before.get(name))}"
            for name in different
        ]
        return Settled(command, {**before, **given}, True, tuple(changes))

    def record(self, settled: Settled) -> None:
        """Write the settings down, within `held`.

        Raises ValueError if another process has put a run here since they were settled.
        """
        if self.writes and not settled.resumes:
            self._refuse_another()
        self._update({"format": _FORMAT, "command": settled.command, "settings": settled.settings})

    def _check_place(self) -> None:
        for path in (self.path, *self.path.parents):
            if path.is_dir():
                return
            if path.exists() or path.is_symlink():
                what = "a file" if path.exists() else "a link to nothing"
                raise NotADirectoryError(f"{path} is {what}: name a directory for the run")

    def _refuse_another(self) -> None:
        if self.has_checkpoint:
            raise ValueError(f"{self.path} already holds a run: give --resume to go on with it, or another --output")

    def _read(self) -> dict[str, Any]:
        """What run.json holds; nothing where there is none."""
        path = self.path / RECORD
        if not path.is_file():
            return {}
        try:
            record = json.loads(path.read_bytes())
            if not isinstance(record, dict):
                raise ValueError("must be an object")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if record.get("format") != _FORMAT:
            raise ValueError(f"{path} has format {record.get('format')!r}, this version reads format {_FORMAT}")
        return record

    def _update(self, changes: Mapping[str, Any]) -> None:
        if self.writes:
            files.write(self.path / RECORD, json.dumps({**self._read(), **changes}, indent=1, allow_nan=False) + "\n")

    # Files made of others

    def is_made_of(self, name: str, sources: Mapping[str, Any]) -> bool:
        """Whether the derived file or directory `name` is there, made of these sources (hashes and settings)."""
        return (self.path / name).exists() and self.sources_of(name) == _as_json(sources)

    def sources_of(self, name: str) -> dict[str, Any] | None:
        """What a derived file or directory was made of; None if nobody has said."""
        return self._read().get("derived", {}).get(name)

    def made(self, name: str, sources: Mapping[str, Any]) -> None:
        """Write down what `name` was made of, once it is whole. What is made of it in turn has this in its hash."""
        self._update({"derived": {**self._read().get("derived", {}), name: _as_json(sources)}})

    # State

    def save(self, state: Mapping[str, Any]) -> None:
        """Make `state` the checkpoint, in one step and on disk. Every process checks it, the one that writes writes.

        Raises ValueError for a tensor or number that is not finite, and OSError if it cannot be written; in both cases
        the checkpoint before stays.
        """
        if (name := first_not_finite(state)) is not None:
            raise ValueError(f"{name} is not finite any more: {self._kept()}; try a lower learning rate")
        if not self.writes:
            return
        try:
            with self.held(), files.replacing(self.checkpoint) as partial, partial.open("wb") as file:
                _torch_save(dict(state), file)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: the checkpoint could not be written; {self._kept()}", str(self.path)
            ) from error

    def load(self) -> dict[str, Any]:
        """The state of the checkpoint, on the CPU.

        Raises FileNotFoundError if there is none, ValueError if it is damaged.
        """
        if not self.has_checkpoint:
            raise FileNotFoundError(f"nothing to resume in {self.path}: no {CHECKPOINT}")
        try:
            return torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what its many readers raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.checkpoint} is damaged: {reason}") from error

    def check_finite(self, name: str, value: float, step: int) -> None:
        """Raise ValueError if a loss or a gradient is no number any more, which no further step would mend."""
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value} at step {step}: {self._kept()}; try a lower learning rate")

    def _kept(self) -> str:
        if not self.has_checkpoint:
            return "stopped, no checkpoint has been written"
        return f"stopped, {self.checkpoint} is the last good state"

    # Metrics

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to the metrics. What is not finite becomes null, which JSON knows."""
        if not self.writes:
            return
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {self._kept()}", str(self.metrics)) from error

    def cut_metrics(self, step: int) -> None:
        """Take back the lines after `step`, and what is no whole line: a kill or a full disk may tear one."""
        if self.writes and self.metrics.is_file():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.metrics) if record["step"] <= step]
            files.write(self.metrics, "".join(kept))

    # One at a time

    @contextmanager
    def held(self) -> Iterator[RunDirectory]:
        """Make the directory and keep other processes' runs out of it; may be entered again within itself.

        Raises ValueError if another process holds it, NotADirectoryError if it is a file, OSError if it cannot be made.
        """
        if not self.writes:
            yield self
            return
        self._check_place()
        self.path.mkdir(parents=True, exist_ok=True)
        first = not self._lock.is_locked
        try:
            lock = self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"{self.path} is in use by another process: wait for it, or name another output") from None
        with lock:
            if first:
                files.remove_partials(self.path)
            yield self

    @cached_property
    def _lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.path / LOCK, thread_local=False)


class Stop(AbstractContextManager["Stop"]):
    """Within this context SIGTERM and SIGINT only ask to stop: `asked` becomes the signal's number.

    Who trains looks at it after a step; of several processes, at the sum over all of them, so that all stop at the
    same step. In a thread, where Python cannot receive signals, it is never asked. May be entered within itself.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._depth, self._before = 0, {}

    def __enter__(self) -> Stop:
        self._depth += 1
        if self._depth > 1:
            return self
        self.asked, self._before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = number

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)


def exit_status(stopped_by: int) -> int:
    """The status with which a program ends that a signal stopped, as shells count: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + stopped_by if stopped_by else 0


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a kill or a full disk tore."""
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def seed_of(*words: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def check_seed(seed: int) -> None:
    """Raise ValueError for what is no seed."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed is {seed!r}, but must be a whole number from 0 to {LARGEST_SEED}")


def hash_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_not_finite(state: Any, name: str = "state") -> str | None:
    """The name of the first tensor or number in a nested state that holds NaN or infinity."""
    if isinstance(state, Tensor):
        return None if not state.is_floating_point() or bool(state.isfinite().all()) else name
    if isinstance(state, float):
        return None if math.isfinite(state) else name
    if isinstance(state, Mapping):
        state = state.items()
    elif isinstance(state, (list, tuple)):
        state = enumerate(state)
    else:
        return None
    return next((found for key, value in state if (found := first_not_finite(value, f"{name}.{key}"))), None)


def _torch_save(state: Any, file: Any) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer hides a full disk behind an error of its own
            raise error.__context__ from None
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from a JSON file. Raises ValueError for a number that JSON does not have."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be finite")
    return json.loads(json.dumps(dict(values), allow_nan=False))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

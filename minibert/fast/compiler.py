"""What is compiled for this CPU: where it is kept, what its name depends on, and by which compiler."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock

logger = logging.getLogger("minibert")
T = TypeVar("T")


class CannotCompileError(RuntimeError):
    """Why nothing is compiled."""


def directory() -> Path:
    """Where it is kept."""
    own, shared = os.environ.get("MINIBERT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own, "compiled")
    return Path(shared, "minibert", "compiled") if shared else Path.home() / ".cache" / "minibert" / "compiled"


def fingerprint(*facts: object) -> str:
    """A name for what is compiled from these facts, for this CPU, by this version of torch."""
    everything = [*facts, torch.__version__, sys.platform, *cpu()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:24]


def compilers() -> list[str]:
    """Names of C++ compilers, first the one to take."""
    return [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]


def compiler_obstacle() -> str:
    """Why nothing can be compiled here, or ""."""
    if not sys.executable:
        return "this Python cannot start another"
    if not any(map(shutil.which, compilers())):
        return f"there is no C++ compiler ({', '.join(compilers())})"
    return ""


def once(name: str, what: str, seconds: int, find: Callable[[], T | None], compile: Callable[[], T]) -> T:
    """What `find` gives, compiled if that is nothing; of several processes at once, one compiles.

    what, seconds: for the line that says so before. Raises CannotCompileError: no compiler, one that fails, or a
    directory that cannot be written to.
    """
    if found := find():
        return found
    if obstacle := compiler_obstacle():
        raise CannotCompileError(obstacle)
    logger.warning("compiling %s for this CPU: about %d s, once; kept in %s", what, seconds, directory())
    try:
        directory().mkdir(parents=True, exist_ok=True)
        with FileLock(directory() / f"{name}.lock"):
            return find() or compile()
    except OSError as failure:
        raise CannotCompileError(f"{directory()} cannot be written to ({failure})") from failure


def run(command: list[str], result: Path, environment: Mapping[str, str] | None = None) -> bytes:
    """What a command writes to the file `result`. Raises CannotCompileError, with its last line, if it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CannotCompileError(f"the compiler failed: {last:.200}")
    return result.read_bytes()


@cache
def cpu() -> tuple[str, ...]:
    """What code is compiled for: two machines that share a home directory need not share instructions."""
    facts = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return (*facts, platform.processor())
    for wanted in ("model name", "flags", "Features"):
        facts += next(([line] for line in lines if line.startswith(wanted)), [])
    return tuple(facts)


def hash_of(*names: str) -> str:
    """A hash of files beside this one."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()

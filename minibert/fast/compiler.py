"""What is compiled for this CPU: where it is kept, what its name depends on, and by which compiler."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path

import torch


class CannotCompileError(RuntimeError):
    """Why there is no compiled pass."""


def directory() -> Path:
    """Where packages are kept."""
    own, shared = os.environ.get("MINIBERT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own, "compiled")
    return Path(shared, "minibert", "compiled") if shared else Path.home() / ".cache" / "minibert" / "compiled"


def fingerprint(*facts: object) -> str:
    """A name for what is compiled from these facts, for this CPU, by this version of torch."""
    everything = [*facts, torch.__version__, sys.platform, *cpu()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:24]


def compiler_obstacle() -> str:
    """Why nothing can be compiled here, or ""."""
    if not sys.executable:
        return "this Python cannot start another"
    compilers = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in compilers):
        return f"there is no C++ compiler ({', '.join(compilers)})"
    return ""


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

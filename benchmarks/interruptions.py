"""Pretraining that is interrupted at random moments ends in the bits of a run that was not.

    python benchmarks/interruptions.py sigterm [--moments 20]   two processes (gloo); SIGTERM to one, to the other, to
                                                                both; --torchrun starts them as users do
    python benchmarks/interruptions.py sigkill [--moments 20] [--disk DIR]   one process; SIGKILL, and in every fourth
                                                                round a full disk: DIR is a small file system

After each interruption there must be one whole checkpoint, and the run goes on with `--resume --output DIR` alone. Ends
with status 1 if anything is lost, hangs for more than two minutes, or differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minibert import cli

OPTIONS = (
    "--vocab-size 120 --layers 2 --hidden-size 64 --max-length 32 --rows 8 --log-every 1 --save-every 7 "
    "--validate-every 50 --validation-rows 16 --learning-rate 1e-3 --packed"
).split()
PATIENCE = 120  # seconds until a run that was interrupted counts as hanging


def write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    documents = ["\n".join(" ".join(draw.choices(words, k=8)) + "." for _ in range(8)) for _ in range(60)]
    path.write_text("\n\n".join(documents))


@dataclass
class Job:
    """Processes of one run: children of this program by rank, or torchrun with its own."""

    pids: dict[int, int]
    told: Path
    torchrun: subprocess.Popen[bytes] | None = None
    statuses: dict[int, int] = field(default_factory=dict)

    def is_over(self) -> bool:
        """Whether all of them have ended."""
        if self.torchrun is not None:
            return self.torchrun.poll() is not None
        for rank, pid in self.pids.items():
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def ranks(self) -> dict[int, int]:
        return self.pids if self.torchrun is None else children_of(self.torchrun.pid)

    def ended(self, what: str, patience: float = PATIENCE) -> tuple[int, str]:
        """The worst exit status, and what was told, once all have ended."""
        end = time.monotonic() + patience
        while not self.is_over():
            if time.monotonic() > end:
                for pid in self.ranks().values():
                    os.kill(pid, signal.SIGKILL)
                raise SystemExit(f"HANGS after {what}: {self.told.read_text()[-2000:]}")
            time.sleep(0.02)
        statuses = [self.torchrun.returncode] if self.torchrun is not None else list(self.statuses.values())
        return max(statuses, key=abs), self.told.read_text()


def start(*arguments: object, processes: int = 1, torchrun: bool = False) -> Job:
    """`minibert pretrain` in processes that are forked from this one, which spares them the import of torch."""
    told = Path(tempfile.mkstemp(suffix=".log")[1])
    words = ["pretrain", *map(str, arguments)]
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with told.open("wb") as file:
            return Job({}, told, subprocess.Popen([*command, "-m", "minibert", *words], stdout=file, stderr=file))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = {}
    for rank in range(processes):
        if pid := os.fork():
            pids[rank] = pid
            continue
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(os.open(told, os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        status = 1
        try:
            status = cli.main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return Job(pids, told)


def children_of(parent: int) -> dict[int, int]:
    """The process ids of torchrun's processes, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            environment = dict(e.split("=", 1) for e in (path / "environ").read_text().split("\0") if "=" in e)
        except OSError:
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return found


def wait_for_steps(job: Job, metrics: Path) -> None:
    """Until the run has written a line of metrics, or ended."""
    size = metrics.stat().st_size if metrics.is_file() else 0
    end = time.monotonic() + PATIENCE
    while not job.is_over() and time.monotonic() < end:
        if metrics.is_file() and metrics.stat().st_size != size:
            return
        time.sleep(0.02)


def checkpoint(output: Path) -> dict | None:
    """The state, which must be whole if it is there at all."""
    path = output / "checkpoint.pt"
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    assert all(v.isfinite().all() for values in state["parameters"].values() for v in values.values())
    return state


def compare(one: Path, other: Path) -> None:
    first, second = checkpoint(one), checkpoint(other)
    assert first is not None
    assert second is not None
    assert first["step"] == second["step"]
    for name, values in first["parameters"].items():
        for key, value in values.items():
            if not torch.equal(value, second["parameters"][name][key]):
                raise SystemExit(f"DIFFERS: {name} {key}")
    print(f"step {first['step']}: all {len(first['parameters'])} parameters and AdamW's states equal to the bit")


def sigterm(directory: Path, moments: int, steps: int, draw: random.Random, torchrun: bool) -> None:
    text, whole, broken = directory / "text.txt", directory / "whole", directory / "broken"
    write_text(text)
    two = {"processes": 2, "torchrun": torchrun}
    began = [text, "--validation", text, *OPTIONS, "--steps", steps]
    assert start(*began, "--output", whole, **two).ended("the whole run", 3600)[0] == 0
    for moment in range(moments):
        targets = [(0,), (1,), (0, 1)][moment % 3]
        job = start(*(["--resume"] if broken.exists() else began), "--output", broken, **two)
        wait_for_steps(job, broken / "metrics.jsonl")
        time.sleep(draw.random())
        ranks = job.ranks()
        for rank in targets:
            os.kill(ranks[rank], signal.SIGTERM)
        status, told = job.ended(f"SIGTERM to {targets}")
        state = checkpoint(broken)
        print(f"{moment + 1:2}: SIGTERM to {targets}: status {status}, at step {state and state['step']}", flush=True)
        assert status != 0, told
        assert state is not None, told
        assert state["step"] < steps, "it ended before it was stopped: give more --steps"
    assert start("--resume", "--output", broken, **two).ended("the last resumption", 3600)[0] == 0
    compare(whole, broken)


def sigkill(directory: Path, moments: int, steps: int, draw: random.Random, disk: Path) -> None:
    text, whole, broken, filler = directory / "text.txt", directory / "whole", disk / "broken", disk / "filler"
    write_text(text)
    began = [text, "--validation", text, *OPTIONS, "--steps", steps]
    assert start(*began, "--output", whole).ended("the whole run", 3600)[0] == 0
    for moment in range(moments):
        full, early = moment % 4 == 3, moment % 5 == 0
        before = checkpoint(broken)
        job = start(*(["--resume"] if (broken / "run.json").exists() else began), "--output", broken)
        if not early:  # otherwise while it makes its data, or reads its checkpoint
            wait_for_steps(job, broken / "metrics.jsonl")
        time.sleep(draw.random())
        if full:
            fill(disk, filler)
            status, told = job.ended("a full disk")
            filler.unlink()
            assert status == 1, (status, told)
            assert "No space left" in told, told
            assert "Traceback" not in told, told
            last = told.strip().splitlines()[-1:]
        else:
            os.kill(job.pids[0], signal.SIGKILL)
            status, last = job.ended("SIGKILL")[0], []
        state = checkpoint(broken)
        what = "full disk" if full else "SIGKILL"
        print(
            f"{moment + 1:2}: {what}: status {status}, checkpoint of step {state and state['step']}", *last, flush=True
        )
        assert before is None or (state is not None and state["step"] >= before["step"])
        assert len(list(broken.glob(".*.partial"))) <= 1
    assert start("--resume", "--output", broken).ended("the last resumption", 3600)[0] == 0
    assert not list(broken.glob(".*.partial"))
    compare(whole, broken)


def fill(disk: Path, filler: Path) -> None:
    """Leave no room for a checkpoint."""
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(disk).free) > 30_000:
            file.write(b"x" * max(1, min(free - 20_000, 1 << 20)))
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("sigterm", "sigkill"))
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2000, help="more than all moments together take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchrun", action="store_true", help="start the two processes with torchrun; slow to begin")
    parser.add_argument("--disk", type=Path, help="a small file system (mount -t tmpfs -o size=4m tmpfs DIR)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    torch.set_num_threads(1)  # or two processes on two cores get in each other's way
    with tempfile.TemporaryDirectory() as directory:
        if arguments.how == "sigterm":
            sigterm(Path(directory), arguments.moments, arguments.steps, draw, arguments.torchrun)
        else:
            sigkill(Path(directory), arguments.moments, arguments.steps, draw, arguments.disk or Path(directory))


if __name__ == "__main__":
    main()

"""Pretraining that is interrupted at random moments ends in the bits of a run that was not.

    python benchmarks/interruptions.py sigterm [--moments 20]   two processes of torchrun (gloo); SIGTERM to one, to the
                                                                other, to both
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

OPTIONS = (
    "--vocab-size 120 --layers 2 --hidden-size 64 --max-length 32 --rows 8 --log-every 1 --save-every 7 "
    "--validate-every 50 --validation-rows 16 --learning-rate 1e-3 --packed"
).split()
PATIENCE = 120  # seconds until a run counts as hanging


def write_text(path: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(200)]
    documents = ["\n".join(" ".join(draw.choices(words, k=8)) + "." for _ in range(8)) for _ in range(60)]
    path.write_text("\n\n".join(documents))


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "minibert", "pretrain", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    # A session of its own, so that whatever is left of it can be ended by its group
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ranks_of(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of torchrun's processes, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) != process.pid:
                continue
            environment = dict(e.split("=", 1) for e in (path / "environ").read_text().split("\0") if "=" in e)
        except OSError:
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(path.name)
    return found


def wait_for_steps(process: subprocess.Popen[str], metrics: Path) -> None:
    """Until the run has written a line of metrics, or ended."""
    size = metrics.stat().st_size if metrics.is_file() else 0
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        if metrics.is_file() and metrics.stat().st_size != size:
            return
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], what: str) -> tuple[int, str]:
    try:
        _, told = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit(f"HANGS after {what}") from None
    return process.returncode, told


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


def sigterm(directory: Path, moments: int, steps: int, draw: random.Random) -> None:
    text, whole, broken = directory / "text.txt", directory / "whole", directory / "broken"
    write_text(text)
    began = [text, "--validation", text, *OPTIONS, "--steps", steps]
    assert ended(start(*began, "--output", whole, processes=2), "the whole run")[0] == 0
    for moment in range(moments):
        targets = [(0,), (1,), (0, 1)][moment % 3]
        how = ["--resume"] if broken.exists() else began
        process = start(*how, "--output", broken, processes=2)
        wait_for_steps(process, broken / "metrics.jsonl")
        time.sleep(draw.random())
        ranks = ranks_of(process)
        for rank in targets:
            if rank in ranks:
                os.kill(ranks[rank], signal.SIGTERM)
        status, told = ended(process, f"SIGTERM to {targets}")
        state = checkpoint(broken)
        print(f"{moment + 1:2}: SIGTERM to {targets}: status {status}, stopped at step {state and state['step']}")
        assert ranks, told
        assert status != 0, told
        assert state is not None, told
        assert state["step"] < steps, "it ended before it was stopped: give more --steps"
    assert ended(start("--resume", "--output", broken, processes=2), "the last resumption")[0] == 0
    compare(whole, broken)


def sigkill(directory: Path, moments: int, steps: int, draw: random.Random, disk: Path) -> None:
    text, whole, broken, filler = directory / "text.txt", directory / "whole", disk / "broken", disk / "filler"
    write_text(text)
    began = [text, "--validation", text, *OPTIONS, "--steps", steps]
    assert ended(start(*began, "--output", whole), "the whole run")[0] == 0
    for moment in range(moments):
        full = moment % 4 == 3
        before = checkpoint(broken)
        process = start(*(["--resume"] if (broken / "run.json").exists() else began), "--output", broken)
        if moment % 5:  # otherwise while it starts, or makes its data
            wait_for_steps(process, broken / "metrics.jsonl")
        time.sleep(draw.random() * (1 if moment % 5 else 6))
        if full:
            with filler.open("wb") as file:
                while (free := shutil.disk_usage(disk).free) > 30_000:
                    file.write(b"x" * max(1, min(free - 20_000, 1 << 20)))
                    file.flush()
            status, told = ended(process, "a full disk")
            filler.unlink()
            last = told.strip().splitlines()[-1:]
            assert status == 1, (status, told)
            assert "No space left" in told, told
            assert "Traceback" not in told, told
        else:
            process.kill()
            status, last = ended(process, "SIGKILL")[0], []
        state = checkpoint(broken)
        what = "full disk" if full else "SIGKILL"
        print(f"{moment + 1:2}: {what}: status {status}, checkpoint of step {state and state['step']}", *last)
        assert before is None or (state is not None and state["step"] >= before["step"])
        assert len(list(broken.glob(".*.partial"))) <= 1
    assert ended(start("--resume", "--output", broken), "the last resumption")[0] == 0
    assert not list(broken.glob(".*.partial"))
    compare(whole, broken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("sigterm", "sigkill"))
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4000, help="more than all moments together take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="a small file system (mount -t tmpfs -o size=4m tmpfs DIR)")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        if arguments.how == "sigterm":
            sigterm(Path(directory), arguments.moments, arguments.steps, draw)
        else:
            sigkill(Path(directory), arguments.moments, arguments.steps, draw, arguments.disk or Path(directory))


if __name__ == "__main__":
    main()

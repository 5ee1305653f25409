"""Two processes (gloo, started by torchrun) train as one does: in float64, where no rounding hides a slip."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import training_job
from training_job import make_corpus

from minibert.pretraining.corpus import Corpus
from minibert.training.distributed import TIMEOUT, World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Corpus, output: Path, *options: str, processes: int = 1) -> list[dict[str, float]]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += [training_job.__file__, str(corpus.directory), str(output)]
    command += ["--dropout", "0", "--rows", "16", "--double", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def values(records: list[dict[str, float]], ending: str) -> list[float]:
    return [value for record in records for name, value in record.items() if name.endswith(ending)]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    train(corpus, output, "--steps", "10")
    return output


@pytest.mark.parametrize(
    "options", [[], ["--fsdp"], ["--accumulate", "2"], ["--fsdp", "--accumulate", "2", "--gradient-checkpointing"]],
    ids=["ddp", "fsdp", "ddp-accumulated", "fsdp-accumulated-checkpointed"],
)  # fmt: skip
def test_two_processes_train_as_one(corpus, alone, tmp_path, options):
    one = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    two = train(corpus, tmp_path, "--steps", "10", *options, processes=2)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for ending in ("loss", "accuracy", "grad_norm"):
        assert values(two, ending) == pytest.approx(values(one, ending), rel=1e-9, abs=1e-9)


def test_packed_pairs_on_two_processes(corpus, tmp_path):
    one = train(corpus, tmp_path / "one", "--steps", "5", "--packed")
    two = train(corpus, tmp_path / "two", "--steps", "5", "--packed", processes=2)
    assert values(two, "loss") == pytest.approx(values(one, "loss"), rel=1e-9)


@pytest.mark.parametrize("first", [["--fsdp"], []], ids=["fsdp", "ddp"])
def test_a_checkpoint_of_two_processes_goes_on_with_one(corpus, alone, tmp_path, first):
    train(corpus, tmp_path, "--steps", "10", "--kill-at", "4", "--send", "15", *first, processes=2)
    stopped = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 4 <= stopped["step"] <= 6
    train(corpus, tmp_path, "--steps", "10", "--resume")
    ended, whole = (torch.load(path / "checkpoint.pt", weights_only=True)["parameters"] for path in (tmp_path, alone))
    for name, values_ in whole.items():
        # A key's bias has no gradient but rounding, which Adam makes as large as any: softmax does not see that bias
        same = torch.allclose(ended[name]["value"], values_["value"], rtol=1e-6, atol=1e-9)
        assert same or name.endswith("key.bias"), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_at_the_same_step(corpus, tmp_path, rank):
    """It neither hangs nor loses the signal, and what was saved goes on to the same end as a run without a stop."""
    common = ["--steps", "10", "--save-every", "100"]
    train(corpus, tmp_path / "whole", *common, processes=2)
    train(corpus, tmp_path / "run", *common, "--kill-at", "4", "--send", "15", "--rank", str(rank), processes=2)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 5  # told in the next step's sum
    train(corpus, tmp_path / "run", *common, "--resume", processes=2)
    one, other = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True)["parameters"] for n in ("whole", "run"))
    assert all(torch.equal(value, other[name][key]) for name, values_ in one.items() for key, value in values_.items())


def test_the_others_wait_for_the_first_process_longer_than_a_timeout(monkeypatch):
    """While it tokenizes a corpus, say: not at a barrier, whose timeout is one of minutes."""
    store, told = dist.HashStore(), []
    first, second = World(0, 2, store=store), World(1, 2, store=store)
    waiting = threading.Thread(target=lambda: (second.first("data", lambda: told.append("never")), told.append("on")))
    waiting.start()
    time.sleep(0.5)
    assert told == []
    first.first("data", lambda: told.append("made"))
    waiting.join(timeout=30)
    assert told == ["made", "on"]
    assert timedelta(minutes=1) <= TIMEOUT <= timedelta(minutes=30)

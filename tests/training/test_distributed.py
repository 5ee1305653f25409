"""Two processes (gloo, started by torchrun) train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_job
from training_job import make_corpus

from minibert.pretraining.corpus import Corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Corpus, output: Path, *options: str, processes: int = 1) -> list[dict[str, float]]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += [training_job.__file__, str(corpus.directory), str(output), "--dropout", "0", "--rows", "16", *options]
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
        assert values(two, ending) == pytest.approx(values(one, ending), rel=2e-4, abs=2e-4)


def test_packed_pairs_on_two_processes(corpus, tmp_path):
    one = train(corpus, tmp_path / "one", "--steps", "5", "--packed")
    two = train(corpus, tmp_path / "two", "--steps", "5", "--packed", processes=2)
    assert values(two, "loss") == pytest.approx(values(one, "loss"), rel=2e-4)


@pytest.mark.parametrize("first", [["--fsdp"], []], ids=["fsdp", "ddp"])
def test_a_checkpoint_of_two_processes_goes_on_with_one(corpus, alone, tmp_path, first):
    train(corpus, tmp_path, "--steps", "10", "--kill-at", "4", "--send", "15", *first, processes=2)
    stopped = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 4 <= stopped["step"] <= 6
    train(corpus, tmp_path, "--steps", "10", "--resume")
    ended, whole = (torch.load(path / "checkpoint.pt", weights_only=True)["parameters"] for path in (tmp_path, alone))
    for name, values_ in whole.items():
        assert torch.allclose(ended[name]["value"], values_["value"], rtol=1e-2, atol=2e-3), name

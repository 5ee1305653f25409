"""A run of fine-tuning that is stopped, killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal

import finetune_case as case
import pytest
import torch
from finetune_case import assert_same_end, metrics_of, parameters_of, run

from minibert import cli
from minibert.finetuning import loop


def resume(directory, *more) -> int:
    return cli.main(["finetune", "--resume", "--output", str(directory), *map(str, more)])


def test_a_seed_decides(start, trained, tmp_path):
    for name, seed in (("same", "0"), ("other", "1")):
        files = (trained / "train.csv", trained / "dev.csv")
        assert run(start, tmp_path / name, *files, "classification", "--seed", seed) == 0
    assert_same_end(trained / "run", tmp_path / "same")
    different = parameters_of(tmp_path / "other")
    assert any(not torch.equal(value, different[name]) for name, value in parameters_of(tmp_path / "same").items())


@pytest.mark.parametrize("stop", [5, 13, 20])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, "crash"])
def test_resumed_runs_end_in_the_same_bits(start, trained, tmp_path, monkeypatch, stop, how, capsys):
    """Interrupted after a step, or killed with an older checkpoint (of the epoch before, or every 4 steps).

    Nothing but the directory is needed to go on: the run remembers the rest.
    """
    step = loop.FineTuning.train_step

    def interrupted(self):
        loss = step(self)
        if self.step == stop and how != "crash":
            os.kill(os.getpid(), how)
        elif self.step == stop:
            raise KeyError("the machine is gone")
        return loss

    arguments = (trained / "train.csv", trained / "dev.csv", "classification", "--save-every", "4")
    with monkeypatch.context() as patched:
        patched.setattr(loop.FineTuning, "train_step", interrupted)
        if how == "crash":
            assert run(start, tmp_path / "run", *arguments) == 1
        else:
            assert run(start, tmp_path / "run", *arguments) == 128 + how
            assert f"stopped at step {stop} of 39" in capsys.readouterr().out
    assert run(start, tmp_path / "run", *arguments) == 1
    assert "already holds a run: give --resume" in capsys.readouterr().err
    assert resume(tmp_path / "run") == 0
    assert_same_end(trained / "run", tmp_path / "run")


def test_the_best_epoch_before_the_stop_stays_the_best(start, trained, tmp_path, monkeypatch):
    """Epochs after it that are worse do not take its place, in the state or in the model that is kept."""
    scores, step = {1: 0.9, 2: 0.5, 3: 0.7}, loop.FineTuning.train_step

    def interrupted(self):
        loss = step(self)
        if self.step == 15:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(loop.FineTuning, "validate", lambda self: {"accuracy": scores[self.step // self.epoch_steps]})
    arguments = (trained / "train.csv", trained / "dev.csv", "classification")
    with monkeypatch.context() as patched:
        patched.setattr(loop.FineTuning, "train_step", interrupted)
        assert run(start, tmp_path / "run", *arguments) == 130
    kept = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert resume(tmp_path / "run") == 0
    assert [line["accuracy"] for line in metrics_of(tmp_path / "run")] == [0.9, 0.5, 0.7]
    best = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["best"]
    assert (best["epoch"], best["accuracy"]) == (1, 0.9)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == kept


def test_more_epochs(start, trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    assert resume(tmp_path / "run", "--epochs", 5) == 0
    assert "--epochs is 5 from here on, and was 3" in capsys.readouterr().out
    assert [line["epoch"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert metrics_of(tmp_path / "run")[:3] == metrics_of(trained / "run")
    assert resume(tmp_path / "run", "--epochs", 2) == 1
    assert "past the last of 26" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"]["epochs"] == 5


def test_files_may_move_but_not_change(start, trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    for name in ("train.csv", "dev.csv"):
        shutil.copy(trained / name, tmp_path / f"moved-{name}")
    moved = ("--train", tmp_path / "moved-train.csv", "--validation", tmp_path / "moved-dev.csv")
    assert resume(tmp_path / "run", *moved) == 0
    for name, what in (("train.csv", "to learn from"), ("dev.csv", "to validate on")):
        changed = case.weather(tmp_path / f"changed-{name}", 200, 5)
        given = {"--train": moved[1], "--validation": moved[3]}
        given["--train" if name == "train.csv" else "--validation"] = changed
        assert resume(tmp_path / "run", *(part for pair in given.items() for part in pair)) == 1
        assert f"was trained with other examples or labels ({what})" in capsys.readouterr().err


def test_labels_are_not_renamed(start, trained, tmp_path, capsys):
    """The numbers are the same, but the best epoch's model has other names for them."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_text((trained / name).read_text().replace(",good\n", ",fine\n"))
    given = ("--train", tmp_path / "train.csv", "--validation", tmp_path / "dev.csv", "--epochs", 4)
    assert resume(tmp_path / "run", *given) == 1
    assert "was trained with other names of labels" in capsys.readouterr().err


def test_the_tokenizer_does_not_change(trained, tmp_path, capsys):
    """Not even by words that the examples do not have: it is saved with the model."""
    begun = case.make_start(tmp_path / "start")
    files = (trained / "train.csv", trained / "dev.csv")
    assert run(begun, tmp_path / "run", *files, "classification", "--epochs", "1") == 0
    for path in (begun / "tokenizer.json", begun / "vocab.txt"):
        path.write_text(path.read_text().replace("paris", "prague"))
    capsys.readouterr()
    assert resume(tmp_path / "run", "--epochs", 2) == 1
    assert "was trained with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "8"], "--batch-size was 16, not 8"),
        (["--max-length", "8"], "--max-length was not given, not 8"),
        (["--task", "tagging"], "--task was classification, not tagging"),
        (["--seed", "1"], "--seed was 0, not 1"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(trained, capsys, more, message):
    before = (trained / "run/checkpoint.pt").read_bytes()
    assert resume(trained / "run", *more) == 1
    assert message in capsys.readouterr().err
    assert (trained / "run/checkpoint.pt").read_bytes() == before


def test_nothing_to_resume(tmp_path, capsys):
    assert resume(tmp_path / "none") == 1
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()

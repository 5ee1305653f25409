"""The directory of a run: settings, checkpoint, metrics, signals, one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from minibert.training import run
from minibert.training.run import RunDirectory, Stop, check_seed, exit_status, first_not_finite, read_metrics, seed_of

DEFAULTS = {"steps": 10, "rate": 0.1, "betas": (0.9, 0.99), "text": None}


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def begin(directory: RunDirectory, **given) -> None:
    with directory.held():
        directory.record(directory.settle("train", given, DEFAULTS, resume=False))


def settle(directory: RunDirectory, command: str = "train", **given) -> run.Settled:
    return directory.settle(command, given, DEFAULTS, resume=True, may_change={"steps", "betas"})


def test_a_run_knows_all_its_settings(directory):
    begin(directory, rate=0.5, text="a")
    settled = settle(directory)
    assert settled.settings == {"steps": 10, "rate": 0.5, "betas": [0.9, 0.99], "text": "a"}
    assert settled.changes == ()
    assert settle(directory, rate=0.5, betas=(0.9, 0.99)).changes == ()


def test_defaults_of_another_version_do_not_matter(directory):
    begin(directory)
    settled = directory.settle("train", {}, {**DEFAULTS, "rate": 7.0, "new": 1}, resume=True)
    assert (settled.settings["rate"], settled.settings["new"]) == (0.1, 1)


def test_what_may_change_is_said_and_what_may_not_is_refused_by_name(directory):
    begin(directory)
    settled = settle(directory, steps=20, betas=[0.8, 0.9])
    assert settled.settings["steps"] == 20
    assert settled.changes == (
        "--steps is 20 from here on, and was 10",
        "--betas is 0.8 0.9 from here on, and was 0.9 0.99",
    )
    before = (directory.path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"--rate was 0\.1, not 0\.2; --text was not given, not b") as error:
        settle(directory, rate=0.2, text="b", steps=30)
    assert "--steps" not in str(error.value)
    assert (directory.path / "run.json").read_bytes() == before


def test_settings_are_numbers(directory):
    with pytest.raises(ValueError, match="rate is nan, but must be finite"):
        directory.settle("train", {"rate": float("nan")}, DEFAULTS, resume=False)


def test_what_cannot_be_resumed_or_begun(directory):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        settle(directory)
    assert not directory.path.exists()  # asking has made nothing
    begin(directory)
    with pytest.raises(ValueError, match="holds a run of `minibert train`, not of `minibert tune`"):
        settle(directory, "tune")
    directory.save({"step": 1})
    with pytest.raises(ValueError, match="already holds a run"):
        directory.settle("train", {}, DEFAULTS, resume=False)
    for content, message in (("{", "run.json is damaged"), ("[]", "damaged"), ('{"format": 99}', "format 99")):
        (directory.path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            settle(directory)


def test_derived_files_are_what_they_were_made_of(directory):
    begin(directory)
    vocab = directory.path / "vocab.txt"
    assert not directory.is_made_of("vocab.txt", {"text": "hash", "cased": False})
    vocab.write_text("a")
    assert not directory.is_made_of("vocab.txt", {"text": "hash", "cased": False})  # nobody said so
    directory.made("vocab.txt", {"text": "hash", "cased": False})
    assert directory.is_made_of("vocab.txt", {"text": "hash", "cased": False})
    assert not directory.is_made_of("vocab.txt", {"text": "hash", "cased": True})
    vocab.unlink()
    assert not directory.is_made_of("vocab.txt", {"text": "hash", "cased": False})


def test_a_checkpoint_comes_back(directory):
    begin(directory)
    directory.save({"step": 3, "tensor": torch.arange(3)})
    state = directory.load()
    assert state["step"] == 3
    assert torch.equal(state["tensor"], torch.arange(3))
    directory.checkpoint.write_bytes(directory.checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged"):
        directory.load()


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")]), torch.tensor(-torch.inf)]
)
def test_the_last_finite_checkpoint_stays(directory, bad):
    begin(directory)
    directory.save({"step": 1, "parameters": {"weight": {"value": 1.0}}})
    with pytest.raises(ValueError, match=r"state\.parameters\.weight\.value is not finite .*last good state"):
        directory.save({"step": 2, "parameters": {"weight": {"value": bad}}})
    assert directory.load()["step"] == 1


def test_finite_states(directory):
    assert first_not_finite({"a": [1, 2.0, torch.ones(2)], "b": None, "c": torch.tensor([1, 2]), "d": "nan"}) is None
    assert first_not_finite({"a": [1, (torch.full((2,), torch.inf),)]}) == "state.a.1.0"
    directory.check_finite("the loss", 1.0, 3)
    with pytest.raises(ValueError, match="the loss is nan at step 3: stopped, no checkpoint has been written"):
        directory.check_finite("the loss", float("nan"), 3)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_named_and_costs_nothing(directory, monkeypatch):
    begin(directory)
    directory.save({"step": 1})
    monkeypatch.setattr(run.files, "replacing", lambda path: nullcontext(Path("/dev/full")))
    message = r"No space left on device: the checkpoint could not be written; .*last good state"
    with pytest.raises(OSError, match=message):
        directory.save({"step": 2, "tensor": torch.zeros(100_000)})
    assert directory.load()["step"] == 1


def test_metrics_are_json_and_survive_a_torn_line(directory):
    begin(directory)
    for step in (1, 2, 3):
        directory.log({"step": step, "loss": float("nan") if step == 2 else 1.0, "all": [float("inf"), 2]})
    lines = directory.metrics.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in lines] == [1.0, None, 1.0]
    with directory.metrics.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(directory.metrics)] == [1, 2, 3]
    directory.log({"step": 5})  # no newline was there: this line is torn too
    directory.metrics.write_bytes(directory.metrics.read_bytes() + b"\0\0\0\xff\n")
    directory.cut_metrics(2)
    assert [json.loads(line)["step"] for line in directory.metrics.read_text().splitlines()] == [1, 2]


def test_one_process_at_a_time(directory):
    code = (
        "import sys; from minibert.training.run import RunDirectory\nwith RunDirectory(sys.argv[1]).held(): print('in')"
    )
    with directory.held(), directory.held():
        other = RunDirectory(directory.path)
        with pytest.raises(ValueError, match="is in use by another process"), other.held():
            pass
        with RunDirectory(directory.path, writes=False).held():
            pass
    ended = subprocess.run([sys.executable, "-c", code, str(directory.path)], capture_output=True, text=True)
    assert ended.stdout == "in\n"


def test_a_run_that_another_process_finished_meanwhile_stays(directory):
    """Between settling and writing lies all the reading and tokenizing."""
    slow = directory.settle("finetune", {"epochs": 3}, {}, resume=False)
    other = RunDirectory(directory.path)
    with other.held():
        other.record(other.settle("finetune", {"epochs": 2}, {}, resume=False))
        other.save({"step": 5})
    with directory.held(), pytest.raises(ValueError, match="already holds a run"):
        directory.record(slow)
    assert directory.settle("finetune", {}, {}, resume=True).settings == {"epochs": 2}
    assert directory.load()["step"] == 5


def test_leftovers_go_when_the_directory_is_taken(directory):
    directory.path.mkdir()
    left = directory.path / ".0123456789abcdef.partial"
    left.touch()
    with directory.held():
        assert not left.exists()
        left.touch()
        with directory.held():
            assert left.exists()  # may be somebody's own, by now


def test_a_file_is_no_directory(tmp_path):
    """Which is said before anything is read, and again before anything is written."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    for name, message in (("file", "is a file"), ("file/run", "file is a file"), ("link", "is a link to nothing")):
        for resume in (False, True):
            with pytest.raises(NotADirectoryError, match=message):
                RunDirectory(tmp_path / name).settle("pretrain", {}, {}, resume=resume)
        with pytest.raises(NotADirectoryError, match=message), RunDirectory(tmp_path / name).held():
            pass


def test_who_does_not_write_writes_nothing(tmp_path):
    other = RunDirectory(tmp_path / "run", writes=False)
    with other.held():
        other.record(run.Settled("train", {}))
        other.save({"step": 1})
        other.log({"step": 1})
        other.cut_metrics(1)
    assert not other.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_only_ask(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked == number
        with stop:
            pass
        os.kill(os.getpid(), number)  # still within the outer one
    assert signal.getsignal(number) == before
    assert exit_status(stop.asked) == 128 + number
    with stop:
        assert not stop.asked  # another fit, another chance
    assert exit_status(0) == 0


def test_in_a_thread_there_are_no_signals():
    asked = []

    def train() -> None:
        with Stop() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert asked == [0]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, None, "1"])
def test_no_seed(seed):
    with pytest.raises(ValueError, match="seed is .* from 0 to"):
        check_seed(seed)


def test_seeds():
    check_seed(0)
    check_seed(2**63 - 1)
    assert len({seed_of(0, 1), seed_of(1, 0), seed_of(0), seed_of(2**63 - 1, 1)}) == 4

"""What is asked for: refused before work begins where it cannot be done, and told in the way that was asked for."""

from __future__ import annotations

import json
import sys

import finetune_case as case
import numpy as np
import pytest
from finetune_case import NUMBER, metrics_of, run, weather

from minibert import cli
from minibert.finetuning import command
from minibert.finetuning.options import FineTuneSettings, Request
from minibert.finetuning.tasks import Classification


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "epochs is 0, but must be at least 1"),
        (["--batch-size", "-1"], "batch_size is -1, but must be at least 1"),
        (["--save-every", "0"], "save_every is 0, but must be at least 1"),
        (["--warmup", "1"], "warmup is 1.0, but must be from 0 to below 1"),
        (["--warmup", "nan"], "warmup is nan, but must be from 0 to below 1"),
        (["--learning-rate", "0"], "learning_rate is 0.0, but must be above 0 and finite"),
        (["--learning-rate", "nan"], "learning_rate is nan, but must be above 0 and finite"),
        (["--learning-rate", "inf"], "learning_rate is inf, but must be above 0 and finite"),
        (["--clip-norm", "0"], "clip_norm is 0.0, but must be above 0 and finite"),
        (["--clip-norm", "inf"], "clip_norm is inf, but must be above 0 and finite"),
        (["--weight-decay", "-0.1"], "weight_decay is -0.1, but must be at least 0 and finite"),
        (["--seed", "-1"], "seed is -1, but must be from 0 to"),
        (["--seed", str(2**63)], f"seed is {2**63}, but must be from 0 to"),
        (["--validation-share", "0.1"], "give either --validation FILE or --validation-share"),
        (["--max-length", "7"], "--max-length 7: must be at least 8"),
        (["--max-length", "64"], "--max-length 64: must be from 8 to 32, what the model takes"),
        (["--problem-type", NUMBER], "train.csv:2: the label must be a number, got"),
        (["--scheme", "IOB"], "--scheme is for --task tagging, not classification"),
        (["--doc-stride", "4"], "--doc-stride is for --task question-answering, not classification"),
        (["--negative-column", "x"], "--negative-column is for --task sentence-pairs, not classification"),
        (["--delimiter", "ab"], "--delimiter 'ab': must be one character other than a quote"),
        (["--text-column", "a", "--label-column", "a"], "two of the columns are the same: 'a', 'a'"),
        (["--no-header"], "--no-header: say by number where things are"),
        (["--text-column", "review"], "train.csv:1: the first line must name the columns review and label"),
        (["--task", "tagging"], "tagging reads CoNLL"),
        (["--task", "tagging", "--problem-type", NUMBER], "--problem-type is for --task classification, not tagging"),
        (["--task", "tagging", "--delimiter", ";"], "--delimiter is for --task classification or sentence-pairs, not"),
        (["--task", "tagging", "--text-column", "word"], "--text-column 'word': columns of CoNLL have numbers"),
        (["--task", "qa", "--label-column", "x"], "--label-column is for --task classification or tagging, not"),
        (
            ["--task", "qa", "--max-length", "16", "--doc-stride", "16"],
            "--doc-stride 16: must be below --max-length",
        ),
        (["--task", "qa", "--doc-stride", "-1"], "--doc-stride -1: must be at least 0"),
        (["--train", "none.csv"], "none.csv: no such file"),
        (["--train", "."], "a directory, not a file"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_refused_before_anything_is_done(start, trained, tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setattr("minibert.finetuning.loop.FineTuning.train_step", lambda job: pytest.fail("work has begun"))
    assert run(start, tmp_path / "run", trained / "train.csv", trained / "dev.csv", "classification", *more) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_must_be_given(tmp_path, capsys):
    for given, message in [
        ([], "give --task and --train (or --resume"),
        (["--task", "ner"], "give --train (or --resume"),
        (["--task", "ner", "--train", __file__], "give either --validation FILE or --validation-share"),
    ]:
        assert cli.main(["finetune", "--output", str(tmp_path / "run"), *given]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--output", str(tmp_path / "run"), "--task", "poetry"])
    assert "invalid choice" in capsys.readouterr().err


def test_json_has_neither_delimiter_nor_header(tmp_path):
    (tmp_path / "a.jsonl").touch()
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: is JSON by its name, which has no delimiter"):
        Request("classification", path, path, delimiter=";")
    with pytest.raises(ValueError, match="must be one of classification, tagging, question-answering, sentence-pairs"):
        Request("poetry", path, path)


def test_options_are_checked_without_torch(tmp_path, capsys, monkeypatch):
    """In the first moment: before the seconds that importing it takes."""
    monkeypatch.setitem(sys.modules, "minibert.finetuning.loop", None)
    (tmp_path / "a.csv").touch()
    given = ["--task", "classification", "--train", str(tmp_path / "a.csv"), "--validation-share", "2"]
    assert cli.main(["finetune", "--output", str(tmp_path / "run"), *given]) == 1
    assert "--validation-share 2.0: must be above 0 and below 1" in capsys.readouterr().err


def test_an_output_that_is_a_file(start, trained, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert run(start, tmp_path / "run", trained / "train.csv", trained / "dev.csv") == 1
    captured = capsys.readouterr()
    assert "run is a file: name a directory" in captured.err
    assert not captured.out  # nothing has been read
    assert (tmp_path / "run").read_text() == "mine"


def test_too_small_a_batch(start, tmp_path, capsys):
    assert FineTuneSettings(batch_size=1).batch_size == 1
    (tmp_path / "a.csv").write_text("text,text_pair\nsun,day\nrain,sky\n")
    path = tmp_path / "a.csv"
    assert run(start, tmp_path / "run", path, path, "sentence-pairs", "--batch-size", 1) == 1
    assert "batch_size is 1, but must be at least 2" in capsys.readouterr().err


# A share for validation


def test_a_share_of_the_training_file(start, trained, tmp_path, capsys):
    more = ("--validation-share", 0.2, "--epochs", 1)
    assert run(start, tmp_path / "run", trained / "train.csv", None, "classification", *more) == 0
    told = capsys.readouterr().out
    counts = [int(line.split(": ")[1].split()[0]) for line in told.splitlines() if "examples" in line]
    assert sum(counts) == 200
    assert abs(counts[1] - 40) <= 5
    assert "(to validate on)" in told


def test_how_examples_are_parted(tmp_path):
    """The same ones in any order; equal texts stay together; both sides have some."""
    task = Classification()
    lines = [f"{text},{label}" for text, label in zip([*"abcdefghij", *"aabbccdd"], "xy" * 9, strict=True)]
    path = tmp_path / "a.csv"
    sides = []
    for order in (lines, lines[::-1], np.random.default_rng(0).permutation(lines).tolist()):
        path.write_text("text,label\n" + "\n".join(order))
        train, validation = command.part(task.read(path), 0.3, task)
        assert len(train) + len(validation) == len(lines)
        assert not {e.text for e in train} & {e.text for e in validation}
        assert 3 <= len(validation) <= 8
        sides.append(sorted((e.text, e.label) for e in validation))
    assert sides[0] == sides[1] == sides[2]
    for share in (0.001, 0.999):
        assert all(command.part(task.read(path), share, task))
    path.write_text("text,label\na,x\na,y\n")
    with pytest.raises(ValueError, match="all 2 examples have the same text"):
        command.part(task.read(path), 0.5, task)


def test_labels_are_those_of_the_whole_file(start, tmp_path):
    """A rare label may be among the validation examples alone."""
    path = weather(tmp_path / "a.csv", 30, 0)
    path.write_text(path.read_text() + "".join(f"{word} sky,rare{word}\n" for word in case.WORDS))
    assert run(start, tmp_path / "run", path, None, "classification", "--validation-share", 0.4, "--epochs", 1) == 0


# What is told


def test_json_is_one_object(start, trained, tmp_path, capsys):
    assert run(start, tmp_path / "run", trained / "train.csv", trained / "dev.csv", "classification", "--json") == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert result["finished"] is True
    assert (result["step"], result["steps"], result["score"]) == (39, 39, "accuracy")
    assert result["best"] in metrics_of(tmp_path / "run")
    assert result["model"] == str(tmp_path / "run" / "model")
    assert "labels: bad, good" in told.err


def test_quiet_leaves_the_result(start, trained, tmp_path, capsys):
    more = ("classification", "--quiet", "--epochs", 1)
    assert run(start, tmp_path / "run", trained / "train.csv", trained / "dev.csv", *more) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.startswith("finished at step 13 of 13; best epoch 1: accuracy ")
    assert len(told.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_bars_are_for_terminals(start, trained, tmp_path, capsys, monkeypatch, terminal, quiet, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    more = ("classification", "--epochs", 1, *["--quiet"] * quiet)
    assert run(start, tmp_path / "run", trained / "train.csv", trained / "dev.csv", *more) == 0
    assert ("13/13" in capsys.readouterr().err) == shown

"""A pretraining run remembers itself, and refuses what cannot be before anything is touched."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minibert.heads import BertForPreTraining
from minibert.pretraining import prepare
from minibert.pretraining.command import add_arguments, run
from minibert.pretraining.corpus import Corpus
from minibert.text.tokenizer import BertTokenizer
from minibert.training.run import read_metrics

SIZES = "--vocab-size 90 --layers 1 --hidden-size 64 --max-length 32".split()
SMALL = [*SIZES, *"--rows 4 --steps 4 --log-every 1".split()]


@pytest.fixture
def text(tmp_path) -> Path:
    draw = random.Random(0)
    words = "Sun moon Star sky sea land tree Bird fish stone fire rain".split()
    documents = ["\n".join(" ".join(draw.choices(words, k=6)) + "." for _ in range(5)) for _ in range(8)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


def pretrain(*options: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(option) for option in options]))


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def step_of(output: Path) -> int:
    return torch.load(output / "checkpoint.pt", weights_only=True)["step"]


# --- a run that remembers itself


def test_the_directory_is_enough_to_go_on(text, tmp_path, monkeypatch, capsys):
    """Settings far from the defaults, from another directory, and the text is gone: the end is that of one run."""
    options = [*SIZES, *"--rows 4 --packed --learning-rate 0.01 --betas 0.8 0.95 --masked 0.3 --seed 7 --cased".split()]
    options += "--clip-norm 0.5 --warmup-steps 1 --log-every 1 --dropout 0.2 --whole-words --neighbours".split()
    monkeypatch.chdir(tmp_path)
    pretrain("text.txt", "--validation", "text.txt", "--output", "whole", *options, "--steps", 6)
    pretrain("text.txt", "--validation", "text.txt", "--output", "run", *options, "--steps", 3)
    text.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert pretrain("--resume", "--output", "../run") == 0  # all is done already
    assert "from here on" not in capsys.readouterr().out
    assert pretrain("--resume", "--output", "../run", "--steps", 6) == 0
    assert "--steps is 6 from here on, and was 3" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["steps"] == 6
    assert record["settings"]["betas"] == [0.8, 0.95]
    data = {name: torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["data"] for name in ("whole", "run")}
    assert data["whole"] == data["run"]
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in r] == [1, 2, 3, 4, 5, 6]


def test_a_stopped_run_ends_as_one_that_was_not(text, tmp_path, monkeypatch):
    options = [*SMALL, "--bf16", "--learning-rate", 0.01]
    pretrain(text, "--output", tmp_path / "whole", *options)
    from minibert.pretraining.loop import Run

    step = Run.train_step

    def stopping(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batches)

    monkeypatch.setattr(Run, "train_step", stopping)
    assert pretrain(text, "--output", tmp_path / "run", *options) == 130
    monkeypatch.undo()
    assert step_of(tmp_path / "run") == 3
    assert pretrain("--resume", "--output", tmp_path / "run") == 0
    one, other = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "run"))
    assert one["data"] == other["data"]
    for name, values in one["parameters"].items():
        assert all(torch.equal(value, other["parameters"][name][key]) for key, value in values.items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_and_saves(text, tmp_path, number):
    """Ctrl-C in a terminal reaches the processes that make batches too, a scheduler's SIGTERM as well."""
    output = tmp_path / "run"
    options = [*SIZES, *"--rows 4 --steps 100000 --log-every 1 --workers 2".split()]
    command = [sys.executable, "-m", "minibert", "pretrain", text, "--output", output, *options]
    process = subprocess.Popen(
        list(map(str, command)), start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number, told
    assert step_of(output) > 0
    assert "Traceback" not in told


def test_sigterm_has_a_status_of_its_own(text, tmp_path, monkeypatch):
    from minibert.pretraining.loop import Run

    step = Run.train_step
    monkeypatch.setattr(
        Run, "train_step", lambda self, batches: (os.kill(os.getpid(), signal.SIGTERM), step(self, batches))[1]
    )
    assert pretrain(text, "--output", tmp_path / "run", *SMALL) == 143
    assert step_of(tmp_path / "run") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--rows", 8], r"--rows was 4, not 8"),
        (["--seed", 1], r"--seed was 0, not 1"),
        (["--packed"], r"--packed was False, not True"),
        (["--layers", 2], r"--layers was 1, not 2"),
        (["--dropout", 0.0], r"--dropout was 0\.1, not 0\.0"),
        (["--cased"], r"--cased was False, not True"),
        (["--max-length", 16, "--rows", 2], r"--max-length was 32, not 16; --rows was 4, not 2|--rows .*--max-length"),
        (["--init", "somewhere"], r"--init was not given, not somewhere"),
    ],
)
def test_what_may_not_change(text, tmp_path, option, message):
    output = tmp_path / "run"
    pretrain(text, "--output", output, *SMALL)
    before = everything(output)
    with pytest.raises(ValueError, match=message):
        pretrain("--resume", "--output", output, *option)
    assert everything(output) == before


def test_another_text_is_refused_before_anything_is_touched(text, tmp_path):
    output, other = tmp_path / "run", tmp_path / "other.txt"
    pretrain(text, "--output", output, *SMALL)
    before = everything(output)
    other.write_text(text.read_text().replace("moon", "noom"))
    with pytest.raises(ValueError, match="holds a run on another text"):
        pretrain(other, "--output", output, "--resume", "--steps", 9)
    with pytest.raises(ValueError, match="--validation was"):
        pretrain("--output", output, "--resume", "--validation", other)
    assert everything(output) == before
    moved = tmp_path / "moved.txt"
    shutil.copyfile(text, moved)
    assert pretrain(moved, "--output", output, "--resume", "--steps", 5) == 0  # the same text in another place


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(text, tmp_path):
    output = tmp_path / "run"
    pretrain(text, "--output", output, *SMALL)
    whole = torch.load(output / "checkpoint.pt", weights_only=True)["parameters"]
    for name in ("checkpoint.pt", "data/train/corpus.json"):
        (output / name).unlink()
    assert pretrain("--resume", "--output", output) == 0
    again = torch.load(output / "checkpoint.pt", weights_only=True)["parameters"]
    assert all(torch.equal(values["value"], again[name]["value"]) for name, values in whole.items())
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4]


def test_torn_metrics_do_not_stop_it(text, tmp_path):
    output = tmp_path / "run"
    pretrain(text, "--output", output, *SMALL)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert pretrain("--resume", "--output", output, "--steps", 6) == 0
    assert [r["step"] for r in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


# --- derived files


def attempt(text: Path, output: Path) -> None:
    """A first run that got as far as its data, and was refused or killed then."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    named = vars(parser.parse_args([str(text), "--output", str(output), *SMALL]))
    given = {name: value for name, value in named.items() if value is not None and name not in ("output", "resume")}
    directory = prepare.RunDirectory(output)
    with directory.held():
        plan = prepare.plan(given, directory, resume=False)
        directory.record(plan.settled)
        prepare.make_data(plan, directory, progress=False)


@pytest.mark.parametrize(
    ("other", "right"),
    [
        (["--cased"], lambda pieces: "M" in "".join(pieces[5:])),
        (["--vocab-size", 60], lambda pieces: len(pieces) == 60),
        (["--limit-alphabet", 12, "--max-unknown", 1], lambda pieces: len({p for p in pieces if len(p) == 1}) == 12),
        ("another text", lambda pieces: "zzyzx" in pieces),
    ],
    ids=["casing", "size", "alphabet", "text"],
)
def test_the_vocabulary_is_that_of_this_run(text, tmp_path, other, right):
    """A first attempt that made a vocabulary must not leave it to another one."""
    text.write_text(text.read_text().replace("moon", "Moon"))
    output = tmp_path / "run"
    attempt(text, output)
    before = (output / "data/vocab.txt").read_text().split("\n")[:-1]
    assert not right(before)
    if other == "another text":
        text.write_text(text.read_text().replace("Moon", "zzyzx"))
    pretrain(text, "--output", output, *SMALL, *(other if other != "another text" else []))
    pieces = (output / "data/vocab.txt").read_text().split("\n")[:-1]
    assert right(pieces)
    assert Corpus(output / "data/train").tokenizer.get_vocab() == {piece: i for i, piece in enumerate(pieces)}
    if "--max-unknown" not in other:
        assert Corpus(output / "data/train").report.unknown_tokens == 0


def test_nothing_is_made_twice(text, tmp_path):
    output = tmp_path / "run"
    pretrain(text, "--output", output, *SMALL)
    (output / "checkpoint.pt").unlink()
    times = {path: path.stat().st_mtime_ns for path in (output / "data").rglob("*")}
    pretrain(text, "--output", output, *SMALL)
    assert {path: path.stat().st_mtime_ns for path in (output / "data").rglob("*")} == times


def test_a_vocabulary_of_another_language_stops_the_run(text, tmp_path):
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nкот\nпес\n", encoding="utf-8")
    with pytest.raises(ValueError, match="are unknown to the vocabulary"):
        pretrain(text, "--output", tmp_path / "run", "--vocab", vocab, *SMALL[2:])


# --- starting from a model


def first_model(text: Path, directory: Path, **changes: object) -> Path:
    pretrain(text, "--output", directory / "first", *SMALL)
    model = BertForPreTraining.from_pretrained(directory / "first/model", **changes)
    model.save_pretrained(directory / "start")
    BertTokenizer.from_pretrained(directory / "first/model").save_pretrained(directory / "start")
    return directory / "start"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains_in_float32(text, tmp_path, dtype):
    start = first_model(text, tmp_path, dtype=dtype)
    before = BertForPreTraining.from_pretrained(start, dtype=torch.float32)
    options = "--rows 4 --steps 3 --max-length 32 --learning-rate 1e-6 --warmup-steps 0".split()
    pretrain(text, "--output", tmp_path / "second", "--init", start, *options)
    after = BertForPreTraining.from_pretrained(tmp_path / "second/model")
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    moved = before.get_parameter(query) != after.get_parameter(query)
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize(
    "settings", [{"strip_accents": False}, {"tokenize_chinese_chars": False}, {"do_lower_case": False}], ids=str
)
def test_the_models_own_tokenizer_tokenizes_and_is_exported(text, tmp_path, settings):
    start = first_model(text, tmp_path)
    vocab = BertTokenizer.from_pretrained(start).get_vocab()
    tokenizer = BertTokenizer(vocab, **settings)
    tokenizer.add_tokens(["sunmoon"])
    model = BertForPreTraining.from_pretrained(start)
    model.resize_token_embeddings(len(tokenizer))
    for path in (start / "model.safetensors", start / "config.json"):
        path.unlink()
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    text.write_text(text.read_text().replace("moon", "sunmoon").replace("sky", "séa東京"), encoding="utf-8")
    options = ["--rows", 4, "--steps", 1, "--max-length", 32, "--max-unknown", 1]
    pretrain(text, "--output", tmp_path / "second", "--init", start, *options)
    exported = BertTokenizer.from_pretrained(tmp_path / "second/model")
    line = "Sun sunmoon séa東京 [MASK]"
    assert exported(line)["input_ids"] == tokenizer(line)["input_ids"]
    corpus = Corpus(tmp_path / "second/data/train")
    first = text.read_text(encoding="utf-8").split("\n")[0]
    assert corpus.tokens(0, corpus.sentences[1]).tolist() == tokenizer(first, add_special_tokens=False)["input_ids"]
    assert exported.model_max_length == model.config.max_position_embeddings


# --- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "tinny"], "size='tinny': must be one of tiny"),
        (["--layers", 0], "num_hidden_layers=0"),
        (["--hidden-size", 100], "--hidden-size is 100, but must be a multiple of 64"),
        (["--dropout", 1.5], "hidden_dropout_prob=1.5"),
        (["--initializer-range", -1], "initializer_range=-1"),
        (["--vocab-size", 3], "vocab_size is 3"),
        (["--limit-alphabet", 0], "limit_alphabet is 0"),
        (["--max-length", 4], "max_length is 4"),
        (["--seed", -1], "seed is -1, but must be a whole number from 0"),
        (["--masked", 1.5], "masked is 1.5"),
        (["--steps", 0], "steps is 0"),
        (["--steps", 5, "--warmup-steps", 5], "warmup_steps is 5"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--workers", -2], "workers is -2"),
        (["--rows", 5, "--accumulate", 2], "rows is 5, but must be a multiple of 2"),
        (["--fsdp"], "--fsdp shards the parameters over several processes"),
        (["--vocab", "nowhere.txt"], "nowhere.txt"),
        (["--vocab", "VOCAB", "--vocab-size", 99], "--vocab is a vocabulary that is there .*leave out --vocab-size"),
        (["--validation", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--init", "START", "--size", "large"], "--init brings its own .*: leave out --size, or --init"),
        (["--init", "START", "--layers", 7, "--dropout", 0.5], "leave out --layers, --dropout, or --init"),
        (["--init", "START", "--vocab", "nowhere"], "leave out --vocab, or --init"),
        (["--init", "START", "--cased"], "leave out --cased, or --init"),
        (["--init", "START", "--neighbours"], "--neighbours is for a start from scratch"),
        (["--init", "START", "--max-length", 64], "--max-length is 64, but .* has 32 positions"),
        (["--init", "no-such-directory/or-model/x"], "no such directory"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused_before_any_work(text, tmp_path, small_model, options, message):
    names = {"START": small_model, "VOCAB": small_model / "vocab.txt"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(text, "--output", tmp_path / "run", *(names.get(option, option) for option in options))
    assert not (tmp_path / "run" / "data").exists()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    from minibert.config import BertConfig

    path = tmp_path_factory.mktemp("start")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz."]
    BertTokenizer({piece: i for i, piece in enumerate(pieces)}).save_pretrained(path)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(pieces), max_position_embeddings=32, **sizes)
    BertForPreTraining(config).save_pretrained(path)
    return path


def test_a_model_with_fewer_words_than_its_tokenizer(text, tmp_path, small_model):
    start = tmp_path / "start"
    shutil.copytree(small_model, start)
    tokenizer = BertTokenizer.from_pretrained(start)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(start)
    with pytest.raises(ValueError, match="its tokenizer has 33 ids, but the model only 32"):
        pretrain(text, "--output", tmp_path / "run", "--init", start, "--max-length", 32)


def test_no_text_and_no_run(tmp_path):
    with pytest.raises(ValueError, match="text is empty: name at least one text file"):
        pretrain("--output", tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pretrain("--output", tmp_path / "run", "--resume")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file: name a directory for the run"):
        pretrain("--output", tmp_path / "file", "--resume")


def test_help_says_what_prose_is(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert "in English" in " ".join(parser.format_help().split())

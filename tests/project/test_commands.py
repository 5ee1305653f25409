"""What all commands have in common: options, files and standard input, JSON, errors, exit statuses, terminals."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import minibert
from minibert import cli, terminal
from minibert.config import BertConfig

TEXTS = ["Sarah lives in London.", "", "It was an unbelievably fine day, naïve as it was."]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory, minilm_dir):
    """A directory for each of the heads that the commands need."""
    found = {}
    for task, head in (("classify", "SequenceClassification"), ("ner", "TokenClassification"), ("words", "PreTraining"),
                       ("answer", "QuestionAnswering")):  # fmt: skip
        torch.manual_seed(0)
        found[task] = str(tmp_path_factory.mktemp(task))
        getattr(minibert, f"BertFor{head}")(BertConfig.named("tiny", **SIZES)).save_pretrained(found[task])
        minibert.BertTokenizer(str(minilm_dir / "vocab.txt")).save_pretrained(found[task])
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def run(capsys, *arguments: str) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


# Options


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_the_same_options(command):
    options = parsers()[command]._option_string_actions
    assert {"--json", "--quiet", "--traceback"} <= options.keys()
    if command not in ("inspect", "convert", "study", "parity"):
        assert "--device" in options or command in ("pretrain", "optimize")
    if "--dtype" in options:
        assert options["--dtype"].type("bf16") == options["--dtype"].type("bfloat16") == "bfloat16"
    for action in parsers()[command]._actions:
        assert action.help, action
    assert "bundled" not in (options["--model"].help if "--model" in options else "") or command not in (
        "classify", "ner", "answer")  # fmt: skip


@pytest.mark.parametrize("command", ["classify", "ner", "answer"])
def test_commands_without_a_bundled_model_ask_for_one(capsys, command):
    assert cli.main([command, "a text", *(["context"] if command == "answer" else [])]) == 1
    assert "needs a fine-tuned model" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_types_have_two_names(capsys, models, spelling):
    result = json.loads(run(capsys, "classify", "a text", "--model", models["classify"], "--dtype", spelling, "--json"))
    assert result[0]["label"].startswith("LABEL_")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["classify", "a text", "--model", models["classify"], "--dtype", "int3"])
    assert stopped.value.code == 2
    assert "invalid choice: 'int3'" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_one_line(capsys, models):
    for device in ("gpu", "cuda:77", "meta"):
        assert cli.main(["classify", "a", "--model", models["classify"], "--device", device]) == 1
        error = capsys.readouterr().err
        assert f"device='{device}'" in error
        assert error.count("\n") == 1


# Files and standard input


@pytest.mark.parametrize("command", ["classify", "ner"])
def test_a_file_is_answered_line_by_line(capsys, models, file, monkeypatch, command):
    options = ("--model", models[command], "--json")
    of_arguments = json.loads(run(capsys, command, *TEXTS, *options))
    lines = run(capsys, command, "--file", file, "--batch-size", "2", *options).splitlines()
    assert [_names(json.loads(line)) for line in lines] == [_names(each) for each in of_arguments]
    packed = file.with_suffix(".gz")
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert run(capsys, command, "--file", packed, "--batch-size", "2", *options).splitlines() == lines
    with open(file, "rb") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run(capsys, command, "--file", "-", "--batch-size", "2", *options).splitlines() == lines
    readable = run(capsys, command, "--file", file, "--model", models[command])
    assert "LABEL_" in readable


def _names(answer) -> list[str]:
    answers = [answer] if isinstance(answer, dict) else answer
    return [each.get("label") or each["entity_group"] for each in answers]


def test_masks_of_a_file(capsys, models, tmp_path):
    (tmp_path / "masks.txt").write_text("a [MASK] day\nthe [MASK] [MASK]\n")
    command = ("fill-mask", "--file", tmp_path / "masks.txt", "--model", models["words"], "--top-k", "2")
    lines = run(capsys, *command, "--json").splitlines()
    assert [len(json.loads(line)) for line in lines] == [2, 2]
    assert "mask 2 of 2" in run(capsys, *command)


def test_what_comes_before_a_bad_line_is_answered(capsys, models, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"ok\nfine\n" + b"\xff\xfe\nnever\n")
    assert cli.main(["classify", "--file", str(path), "--model", models["classify"]]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "line 3 is not UTF-8" in captured.err
    assert captured.err.count("\n") == 1
    for line, message in (
        (b"a\rb", "line 2 has a carriage return in it"),
        (b"a\0b", "line 2 is not UTF-8: it has a NUL"),
    ):
        path.write_bytes(b"ok\r\n" + line + b"\n")
        assert cli.main(["classify", "--file", str(path), "--model", models["classify"]]) == 1
        captured = capsys.readouterr()
        assert len(captured.out.splitlines()) == 1
        assert message in captured.err


def test_long_texts_are_cut_only_if_asked(capsys, models):
    command = ["classify", "word " * 600, "--model", models["classify"], "--json"]
    assert cli.main(command) == 1
    assert "602 tokens, the model takes 512" in capsys.readouterr().err
    assert cli.main([*command, "--truncate"]) == 0


def test_texts_and_a_file_are_not_both_given(capsys, models, file):
    for given in ([], ["a text", "--file", str(file)]):
        assert cli.main(["ner", *given, "--model", models["ner"]]) == 1
        assert "give texts, or a file of them with --file" in capsys.readouterr().err


# Wrong models


@pytest.mark.parametrize("command", ["classify", "ner", "answer", "fill-mask"])
@pytest.mark.parametrize("head", ["classify", "ner", "words", "answer"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_a_model_with_another_head_is_refused(capsys, models, command, head, options):
    if head == command or (head == "words" and command == "fill-mask"):
        return
    texts = ["a [MASK] text", *(["context"] if command == "answer" else [])]
    assert cli.main([command, *texts, "--model", models[head], *options]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    assert "was saved as a BertFor" in captured.err


def test_the_bundled_model_is_no_classifier(capsys):
    from minibert.weights import hub

    assert cli.main(["classify", "a text", "--model", hub.default_model()]) == 1
    assert "needs a BertForSequenceClassification" in capsys.readouterr().err


# Errors, interruptions, terminals


@pytest.fixture
def command(monkeypatch):
    """A command whose work a test defines."""

    def make(work):
        module = SimpleNamespace(add_arguments=lambda parser: None, run=lambda arguments: work(arguments))
        module.run.__doc__ = "A command of a test."
        monkeypatch.setattr(cli, "COMMANDS", {"work": "a.module"})
        monkeypatch.setattr(cli, "import_module", lambda name: module)

    return make


def raising(error):
    def work(arguments):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\n such   thing"), "minibert: no such thing"),
        (RuntimeError("torch says\nno"), "minibert: RuntimeError: torch says no"),
        (AttributeError("x"), "minibert: AttributeError: x"),
        (MemoryError(), "minibert: MemoryError"),
        (ValueError(), "minibert: ValueError"),
    ],
)
def test_any_error_is_one_line(capsys, command, error, line):
    command(raising(error))
    assert cli.main(["work"]) == 1
    assert capsys.readouterr().err == f"{line}\n"
    assert cli.main(["work", "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_exit_statuses(capsys, command):
    for work, status in ((lambda _: None, 0), (lambda _: 7, 7), (raising(KeyboardInterrupt()), 130)):
        command(work)
        assert cli.main(["work"]) == status
    assert capsys.readouterr().err == "minibert: interrupted\n"


def test_warnings_are_one_line(capsys, command):
    import warnings

    command(lambda _: warnings.warn("cut to\n128 tokens", stacklevel=1))
    assert cli.main(["work", "--quiet"]) == 0
    assert capsys.readouterr().err == "minibert: warning: cut to 128 tokens\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("json_wanted", [False, True])
def test_no_result_is_lost_to_a_terminal(monkeypatch, command, encoding, json_wanted):
    result = {"word": "naïve 汉字 \ud800"}
    command(lambda arguments: terminal.show(arguments, result, [result["word"]]))
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["work", *(["--json"] if json_wanted else [])]) == 0
    shown = stream.buffer.getvalue().decode(encoding)
    if json_wanted:
        assert json.loads(shown) == result
    else:
        assert shown.strip() == result["word"].encode(encoding, "backslashreplace").decode(encoding)


def test_notices_and_progress(capsys, command):
    command(lambda arguments: terminal.notice(arguments, "by the way") or print(terminal.shows_progress(arguments)))
    assert (cli.main(["work"]), capsys.readouterr().out) == (0, "by the way\nNone\n")
    assert (cli.main(["work", "--quiet"]), capsys.readouterr().out) == (0, "False\n")
    assert cli.main(["work", "--json"]) == 0
    assert capsys.readouterr() == ("None\n", "by the way\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full, no pipes of this kind")
@pytest.mark.parametrize(("redirected", "status", "told"), [("| true", 0, ""), (">/dev/full", 1, "No space left")])
def test_a_reader_that_is_gone_and_a_full_disk(redirected, status, told, tmp_path):
    (tmp_path / "work.py").write_text(
        "import sys, types\n"
        "from minibert import cli\n"
        "def work(arguments):\n"
        "    'Work.'\n"
        "    for _ in range(100_000): print('a line of a long result')\n"
        "cli.COMMANDS = {'work': 'x'}\n"
        "cli.import_module = lambda name: types.SimpleNamespace(add_arguments=lambda parser: None, run=work)\n"
        "sys.exit(cli.main(['work']))\n"
    )
    script = f"set -o pipefail; {sys.executable} {tmp_path / 'work.py'} {redirected}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == status
    assert told in result.stderr
    assert result.stderr.count("\n") == (1 if told else 0)


def test_the_three_flows_as_json(capsys, models):
    result = json.loads(run(capsys, "demo", "--model", models["words"], "--json"))
    assert result.keys() == {"fill_mask", "next_sentence", "pretraining"}
    assert result["pretraining"]["loss"] == pytest.approx(
        result["pretraining"]["mlm_loss"] + result["pretraining"]["nsp_loss"]
    )


def test_convert_as_json(capsys, models, tmp_path):
    result = json.loads(run(capsys, "convert", models["words"], tmp_path / "out", "--dtype", "bf16", "--json"))
    assert result["directory"] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"

"""The command: readable tables, JSON, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import minibert
from minibert import cli
from minibert.config import BertConfig


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, minilm_dir) -> str:
    """A tiny pretraining model with random weights and the vocabulary of bert-base-uncased."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = BertConfig.named("tiny", hidden_size=16, num_attention_heads=2, intermediate_size=16)
    minibert.BertForPreTraining(config).save_pretrained(directory)
    minibert.BertTokenizer(str(minilm_dir / "vocab.txt")).save_pretrained(directory)
    return str(directory)


def run(capsys, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_fill_mask(capsys, model_dir):
    text = "Stop [MASK] the sign."
    answers = json.loads(run(capsys, "fill-mask", text, "--model", model_dir, "--top-k", "3", "--json"))
    assert len(answers) == 3
    lines = run(capsys, "fill-mask", text, "--model", model_dir, "--top-k", "3").splitlines()
    assert lines[0] == text
    for line, answer in zip(lines[1:], answers, strict=True):
        assert line.split()[:2] == [f"{answer['score']:.4f}", answer["token_str"]]
    both = run(capsys, "fill-mask", text, "[MASK] [MASK]", "--model", model_dir, "--targets", "at", "by")
    assert "mask 2 of 2" in both
    assert both.count(" at ") + both.count("  at") >= 3


def test_next_sentence(capsys, model_dir):
    result = json.loads(run(capsys, "next-sentence", "He left.", "She stayed.", "--model", model_dir, "--json"))
    assert sum(result["probabilities"].values()) == pytest.approx(1)
    table = run(capsys, "next-sentence", "He left.", "She stayed.", "--model", model_dir)
    assert f"{result['probabilities']['IS_NEXT']:.4f}  IS_NEXT" in table


def test_pretraining_loss(capsys, model_dir):
    pair = ("pretraining-loss", "He left.", "She stayed.", "--model", model_dir, "--json")
    plain = json.loads(run(capsys, *pair))
    assert plain["loss"] == pytest.approx(plain["mlm_loss"] + plain["nsp_loss"])
    masked = json.loads(run(capsys, *pair, "--mask", "1,6"))
    assert [mask["token"] for mask in masked["masked"]] == ["he", "stayed"]
    other = json.loads(run(capsys, *pair, "--not-next"))
    assert other["mlm_loss"] == plain["mlm_loss"]
    assert other["nsp_loss"] != plain["nsp_loss"]
    assert "position" in run(capsys, *pair[:-1], "--mask", "1")


def test_inspect(capsys, model_dir):
    text = run(capsys, "inspect", model_dir, "--tensors")
    assert "(word_embeddings): Embedding(30522, 16, padding_idx=0)" in text
    assert "tied alias" in text
    result = json.loads(run(capsys, "inspect", model_dir, "--json", "--head", "encoder"))
    assert result["class"] == "BertModel"
    assert result["counts"]["expected extra"] == 7  # the two heads
    assert all(len(tensor["sha256"]) == 64 for tensor in result["tensors"])


def test_optimize(capsys, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path))
    assert "compiled: no" in run(capsys, "optimize", model_dir, "--explain")
    assert not list(tmp_path.iterdir())
    result = json.loads(run(capsys, "optimize", model_dir, "--explain", "--json"))
    assert result["dtype"] == "float32"
    assert any("memory" in line for line in result["receipts"])


def test_the_three_flows(capsys, model_dir):
    text = run(capsys, "demo", "--model", model_dir)
    for part in ("fill-mask with", "loss if the label is IS_NEXT", "seq_relationship_logits", "mlm_loss"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill-mask", "no mask here"], "has no [MASK]"),
        (["fill-mask", "[MASK]", "--top-k", "0"], "top_k must be"),
        (["pretraining-loss", "a", "b", "--mask", "one"], "--mask 'one'"),
        (["pretraining-loss", "a", "b", "--mask", "99"], "mask position 99"),
        (["inspect", "--head", "music"], "head='music': must be one of encoder"),
    ],
)
def test_errors_are_one_line(capsys, model_dir, arguments, message):
    place = [model_dir] if arguments[0] == "inspect" else ["--model", model_dir]
    assert cli.main([*arguments, *place]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("minibert: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_missing_model_is_one_line(capsys, tmp_path):
    assert cli.main(["fill-mask", "[MASK]", "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_python_m_minibert():
    result = subprocess.run([sys.executable, "-m", "minibert", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == minibert.__version__

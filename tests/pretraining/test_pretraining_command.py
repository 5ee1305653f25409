"""`minibert pretrain`: text in, a model out that the other commands load."""

from __future__ import annotations

import argparse
import random

import pytest
import torch

from minibert.config import BertConfig
from minibert.heads import BertForPreTraining
from minibert.pipelines import pipeline
from minibert.pretraining.command import add_arguments, run
from minibert.pretraining.initial import look_at_neighbours
from minibert.text.tokenizer import BertTokenizer
from minibert.training.curves import plot_curves
from minibert.training.run import read_metrics

SMALL = (
    "--vocab-size 90 --layers 1 --hidden-size 64 --max-length 32 --rows 4 --steps 6 --log-every 2 --validate-every 3"
)


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    words = "sun moon star sky sea land tree bird fish stone fire rain".split()
    documents = ["\n".join(" ".join(draw.choices(words, k=6)) + "." for _ in range(5)) for _ in range(8)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


def pretrain(*options: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(option) for option in options]))


def test_from_text_to_a_model(text, tmp_path, capsys):
    output = tmp_path / "run"
    pretrain(text, "--validation", text, "--output", output, *SMALL.split())
    printed = capsys.readouterr().out
    assert "8 documents, 40 sentences" in printed
    assert "finished at step 6" in printed
    model = BertForPreTraining.from_pretrained(output / "model")
    assert model.config.hidden_size == 64
    answers = pipeline("fill-mask", str(output / "model"))("the [MASK] sky.")
    assert len(answers) == 5
    records = read_metrics(output / "metrics.jsonl")
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6]
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(text, "--output", output, *SMALL.split())


def test_resume_with_more_steps(text, tmp_path):
    output = tmp_path / "run"
    pretrain(text, "--output", output, *SMALL.split())
    pretrain(text, "--output", output, *SMALL.replace("--steps 6", "--steps 9").split(), "--resume")
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 9
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pretrain(text, "--output", tmp_path / "other", *SMALL.split(), "--resume")


def test_continue_from_a_checkpoint(text, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain(text, "--output", first, *SMALL.split(), "--packed")
    pretrain(text, "--output", second, "--init", first / "model", "--max-length", 32, "--rows", 4, "--steps", 2)
    old, new = (BertForPreTraining.from_pretrained(path / "model") for path in (first, second))
    assert old.config.to_dict() == new.config.to_dict()
    assert (
        BertTokenizer.from_pretrained(second / "model").get_vocab()
        == BertTokenizer(first / "data/vocab.txt").get_vocab()
    )
    difference = (old.bert.pooler.dense.weight - new.bert.pooler.dense.weight).abs().max()
    assert 0 < difference < 1e-2  # two small steps away


def test_the_rules_arrive(text, tmp_path):
    options = ["--whole-words", "--masked", 0.3, "--seed", 7, "--learning-rate", 0.01, "--betas", 0.8, 0.9]
    pretrain(text, "--output", tmp_path / "run", *SMALL.split(), *options)
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["data"]
    assert (stored["whole_words"], stored["masked"], stored["seed"], stored["rows"]) == (True, 0.3, 7, 4)


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "mlm_loss": 2.0, "nsp_loss": 0.7, "mlm_accuracy": 0.1, "nsp_accuracy": 0.5}\n'
        '{"step": 2, "validation_mlm_loss": 1.0, "validation_nsp_loss": 0.6}\n'
    )
    plot_curves(metrics, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("heads", "hidden_size"), [(4, 256), (12, 768), (3, 192)])
def test_heads_start_at_neighbours(heads, hidden_size):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=hidden_size, num_attention_heads=heads, num_hidden_layers=2, intermediate_size=64
    )
    model = BertForPreTraining(config).eval()
    second = [p.clone() for p in model.bert.encoder.layer[1].parameters()]
    look_at_neighbours(model)
    assert all(torch.equal(a, b) for a, b in zip(second, model.bert.encoder.layer[1].parameters(), strict=True))
    with torch.no_grad():
        maps = model.bert(torch.randint(5, 500, (2, 64)), output_attentions=True).attentions[0]  # (2, H, 64, 64)
    for head, offset in zip(range(heads), [-1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6], strict=False):
        mean = {d: float(maps[:, head].diagonal(d, dim1=1, dim2=2).mean()) for d in range(-10, 11)}
        assert mean[offset] > 0.4
        assert max(mean, key=mean.get) == offset


def test_neighbours_on_the_command_line(text, tmp_path):
    weights = []
    for name, options in (("random", []), ("neighbours", ["--neighbours"])):
        pretrain(text, "--output", tmp_path / name, *SMALL.split(), "--learning-rate", 1e-9, *options)
        model = BertForPreTraining.from_pretrained(tmp_path / name / "model")
        weights.append(model.bert.embeddings.position_embeddings.weight)
    assert weights[0].abs().max() < 0.041  # cut at two standard deviations
    assert 0.039 < weights[1].abs().max() < 0.0401
    with pytest.raises(ValueError, match="--neighbours is for a start from scratch"):
        pretrain(
            text, "--output", tmp_path / "c", "--init", tmp_path / "random" / "model", *SMALL.split(), "--neighbours"
        )

"""Small tasks to fine-tune on, and the command that does it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

import minibert
from minibert import cli

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
WORDS = "sun rain day sky cat dog bird fish good bad nice ugly paris london sarah tom".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", ",",
         *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]  # fmt: skip


def make_start(directory: Path, dtype: torch.dtype = torch.float32, **config) -> Path:
    """A tiny pretraining checkpoint with its tokenizer."""
    torch.manual_seed(0)
    fields = {"max_position_embeddings": 32, "initializer_range": 0.1} | config
    model = minibert.BertForPreTraining(minibert.BertConfig(len(VOCAB), 32, 2, 2, 64, **fields))
    model.to(dtype).save_pretrained(directory)
    length = fields["max_position_embeddings"]
    minibert.BertTokenizer({word: i for i, word in enumerate(VOCAB)}, model_max_length=length).save_pretrained(
        directory
    )
    return directory


def weather(path, count, seed, *, pairs=False, problem=SINGLE):
    """Is it good or bad? A word says so."""
    draw = random.Random(seed)
    lines = ["text,label" if not pairs else "text,text_pair,label"]
    for _ in range(count):
        words = draw.choices(WORDS[:8], k=draw.randint(2, 9))
        good = draw.random() < 0.5
        words.insert(draw.randint(0, len(words)), "nice" if good else "ugly")
        bright = "sun" in words
        label = {SINGLE: "good" if good else "bad", NUMBER: 1.5 if good else -0.5,
                 MULTI: ";".join(["good"] * good + ["sunny"] * bright)}[problem]  # fmt: skip
        text = f'"{words[0]}, {" ".join(words[1:])}"'
        lines.append(f"{text},{'the day,' if pairs else ''}{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def places(path, count, seed, names=("B", "I")):
    """CoNLL sentences with names of people and cities."""
    draw, lines = random.Random(seed), ["-DOCSTART- -X- O", ""]
    for _ in range(count):
        for word in draw.choices(WORDS[:12], k=draw.randint(1, 9)):
            lines.append(f"{word} NN O")
            if draw.random() < 0.2:
                name, kind = draw.choice([("paris", "LOC"), ("london", "LOC"), ("sarah", "PER"), ("tom", "PER")])
                lines += [f"{name} NNP {names[0]}-{kind}", f"{name}s NNP {names[1]}-{kind}"]
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def run(start, out, train, validation, task="classification", *more) -> int:
    given = {"task": task, "train": train, "validation": validation, "model": start, "output": out,
             "learning-rate": "3e-3", "batch-size": "16"}  # fmt: skip
    parts = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    return cli.main(["finetune", *parts, *map(str, more)])


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def parameters_of(directory):
    state = torch.load(directory / "checkpoint.pt", weights_only=True)["parameters"]
    return {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def assert_same_end(one, other):
    first, second = parameters_of(one), parameters_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics_of(one) == metrics_of(other)

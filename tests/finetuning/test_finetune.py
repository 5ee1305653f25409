"""Fine-tuning: files to examples, scores, the loop, and a result that both libraries open."""

from __future__ import annotations

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
import transformers

import minibert
from minibert import cli, pipeline
from minibert.finetuning import loop as finetune
from minibert.finetuning.examples import read_sentences, read_texts
from minibert.finetuning.scores import class_scores, entities, entity_scores, multi_label_scores, number_scores
from minibert.finetuning.tasks import Classification, Tagging

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
WORDS = "sun rain day sky cat dog bird fish good bad nice ugly paris london sarah tom".split()
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz", ",",
         *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny pretraining checkpoint with its tokenizer."""
    directory = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    config = minibert.BertConfig(len(VOCAB), 32, 2, 2, 64, max_position_embeddings=32, initializer_range=0.1)
    minibert.BertForPreTraining(config).save_pretrained(directory)
    tokenizer = minibert.BertTokenizer({word: i for i, word in enumerate(VOCAB)}, model_max_length=32)
    tokenizer.save_pretrained(directory)
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


def places(path, count, seed):
    """CoNLL sentences with names of people and cities."""
    draw, lines = random.Random(seed), ["-DOCSTART- O", ""]
    for _ in range(count):
        for word in draw.choices(WORDS[:12], k=draw.randint(1, 9)):
            lines.append(f"{word} NN O")
            if draw.random() < 0.2:
                name, kind = draw.choice([("paris", "LOC"), ("london", "LOC"), ("sarah", "PER"), ("tom", "PER")])
                lines += [f"{name} NNP B-{kind}", f"{name}s NNP I-{kind}"]
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def run(start, out, train, validation, task="classification", *more) -> int:
    given = {"task": task, "train": train, "validation": validation, "model": start, "output": out,
             "learning-rate": "3e-3", "batch-size": "16"}  # fmt: skip
    return cli.main(["finetune", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *more])


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train, dev = weather(out / "train.csv", 200, 0), weather(out / "dev.csv", 60, 1)
    assert run(start, out / "run", train, dev) == 0
    return out


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# What is learnt, and what is left behind


def test_a_classifier_learns_and_both_libraries_open_it(trained):
    metrics = metrics_of(trained / "run")
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert max(line["accuracy"] for line in metrics) > 0.9
    directory = trained / "run" / "model"
    config = json.loads((directory / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["label2id"] == {"bad": 0, "good": 1}
    assert config["problem_type"] == SINGLE
    texts = ["sun nice day", "ugly cat dog bird"]
    ours = pipeline("text-classification", directory)(texts)
    theirs = transformers.pipeline("text-classification", str(directory))(texts)
    assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs] == ["good", "bad"]
    assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_the_command_classifies(trained, capsys):
    directory = str(trained / "run" / "model")
    assert cli.main(["classify", "sun nice day", "ugly cat", "--model", directory]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["good", "bad"]
    assert cli.main(["classify", "sun"]) == 1
    assert "text-classification needs a fine-tuned model" in capsys.readouterr().err


def test_the_best_epoch_is_kept(start, tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.7])
    monkeypatch.setattr(finetune.FineTuning, "validate", lambda self: {"accuracy": next(scores)})
    saved = []
    monkeypatch.setattr(minibert.BertPreTrainedModel, "save_pretrained", lambda self, path: saved.append(path))
    train = weather(tmp_path / "train.csv", 20, 0)
    assert run(start, tmp_path / "run", train, train, "classification", "--epochs", "4") == 0
    assert len(saved) == 2


def test_a_tagger(start, tmp_path, capsys):
    train, dev = places(tmp_path / "train.conll", 200, 0), places(tmp_path / "dev.conll", 50, 1)
    assert run(start, tmp_path / "run", train, dev, "tagging", "--epochs", "12", "--learning-rate", "6e-3") == 0
    assert max(line["f1"] for line in metrics_of(tmp_path / "run")) > 0.8
    assert "labels: O, B-LOC, B-PER, I-LOC, I-PER" in capsys.readouterr().out
    directory = tmp_path / "run" / "model"
    text = "good day tom toms in paris pariss"
    found = pipeline("ner", directory, aggregation_strategy="first")(text)
    assert [(each["entity_group"], each["word"]) for each in found] == [("PER", "tom toms"), ("LOC", "paris pariss")]
    assert cli.main(["ner", text, "--model", str(directory)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["LOC", "paris", "pariss"]
    theirs = transformers.pipeline("ner", str(directory), aggregation_strategy="first")(text)
    assert [each["start"] for each in theirs] == [each["start"] for each in found]


@pytest.mark.parametrize(("problem", "score"), [(MULTI, "macro_f1"), (NUMBER, "r2")])
def test_other_problems(start, tmp_path, problem, score):
    train = weather(tmp_path / "train.csv", 200, 0, pairs=True, problem=problem)
    dev = weather(tmp_path / "dev.csv", 60, 1, pairs=True, problem=problem)
    assert run(start, tmp_path / "run", train, dev, "classification", "--problem-type", problem, "--epochs", "5") == 0
    assert max(line[score] for line in metrics_of(tmp_path / "run")) > 0.7
    model = minibert.BertForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.problem_type == problem
    assert model.config.num_labels == (1 if problem == NUMBER else 2)


def test_a_model_keeps_its_numbers_for_labels_it_knows(trained, tmp_path):
    directory = tmp_path / "other"
    model = minibert.BertForSequenceClassification.from_pretrained(
        trained / "run" / "model", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}
    )
    model.save_pretrained(directory)
    minibert.BertTokenizer.from_pretrained(trained / "run" / "model").save_pretrained(directory)
    assert run(directory, tmp_path / "run", trained / "train.csv", trained / "dev.csv") == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}


# Seeds, stops and resumes


def parameters_of(directory):
    state = torch.load(directory / "checkpoint.pt", weights_only=True)["parameters"]
    return {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}


def assert_same_end(one, other):
    first, second = parameters_of(one), parameters_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics_of(one) == metrics_of(other)


def test_a_seed_decides(start, trained, tmp_path):
    for name, seed in (("same", "0"), ("other", "1")):
        assert (
            run(start, tmp_path / name, trained / "train.csv", trained / "dev.csv", "classification", "--seed", seed)
            == 0
        )
    assert_same_end(trained / "run", tmp_path / "same")
    different = parameters_of(tmp_path / "other")
    assert any(not torch.equal(value, different[name]) for name, value in parameters_of(tmp_path / "same").items())


@pytest.mark.parametrize("stop", [5, 13, 20])
@pytest.mark.parametrize("how", ["signal", "crash"])
def test_resumed_runs_end_in_the_same_bits(start, trained, tmp_path, monkeypatch, stop, how, capsys):
    """Interrupted after a step, or killed with an older checkpoint (of the epoch before, or every 4 steps)."""
    step = finetune.FineTuning.train_step

    def interrupted(self):
        loss = step(self)
        if self.step == stop and how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.step == stop:
            raise RuntimeError("the machine is gone")
        return loss

    arguments = (trained / "train.csv", trained / "dev.csv", "classification", "--save-every", "4")
    with monkeypatch.context() as patched:
        patched.setattr(finetune.FineTuning, "train_step", interrupted)
        if how == "crash":
            assert run(start, tmp_path / "run", *arguments) == 1
            assert "minibert: RuntimeError: the machine is gone" in capsys.readouterr().err
        else:
            assert run(start, tmp_path / "run", *arguments) == 130
            assert f"stopped at step {stop} of 39" in capsys.readouterr().out
    assert run(start, tmp_path / "run", *arguments) == 1
    assert "already holds a run: give --resume" in capsys.readouterr().err
    assert run(start, tmp_path / "run", *arguments, "--resume") == 0
    assert_same_end(trained / "run", tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "message"), [(["--epochs", "4"], "epochs=3, not 4"), (["--max-length", "8"], "other examples or labels")]
)
def test_a_run_does_not_go_on_with_something_else(start, trained, capsys, more, message):
    arguments = (trained / "train.csv", trained / "dev.csv", "classification", "--resume", *more)
    assert run(start, trained / "run", *arguments) == 1
    assert f"was trained with {message}" in capsys.readouterr().err


# Files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv:1: the first line must name the columns text and label; got []"),
        ("a.csv", "text,class\na,b\n", "a.csv:1: the first line must name the columns text and label"),
        ("a.csv", "text,label\n", "a.csv: no examples"),
        ("a.csv", "text,label\na,b\nc\n", "a.csv:3: 1 fields, the first line names 2"),
        ("a.csv", 'text,label\n"a\nb",c\n" ",d\n', "a.csv:4: the text is empty"),
        ("a.csv", "text,label\na, \n", "a.csv:2: the label must be one name, got ' '"),
        ("a.csv", 'text,label\n"a,b\n', "a.csv:2: unexpected end of data"),
        ("a.csv", b"text,label\n\xff,b\n", "a.csv:2: not UTF-8"),
        ("a.csv", "text,label\na,b\nc,b\n", "a.csv: 1 different labels (b), nothing to tell apart"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"\n', "a.jsonl:2: not JSON, one object a line is needed"),
        ("a.jsonl", '\n["a"]\n', "a.jsonl:2: must be an object with text and label"),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl:1: no 'label'; there are 'text'"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "a.jsonl:1: 'text' must be a text, got 5"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', "a.jsonl:1: the label must be one name, got [1]"),
        ("a.txt", "x", "a.txt: must be a file of type .csv"),
    ],
)
def test_errors_in_texts(start, tmp_path, name, content, message, capsys):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(start, tmp_path / "run", path, weather(tmp_path / "dev.csv", 5, 0)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb\n", "a.conll:2: a word and its label are needed, got 'b'"),
        ("\n\n", "a.conll: no sentences"),
        ("a O\nb O\n", "a.conll: every word has the label O, nothing to tell apart"),
    ],
)
def test_errors_in_sentences(start, tmp_path, content, message, capsys):
    path = tmp_path / "a.conll"
    path.write_text(content)
    assert run(start, tmp_path / "run", path, path, "tagging") == 1
    assert message in capsys.readouterr().err


def test_other_errors(start, trained, tmp_path, capsys):
    train = trained / "train.csv"
    strange = tmp_path / "dev.csv"
    strange.write_text("text,label\na,good\nb,fine\n")
    for arguments, message in [
        ((train, strange), "dev.csv:3: the label 'fine' is not among those of the training data: bad, good"),
        ((train, tmp_path / "none.csv"), "No such file"),
        ((train, train, "classification", "--max-length", "64"), "--max-length 64: must be from 8 to 32"),
        ((train, train, "classification", "--epochs", "0"), "epochs is 0, but must be at least 1"),
        ((train, train, "classification", "--warmup", "1"), "warmup is 1.0, but must be from 0 to below 1"),
        ((train, train, "classification", "--problem-type", NUMBER), "train.csv:2: the label must be a number, got"),
        ((train, train, "classification", "--resume"), "nothing to resume"),
        ((train, train, "tagging", "--problem-type", NUMBER), "--problem-type is for --task classification"),
    ]:
        assert run(start, tmp_path / "run", *arguments) == 1
        assert message in capsys.readouterr().err


def test_reading(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('\ufefftext\ttext_pair\tlabel\n"a ""b"""\tc\t1\n\nd\te\t0\n')
    assert [(t.text, t.text_pair, t.label, t.place) for t in read_texts(path, SINGLE)] == [
        ('a "b"', "c", "1", f"{path}:2"), ("d", "e", "0", f"{path}:4")]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": ["x", "y", "x"], "id": 7}\n{"text": "b", "label": ""}\n')
    assert [(t.text, t.label) for t in read_texts(path, MULTI)] == [("a", ("x", "y")), ("b", ())]
    path.write_text("a B-X\nb\tI-X\n\n\nc x O\n")
    assert [s.words for s in read_sentences(path)] == [("a", "b"), ("c",)]
    assert [s.labels for s in read_sentences(path)] == [("B-X", "I-X"), ("O",)]


def test_labels_are_numbered_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": {label}}}\n' for label in (10, 9, 2)))
    assert Classification().labels(read_texts(path, SINGLE)) == ["2", "9", "10"]


def test_long_sentences_keep_all_their_labels(start, tmp_path):
    """Cut between words; of a word of several tokens the first has the label."""
    path = tmp_path / "a.conll"
    path.write_text("\n".join(["sun O", "zzz B-X"] * 30 + ["q" * 60 + " I-X", "dog O"]) + "\n")
    task, tokenizer = Tagging(), minibert.BertTokenizer.from_pretrained(start)
    sentences = task.read(path)
    ids = {name: i for i, name in enumerate(task.labels(sentences))}
    rows = task.encode(sentences, tokenizer, ids, 16)
    assert max(map(len, rows.input_ids)) <= 16
    assert all(row[0] == 2 and row[-1] == 3 for row in rows.input_ids)
    perfect = [np.eye(len(ids))[np.maximum(row, 0)] for row in rows.targets]
    assert task.scores(perfect, rows, {i: name for name, i in ids.items()})["f1"] == 1
    assert sum(word is not None for _, words in rows.words for word in words) == 62


# Scores


def test_class_scores_are_those_of_others():
    draw = np.random.default_rng(0)
    true, found = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    expected = [2 * ((found == c) & (true == c)).sum() / ((found == c).sum() + (true == c).sum()) for c in (0, 1)]
    scores = class_scores(found, true)
    assert scores == {"accuracy": pytest.approx((found == true).mean()), "macro_f1": pytest.approx(np.mean(expected))}
    assert class_scores(np.array([1, 1]), np.array([1, 1])) == {"accuracy": 1, "macro_f1": 1}
    scores = multi_label_scores(np.array([[1, 0], [1, 1]]) > 0, np.array([[1, 0], [0, 1]]) > 0)
    assert scores == {"accuracy": 0.5, "micro_f1": pytest.approx(0.8), "macro_f1": pytest.approx((2 / 3 + 1) / 2)}
    scores = number_scores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert scores == {"rmse": pytest.approx(3**-0.5), "r2": pytest.approx(0.5), "pearson": pytest.approx(0.981981)}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("O B-A I-A O", [(1, 3, "A")]),
        ("B-A B-A I-B I-B", [(0, 1, "A"), (1, 2, "A"), (2, 4, "B")]),
        ("I-A O I-A I-A", [(0, 1, "A"), (2, 4, "A")]),
        ("B-X-Y I-X-Y", [(0, 2, "X-Y")]),
        ("A A B", [(0, 2, "A"), (2, 3, "B")]),
        ("O", []),
    ],
)
def test_entities(labels, expected):
    assert entities(labels.split()) == expected


def test_entity_scores():
    true, found = [["B-A", "I-A", "O"], ["B-B"]], [["B-A", "O", "O"], ["B-B"]]
    assert entity_scores(found, true) == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.75}
    assert entity_scores([["O"]], [["O"]])["f1"] == 0

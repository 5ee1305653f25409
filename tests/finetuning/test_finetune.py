"""Fine-tuning: what is learnt, what is left behind, and a result that both libraries open."""

from __future__ import annotations

import json
import re

import finetune_case as case
import numpy as np
import pytest
import torch
import transformers
from finetune_case import MULTI, NUMBER, SINGLE, metrics_of, run, weather
from reference import rounding

import minibert
from minibert import cli, pipeline
from minibert.finetuning.examples import read_texts
from minibert.finetuning.loop import FineTuning
from minibert.finetuning.options import FineTuneSettings
from minibert.finetuning.question_answering import QuestionAnswering
from minibert.finetuning.sentence_pairs import SentencePairs
from minibert.finetuning.start import open_model
from minibert.finetuning.tasks import Classification, Rows, Tagging, predict


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
    reference = transformers.pipeline("text-classification", str(directory))
    theirs = reference(texts)
    assert [answer["label"] for answer in ours] == [answer["label"] for answer in theirs] == ["good", "bad"]
    within = 4 * rounding(reference.model)  # of logits; a probability moves by half as much
    assert all(abs(a["score"] - b["score"]) <= within for a, b in zip(ours, theirs, strict=True))


def test_the_command_classifies(trained, capsys):
    directory = str(trained / "run" / "model")
    assert cli.main(["classify", "sun nice day", "ugly cat", "--model", directory]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["good", "bad"]


def test_a_tagger(start, tmp_path, capsys):
    train, dev = case.places(tmp_path / "train.conll", 200, 0), case.places(tmp_path / "dev.conll", 50, 1)
    assert run(start, tmp_path / "run", train, dev, "ner", "--epochs", "12", "--learning-rate", "6e-3") == 0
    assert max(line["f1"] for line in metrics_of(tmp_path / "run")) > 0.8
    told = capsys.readouterr()
    assert "labels: O, B-LOC, B-PER, I-LOC, I-PER" in told.out
    assert "scored as entities in IOB: f1" in told.out
    directory = tmp_path / "run" / "model"
    text = "good day tom toms in paris pariss"
    found = pipeline("ner", directory, aggregation_strategy="first")(text)
    assert [(each["entity_group"], each["word"]) for each in found] == [("PER", "tom toms"), ("LOC", "paris pariss")]
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


def test_the_best_epoch_is_kept(start, tmp_path, monkeypatch):
    """The first of the best ones: the weights that lie in model/ are those that the model had then."""
    scores, then = iter([0.5, 0.9, 0.9, 0.7]), []

    def validate(job):
        then.append(job.model.classifier.weight.detach().clone())
        return {"accuracy": next(scores)}

    monkeypatch.setattr(FineTuning, "validate", validate)
    train = weather(tmp_path / "train.csv", 20, 0)
    assert run(start, tmp_path / "run", train, train, "classification", "--epochs", "4") == 0
    kept = minibert.BertForSequenceClassification.from_pretrained(tmp_path / "run" / "model").classifier.weight
    assert [torch.equal(kept, weight) for weight in then] == [False, True, False, False]
    best = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["best"]
    assert (best["epoch"], best["accuracy"]) == (2, 0.9)


# What a step does


def make_job(start, directory, task=None, count=40, **settings):
    task = task or Classification()
    examples = task.read(weather(directory / "train.csv", count, 0))
    begin = open_model(task, str(start), task.labels(examples), 0)
    rows = task.encode(examples, begin.tokenizer, begin.label_ids, 32)
    settings = FineTuneSettings(**{"learning_rate": 3e-3, "batch_size": 8} | settings)
    return FineTuning(begin.model, begin.tokenizer, task, rows, rows, directory / "run", settings=settings)


def test_the_learning_rate_rises_and_falls(start, tmp_path):
    job, used = make_job(start, tmp_path, epochs=2, warmup=0.2), []
    step = job.optimizer.step
    job.optimizer.step = lambda: used.append([group["lr"] for group in job.optimizer.param_groups]) or step()
    job.fit()
    expected = [1.5e-3, 3e-3, *(3e-3 * (10 - step) / 8 for step in range(2, 10))]
    assert [rates[0] for rates in used] == pytest.approx(expected)
    assert all(first == second for first, second in used)


def test_an_epoch_has_every_example_once(start, tmp_path):
    """In another order each time; the last batch has those that are left over."""
    job, seen = make_job(start, tmp_path, count=21, epochs=2), []
    loss = job.task.loss
    job.task.loss = lambda *given: seen.append(given[-1]) or loss(*given)
    job.fit()
    assert sorted(map(len, seen[:3])) == sorted(map(len, seen[3:])) == [5, 8, 8]
    orders = [[i for batch in batches for i in batch] for batches in (seen[:3], seen[3:])]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(21))
    assert orders[0] != orders[1]


def test_validation_is_without_dropout_and_training_with_it(tmp_path):
    start = case.make_start(tmp_path / "start", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    job, modes = make_job(start, tmp_path, epochs=1), []
    job.model.bert.register_forward_hook(lambda module, *_: modes.append(module.training))
    first = job.validate()
    assert modes
    assert not any(modes)
    assert all(job.validate() == first for _ in range(3))
    job.model.eval()
    logits = [np.stack(predict(job.model, job.tokenizer, job.validation)) for _ in range(2)]
    assert np.array_equal(*logits)
    job.model.train()
    modes.clear()
    job.train_step()
    job.validate()
    job.train_step()
    assert modes[0]
    assert modes[-1]


def test_the_gradient_is_clipped(start, tmp_path):
    job = make_job(start, tmp_path, epochs=1, clip_norm=1e-3)
    step, norms = job.optimizer.step, []

    def look():
        norms.append(torch.stack([p.grad.norm() for p in job.model.parameters() if p.grad is not None]).norm().item())
        step()

    job.optimizer.step = look
    job.fit()
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


def test_dropout_is_drawn_anew_for_each_step(tmp_path):
    """Of an epoch, and of the next one: the same rows under the same weights have another loss each time."""
    start = case.make_start(tmp_path / "start", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    job = make_job(start, tmp_path, epochs=3, learning_rate=1e-30)
    job._order = lambda epoch: [list(range(8))] * job.epoch_steps
    job.model.train()
    losses = [job.train_step() for _ in range(job.steps)]
    assert len(set(losses)) == len(losses) == 15
    job.step = 3
    assert job.train_step() == losses[3]  # that of its step, whenever it is taken


def test_only_first_tokens_of_words_have_labels(start, tmp_path):
    """Of a batch's padding, special tokens and later pieces of words nothing is learnt."""
    task = Tagging()
    path = tmp_path / "train.conll"
    path.write_text("sun O\ntoms B-PER\n\nrain O\nday O\nlondon B-PER\nparis B-PER\nsky O\n")
    examples = task.read(path)
    begin = open_model(task, str(start), task.labels(examples), 0)
    rows = task.encode(examples, begin.tokenizer, begin.label_ids, 32)
    assert [len(row) for row in rows.input_ids] == [5, 7]  # "toms" is two pieces
    model = begin.model.eval()
    loss = task.loss(model, begin.tokenizer, rows, [0, 1]).item()
    logits = predict(model, begin.tokenizer, rows)
    firsts = np.concatenate([logits[0][[1, 2]], logits[1][[1, 2, 3, 4, 5]]])
    outside, person = begin.label_ids["O"], begin.label_ids["B-PER"]
    wanted = torch.tensor([outside, person, outside, outside, person, person, outside])
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(firsts), wanted).item()
    assert loss == pytest.approx(expected, rel=1e-5)  # means of seven numbers, in another order


def test_a_label_of_several_is_said_from_one_half_on(monkeypatch):
    """Of its probability: where the logit is above 0."""
    found = [np.array(row, np.float32) for row in ([0.1, -0.1, 3.0], [0.4, -3.0, -0.4])]
    monkeypatch.setattr("minibert.finetuning.tasks.predict", lambda *_: found)
    rows = Rows([[], []], [[], []], [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [])
    assert Classification(MULTI).validate(None, None, rows)["accuracy"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_trained_in_float32(tmp_path, dtype):
    """Steps of 1e-5 are below what bfloat16 can tell from 1: nearly all weights would stay where they were."""
    start = case.make_start(tmp_path / "start", dtype)
    job = make_job(start, tmp_path, learning_rate=1e-5, epochs=4)
    before = job.model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}
    job.fit()
    assert (job.model.bert.encoder.layer[0].attention.self.query.weight != before).float().mean() > 0.99
    assert {
        p.dtype for p in minibert.BertForSequenceClassification.from_pretrained(tmp_path / "run/model").parameters()
    } == {torch.float32}


def test_no_number_stops_the_run(start, trained, tmp_path, capsys):
    """Whether it comes with the loss or, behind the last step of an epoch, with the weights."""
    arguments = (trained / "train.csv", trained / "dev.csv", "classification")
    for size in (16, 200):
        assert run(start, tmp_path / "run", *arguments, "--learning-rate", "1e38", "--batch-size", size) == 1
        assert re.search(r"minibert: .* is (nan|inf) at step 1: stopped, no checkpoint", capsys.readouterr().err)
        assert not (tmp_path / "run" / "model").exists()
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert run(start, tmp_path / "run", *arguments, "--learning-rate", "3e-3", "--batch-size", 200, "--resume") == 0
    assert "--learning-rate is 0.003 from here on, and was 1e+38" in capsys.readouterr().out


def test_no_number_leaves_the_last_good_checkpoint(start, trained, tmp_path, monkeypatch):
    step = FineTuning.train_step

    def poisoned(job):
        if job.step == 20:
            job.model.classifier.weight.data[0, 0] = torch.nan
        return step(job)

    arguments = (trained / "train.csv", trained / "dev.csv", "classification", "--save-every", 8)
    with monkeypatch.context() as patched:
        patched.setattr(FineTuning, "train_step", poisoned)
        assert run(start, tmp_path / "run", *arguments) == 1
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 16
    assert run(start, tmp_path / "run", *arguments, "--resume") == 0
    case.assert_same_end(trained / "run", tmp_path / "run")


# Heads


def test_a_model_keeps_its_numbers_for_labels_it_knows(trained, tmp_path, capsys):
    directory = tmp_path / "other"
    model = minibert.BertForSequenceClassification.from_pretrained(
        trained / "run" / "model", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1}
    )
    model.save_pretrained(directory)
    minibert.BertTokenizer.from_pretrained(trained / "run" / "model").save_pretrained(directory)
    assert run(directory, tmp_path / "run", trained / "train.csv", trained / "dev.csv") == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}
    assert "head: the model's own" in capsys.readouterr().out


@pytest.mark.parametrize("names", ["joy anger", "joy anger fear", "joy anger fear love hate"])
def test_other_labels_get_a_new_head(trained, tmp_path, names, capsys):
    """Also where there are as many: weights that meant good and bad say nothing about joy and anger."""
    names = sorted(names.split())
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"sun day,{name}\ncat dog,{name}\n" for name in names))
    assert run(trained / "run/model", tmp_path / "run", path, path, "classification", "--epochs", 1) == 0
    told = capsys.readouterr().out
    assert f"head: new, for {len(names)} labels; the model's (BertForSequenceClassification: bad, good) is left" in told
    config = minibert.BertConfig.from_pretrained(tmp_path / "run/model")
    assert list(config.id2label.values()) == names


def test_what_a_new_head_takes_over(start, trained):
    """The encoder and its pooler; nothing of a head for other labels, of another task or another kind of problem."""
    source = minibert.BertForSequenceClassification.from_pretrained(trained / "run/model")
    name = str(trained / "run/model")
    for task, labels in (
        (Classification(), ["a", "b"]),
        (Tagging(), ["bad", "good"]),
        (Classification(MULTI), ["bad", "good"]),
    ):
        begin = open_model(task, name, labels, 0)
        assert not torch.equal(begin.model.classifier.weight, source.classifier.weight)
        states = source.bert.state_dict()
        assert all(torch.equal(value, states[key]) for key, value in begin.model.bert.state_dict().items())
        assert begin.label_ids == {label: i for i, label in enumerate(labels)}
    again = open_model(Classification(), name, ["bad", "good"], 0)
    assert torch.equal(again.model.classifier.weight, source.classifier.weight)
    heads = [open_model(Classification(), str(start), ["a", "b"], seed).model.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_other_tags_get_a_new_head(start, tmp_path):
    names = ["O", "B-A", "I-A"]
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    source = minibert.BertForTokenClassification.from_pretrained(start, **fields)
    source.save_pretrained(tmp_path / "tagger")
    minibert.BertTokenizer.from_pretrained(start).save_pretrained(tmp_path / "tagger")
    for labels, kept in ((["O", "B-B", "I-B"], False), (["O", "B-A"], True), (["O", "B-A", "I-A", "B-B"], False)):
        begin = open_model(Tagging(), str(tmp_path / "tagger"), labels, 0)
        assert torch.equal(begin.model.classifier.weight, source.classifier.weight) == kept
        assert list(begin.label_ids) == (names if kept else labels)


@pytest.mark.parametrize("task", [Classification(), Tagging(), QuestionAnswering(), SentencePairs()])
def test_every_start_is_in_float32(start, tmp_path, task):
    """Also where the head is the model's own."""
    labels = None if isinstance(task, (QuestionAnswering, SentencePairs)) else ["a", "b"]
    fields = {} if labels is None else {"id2label": dict(enumerate(labels)), "label2id": {"a": 0, "b": 1}}
    task.model_class.from_pretrained(start, dtype=torch.bfloat16, **fields).save_pretrained(tmp_path / "half")
    minibert.BertTokenizer.from_pretrained(start).save_pretrained(tmp_path / "half")
    begin = open_model(task, str(tmp_path / "half"), labels, 0)
    assert {parameter.dtype for parameter in begin.model.parameters()} == {torch.float32}
    assert begin.head == ("none: mean pooling" if isinstance(task, SentencePairs) else "the model's own")


def test_a_checkpoint_without_a_pooler_gets_one(tmp_path, caplog):
    case.make_start(tmp_path / "start")
    minibert.BertForMaskedLM.from_pretrained(tmp_path / "start").save_pretrained(tmp_path / "start")
    begin = open_model(Classification(), str(tmp_path / "start"), ["a", "b"], 0)
    assert begin.model.bert.pooler.dense.weight.std() > 0
    assert "untrained" not in caplog.text  # "train them before use": that is what is being done
    words = minibert.BertModel.from_pretrained(tmp_path / "start", add_pooling_layer=False).embeddings.word_embeddings
    assert torch.equal(begin.model.bert.embeddings.word_embeddings.weight, words.weight)


# Rows


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

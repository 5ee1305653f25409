"""Questions and answers: SQuAD's files, windows as the pipeline cuts them, a model that answers."""

from __future__ import annotations

import json
import os
import random
import signal

import finetune_case as case
import pytest
from finetune_case import assert_same_end, metrics_of, run

import minibert
from minibert import cli, pipeline
from minibert.finetuning import loop
from minibert.finetuning.answers import answer_scores
from minibert.finetuning.question_answering import QuestionAnswering
from minibert.finetuning.squad import read_questions


def paragraph(context, *questions):
    """questions: (question, answers..., where an answer is a text that stands in the context)."""
    qas = [
        {
            "id": str(i),
            "question": question,
            "answers": [{"text": a, "answer_start": context.index(a)} for a in answers],
        }
        for i, (question, *answers) in enumerate(questions)
    ]
    return {"context": context, "qas": qas}


def squad(path, *paragraphs, **more):
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "x", "paragraphs": list(paragraphs)}]} | more))
    return path


def travels(path, count, seed, *, impossible=False):
    """Who (asked as "sky") was where (asked as "day")? A list of things that has a person and a city in it, or not."""
    draw, paragraphs = random.Random(seed), []
    for _ in range(count):
        words = draw.choices(["cat", "dog", "bird", "fish", "sun", "rain"], k=draw.randint(1, 6))
        kind = draw.choice(["sky", "day"])
        answers = {"sky": draw.choice(["sarah", "tom"]), "day": draw.choice(["paris", "london"])}
        has = not impossible or draw.random() < 0.6
        for asked, answer in answers.items():
            if asked != kind or has:
                words.insert(draw.randint(0, len(words)), answer)
        made = paragraph(", ".join(words), (kind, *[answers[kind]] * has))
        if impossible:
            made["qas"][0]["is_impossible"] = not has
        paragraphs.append(made)
    return squad(path, *paragraphs)


@pytest.mark.parametrize("impossible", [False, True])
def test_a_model_that_answers(start, tmp_path, impossible, capsys):
    """Above one of both names at random, and above never answering: half of the answers."""
    train = travels(tmp_path / "train.json", 400, 0, impossible=impossible)
    dev = travels(tmp_path / "dev.json", 40, 1, impossible=impossible)
    assert run(start, tmp_path / "run", train, dev, "question-answering", "--epochs", 6) == 0
    told = capsys.readouterr().out
    assert ("questions may have no answer" if impossible else "every question has an answer") in told
    best = max(metrics_of(tmp_path / "run"), key=lambda line: line["f1"])
    assert best["f1"] >= best["exact_match"] > 75
    assert ("no_answer" in best) == impossible
    directory = tmp_path / "run" / "model"
    ask = pipeline("question-answering", directory, handle_impossible_answer=impossible)
    assert ask(question="sky", context="cat, paris, tom, dog")["answer"] == "tom"
    assert ask(question="day", context="cat, paris, tom, dog")["answer"] == "paris"
    assert cli.main(["answer", "day", "sun, sarah, rain, london", "--model", str(directory)]) == 0
    assert "london" in capsys.readouterr().out
    if impossible:
        assert ask(question="day", context="cat, tom, dog")["answer"] == ""


def test_the_threshold_of_no_answer(start, tmp_path, capsys):
    """Found after each epoch; with it the pipeline gives the answers that were scored, without it those of 0."""
    train, dev = (travels(tmp_path / f"{n}.json", n, n, impossible=True) for n in (200, 60))
    assert run(start, tmp_path / "run", train, dev, "question-answering", "--epochs", 2) == 0
    metrics = metrics_of(tmp_path / "run")
    best = max(metrics, key=lambda line: line["f1"])
    assert all(line["best_f1"] >= line["f1"] for line in metrics)
    assert f"best_f1_thresh {best['best_f1_thresh']:.4f}" in capsys.readouterr().out
    ask = pipeline("question-answering", tmp_path / "run" / "model", fast=False, max_seq_len=32,
                   handle_impossible_answer=True)  # fmt: skip
    questions = read_questions(dev)
    asked = [{"question": each.question, "context": each.context} for each in questions]
    right = [[text for text, _ in each.answers] for each in questions]
    ends = {name: value for name, value in best.items() if name not in ("step", "epoch", "loss", "best_f1_thresh")}
    plain = answer_scores([each["answer"] for each in ask(asked)], right)
    chosen = ask(asked, null_score_diff_threshold=best["best_f1_thresh"])
    scored = answer_scores([each["answer"] for each in chosen], right)
    assert ends == plain | {"best_f1" if name == "f1" else f"best_f1_{name}": value for name, value in scored.items()}


def test_no_threshold_without_unanswered_questions(start, tmp_path):
    """Not where validation has none: any threshold that keeps all answers would be the best."""
    train, dev = travels(tmp_path / "train.json", 60, 0, impossible=True), travels(tmp_path / "dev.json", 20, 1)
    assert run(start, tmp_path / "run", train, dev, "question-answering", "--epochs", 1) == 0
    assert metrics_of(tmp_path / "run")[0].keys() == {"step", "epoch", "loss", "exact_match", "f1"}


def test_questions_without_answers_are_resumed_to_the_same_bits(start, tmp_path, monkeypatch):
    train, dev = (travels(tmp_path / f"{n}.json", n, n, impossible=True) for n in (100, 30))
    files = (train, dev, "question-answering", "--epochs", 3)
    assert run(start, tmp_path / "whole", *files) == 0
    step = loop.FineTuning.train_step

    def interrupted(self):
        value = step(self)
        if self.step == 10:  # of 7 an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return value

    with monkeypatch.context() as patched:
        patched.setattr(loop.FineTuning, "train_step", interrupted)
        assert run(start, tmp_path / "run", *files) == 130
    assert cli.main(["finetune", "--resume", "--output", str(tmp_path / "run")]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert all("best_f1_thresh" in line for line in metrics_of(tmp_path / "run"))


def test_squad_and_flat_files_say_the_same(tmp_path):
    context = "Zoë 𝔸 lives in Paris. She was born in Rome."
    whole = squad(
        tmp_path / "a.json", paragraph(context, ("Where?", "Paris", "in Paris"), ("Born?", "Rome"), ("Why?",))
    )
    expected = [
        ("Where?", (("Paris", 15), ("in Paris", 12))),
        ("Born?", (("Rome", 38),)),
        ("Why?", ()),
    ]
    assert [(each.question, each.answers) for each in read_questions(whole)] == expected
    assert {each.context for each in read_questions(whole)} == {context}
    flat = [
        {"question": question, "context": context,
         "answers": {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}}
        for question, answers in expected
    ]  # fmt: skip
    for name, content in (("b.jsonl", "\n".join(map(json.dumps, flat))), ("c.json", json.dumps(flat)),
                          ("d.json", "\n\n".join(json.dumps(each, ensure_ascii=False) for each in flat))):  # fmt: skip
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        assert [(each.question, each.answers) for each in read_questions(path)] == expected
    indented = tmp_path / "e.JSON"
    indented.write_text("\ufeff" + json.dumps(json.loads(whole.read_text()), indent=1))
    assert [(each.question, each.answers) for each in read_questions(indented)] == expected


GOOD = {"question": "q", "context": "a b c", "answers": [{"text": "b", "answer_start": 2}], "id": 7}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": [{"text": "b", "answer_start": 1}]}, "(id 7): the answer 'b' does not begin at character 1"),
        ({"answers": [{"text": "B", "answer_start": 2}]}, "the answer 'B' does not begin at character 2, where 'b'"),
        ({"answers": [{"text": "c d", "answer_start": 4}]}, "the answer 'c d' does not begin at character 4"),
        ({"answers": [{"text": "b", "answer_start": -3}]}, "answer_start is -3, but must be at least 0"),
        ({"answers": [{"text": "b", "answer_start": "2"}]}, "'answer_start' must be a whole number, got '2'"),
        ({"answers": [{"text": "b", "answer_start": True}]}, "'answer_start' must be a whole number, got True"),
        ({"answers": [{"text": None, "answer_start": 2}]}, "'text' must be a text, got None"),
        ({"answers": [{"text": "", "answer_start": 2}]}, "the answer '' does not begin"),
        ({"answers": ["b"]}, "answers[0]: must be an object with 'answer_start', got 'b'"),
        ({"answers": {"text": ["b"], "answer_start": []}}, "answers: 1 texts, but 0 beginnings"),
        ({"answers": None}, "'answers' must be a list, got None"),
        ({"answers": [], "is_impossible": False}, "is_impossible is false, but there are 0 answers"),
        ({"is_impossible": True}, "is_impossible is true, but there are 1 answers"),
        ({"is_impossible": 0}, "is_impossible must be true or false, got 0"),
        ({"question": " "}, "the question is empty"),
        ({"context": "\n"}, "the context is empty"),
        ({"question": "\ud83d"}, "'question' is not Unicode text"),
        ({"context": 5}, "'context' must be a text, got 5"),
        ({"question": ["q"]}, "'question' must be a text, got ['q']"),
    ],
)  # fmt: skip
def test_errors_in_questions(tmp_path, change, message):
    record = GOOD | change
    flat, whole = tmp_path / "flat.jsonl", tmp_path / "whole.json"
    flat.write_text(json.dumps(GOOD) + "\n" + json.dumps(record))
    context = record.pop("context")
    whole.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [record]}]}]}))
    for path, place in ((flat, "flat.jsonl:2"), (whole, "whole.json: data[0].paragraphs[0]")):
        with pytest.raises(ValueError) as error:
            read_questions(path)
        assert place in str(error.value)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "a.json: no questions"),
        ("a.json", "[]", "a.json: no questions"),
        ("a.json", '{"data": []}', "a.json: no questions"),
        ("a.json", '{"data": [{"paragraphs": []}]}', "a.json: no questions"),
        ("a.json", '{"version": "2.0"}', "a.json: 'data' must be a list, got None"),
        ("a.json", '{"data": {}}', "a.json: 'data' must be a list, got {}"),
        ("a.json", '{"data": [{"title": "x"}]}', "data[0]: 'paragraphs' must be a list"),
        ("a.json", '{"data": [{"paragraphs": [{"context": "x"}]}]}', "data[0].paragraphs[0]: 'qas' must be a list"),
        ("a.json", '{"data": [5]}', "data[0]: must be an object with 'paragraphs', got 5"),
        ("a.json", '{"data": [', "a.json: not JSON"),
        ("a.json", '{"data": [], "data": []}', "named more than once: 'data'"),
        ("a.json", '{"data": []}'.encode("utf-16"), "the file is text in UTF-16"),
        ("a.csv", "question,context\n", "question answering reads SQuAD's JSON"),
        ("a.json", json.dumps(GOOD | {"answers": []}), "a.json: no question has an answer, nothing to learn"),
    ],
)
def test_errors_in_files_of_questions(start, tmp_path, name, content, message, capsys):
    path, good = tmp_path / name, travels(tmp_path / "good.json", 2, 0)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(start, tmp_path / "run", path, good, "qa") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("before", range(24, 33))
def test_windows_and_their_targets(start, tmp_path, before):
    """Every window that holds the whole answer points at it, all others at [CLS], also those that hold half of it."""
    words = ["sun", "rain", "day", "sky", "cat", "dog", "bird"] * 8
    context = " ".join([*words[:before], "paris london", *words[before:]])
    path = squad(tmp_path / "a.json", paragraph(context, ("tom", "paris london"), ("sarah",)))
    task, tokenizer = QuestionAnswering(doc_stride=4), minibert.BertTokenizer.from_pretrained(start)
    rows = task.encode(task.read(path), tokenizer, {}, 16)
    wanted = tokenizer("paris london", add_special_tokens=False)["input_ids"]
    found = 0
    for ids, types, (first, last) in zip(rows.input_ids, rows.token_type_ids, rows.targets, strict=True):
        assert len(ids) <= 16
        assert types == [0] * 3 + [1] * (len(ids) - 3)
        holds = any(ids[i : i + 2] == wanted for i in range(len(ids))) and ids[1] == tokenizer.vocab["tom"]
        assert ids[first : last + 1] == (wanted if holds else [tokenizer.cls_token_id])
        found += holds
    assert found >= 1
    parts = [ids[3:-1] for ids in rows.input_ids[: len(rows) // 2]]  # of the first question
    assert [*parts[0], *(token for part in parts[1:] for token in part[4:])] == tokenizer(
        context, add_special_tokens=False
    )["input_ids"]


def test_windows_are_the_pipelines(tmp_path):
    """The rows that are learnt from are those that the pipeline computes."""
    start = case.make_start(tmp_path / "start")
    model = minibert.BertForQuestionAnswering.from_pretrained(start)
    tokenizer = minibert.BertTokenizer.from_pretrained(start)
    context = " ".join(["sun rain", *["day sky cat"] * 20])
    path = squad(tmp_path / "a.json", paragraph(context, ("good dog", "rain"), ("bad", "sun")))
    seen = []

    def look(_module, _arguments, given):
        rows = zip(given["input_ids"].tolist(), given["attention_mask"].sum(1).tolist(), strict=True)
        seen.extend(ids[:length] for ids, length in rows)

    model.register_forward_pre_hook(look, with_kwargs=True)
    ask = pipeline("question-answering", model, tokenizer=tokenizer, fast=False)
    for stride, length in ((None, 32), (3, 20), (0, 16)):
        task = QuestionAnswering(stride)
        rows = task.encode(task.read(path), tokenizer, {}, length)
        for question in ("good dog", "bad"):
            ask(question=question, context=context, max_seq_len=length, doc_stride=stride)
        assert sorted(seen) == sorted(rows.input_ids)
        seen.clear()


def test_questions_that_leave_no_room(start, tmp_path, capsys):
    path = squad(tmp_path / "a.json", paragraph("sun day " * 30, ("cat " * 40, "sun")))
    assert run(start, tmp_path / "run", path, path, "qa") == 1
    assert "(id 0): a question of 40 tokens leaves 0 of 32 to the context" in capsys.readouterr().err

"""How pipelines are made: tasks, devices, options, wrong heads, ready models with hooks and adapters, processes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading

import pytest
import torch
import transformers
from pipeline_case import HEADS, pipelines, same, tiny
from reference import rounding

from minibert.pipelines import PIPELINES, pipeline
from minibert.pipelines.base import ForkedLock

TEXTS = ["Sarah lives in London.", "It was an unbelievably fine day."]


@pytest.fixture(scope="module")
def classifier(minilm_dir):
    return tiny("BertForSequenceClassification", minilm_dir, 0, num_labels=3)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, minilm_dir):
    """A directory for each head."""
    directories = {}
    for head in {*HEADS.values(), "BertForPreTraining"}:
        directories[head] = tmp_path_factory.mktemp(head)
        model, tokenizer = tiny(head, minilm_dir, 1)[0]
        model.save_pretrained(directories[head])
        tokenizer.save_pretrained(directories[head])
    return directories


# What a model is for


@pytest.mark.parametrize("task", HEADS)
def test_the_head_says_the_task(saved, task):
    directory = saved[HEADS[task]]
    assert pipeline(model=directory).task == task
    found = pipeline(task, model=directory)
    assert pipeline(model=found.model, tokenizer=found.tokenizer).task == task


def test_a_pretraining_model_fills_masks(saved):
    assert pipeline(model=saved["BertForPreTraining"]).task == "fill-mask"
    assert pipeline("next-sentence-prediction", saved["BertForPreTraining"])("A.", "B.")["label"]
    with pytest.raises(ValueError, match="give a task, or a model"):
        pipeline()


@pytest.mark.parametrize("task", [task for task in PIPELINES if task != "feature-extraction"])
@pytest.mark.parametrize("head", sorted({*HEADS.values(), "BertForPreTraining"}))
def test_a_model_saved_with_another_head_is_refused(saved, task, head):
    wanted = PIPELINES[task].model_class.__name__
    fits = head == wanted or (head == "BertForPreTraining" and task in ("fill-mask", "next-sentence-prediction"))
    if fits:
        assert pipeline(task, saved[head]).task == task
        return
    with pytest.raises(ValueError, match=f"{task} needs a {wanted}, but .* was saved as a {head}"):
        pipeline(task, saved[head])


def test_a_bare_encoder_is_no_classifier(saved, tmp_path, minilm_dir):
    with pytest.raises(ValueError, match="MiniLM|gt_all|model"):
        pipeline("text-classification", minilm_dir)
    config = (saved["BertModel"] / "config.json").read_text().replace('"BertModel"', '"MyEncoder"')
    for file in saved["BertModel"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"is not fine-tuned for text-classification: it lacks classifier\.weight"):
        pipeline("text-classification", tmp_path)


# Options


def test_device_maps(classifier, saved):
    directory = saved["BertForSequenceClassification"]
    for device_map in ("cpu", "auto" if not torch.cuda.is_available() else "cpu", {"": "cpu"}, torch.device("cpu")):
        assert pipeline(model=directory, device_map=device_map).device.type == "cpu"
    with pytest.raises(ValueError, match="must name one device"):
        pipeline(model=directory, device_map={"bert": "cpu", "classifier": "cuda:0"})
    with pytest.raises(ValueError, match="give device or device_map"):
        pipeline(model=directory, device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match="device='gpu'"):
        pipeline(model=directory, device="gpu")
    with pytest.raises(ValueError, match="device='meta' holds no numbers"):
        pipeline(model=directory, device="meta")
    with pytest.raises(ValueError, match="device='gpu'"):
        PIPELINES["text-classification"](*classifier, device="gpu")


def test_dtypes(classifier, saved):
    directory = saved["BertForSequenceClassification"]
    for options in ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"model_kwargs": {"dtype": "bf16"}}):
        assert pipeline(model=directory, **options).dtype == torch.bfloat16
    assert pipeline(model=directory, torch_dtype="auto").torch_dtype == torch.float32
    with pytest.raises(ValueError, match="give dtype or torch_dtype"):
        pipeline(model=directory, dtype="float32", torch_dtype="float16")
    with pytest.raises(ValueError, match="cast it with"):
        PIPELINES["text-classification"](*classifier, dtype="float16")
    assert PIPELINES["text-classification"](*classifier, dtype="float32").dtype == torch.float32


def test_what_transformers_takes_and_bert_has_no_use_for(classifier, saved):
    options = {"use_fast": True, "trust_remote_code": True, "framework": "pt", "feature_extractor": None}
    assert pipeline(model=saved["BertForSequenceClassification"], num_workers=2, **options)(TEXTS, num_workers=0)
    with pytest.raises(ValueError, match="framework is not for a pipeline of BERT"):
        pipeline(model=saved["BertForSequenceClassification"], framework="tf")
    with pytest.raises(ValueError, match="num_workers must be a whole number"):
        PIPELINES["text-classification"](*classifier, num_workers=-1)
    kind = PIPELINES["text-classification"]
    assert kind(model=classifier[0], tokenizer=classifier[1], feature_extractor=None, processor=None)(TEXTS)


@pytest.mark.parametrize("task", [*HEADS, "zero-shot-classification"])
def test_unknown_options_are_named(saved, task):
    directory = saved[HEADS.get(task, "BertForSequenceClassification")]
    with pytest.raises(TypeError, match=f"{task} has no option 'topk'; it has .*batch_size"):
        pipeline(task, directory, topk=1)
    made = pipeline(task, directory)
    with pytest.raises(TypeError, match=f"{task} has no option 'topk'; it has .*batch_size"):
        made("text", topk=1)


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "feature-extraction"])
def test_options_of_the_tokenizer(saved, task):
    """What the model does not take is left out; what would give other rows than one a text is refused."""
    kind, made = PIPELINES[task], pipeline(task, saved[HEADS[task]])
    name = "tokenize_kwargs" if task == "feature-extraction" else "tokenizer_kwargs"
    texts = ["a [MASK] here", "[MASK]"]
    more = {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True}
    assert made(texts, **{name: more}) == made(texts)
    with pytest.raises(TypeError, match=f"{task}: the tokenizer has no option 'nonsense'; it has .*truncation"):
        made(texts, **{name: {"nonsense": 1}})
    for other in ("return_overflowing_tokens", "is_split_into_words"):
        with pytest.raises(ValueError, match=f"{other}=True: {task} takes whole texts, and gives one result each"):
            kind(made.model, made.tokenizer, **{name: {other: True}})(texts)
        assert made(texts, **{name: {other: False}}) == made(texts)
    if task == "text-classification":
        for call in (made, lambda _, **options: kind(made.model, made.tokenizer, **options)):
            with pytest.raises(ValueError, match="truncation is given twice, by itself and in tokenizer_kwargs"):
                call(texts, truncation=True, tokenizer_kwargs={"truncation": False})


def test_features_of_padded_texts(minilm_dir):
    ours, theirs = pipelines("feature-extraction", "BertModel", minilm_dir)
    within = 4 * rounding(theirs.model)
    for options in (
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 12, "padding_side": "left"},
    ):
        assert same(ours(TEXTS, tokenize_kwargs=options), theirs(TEXTS, tokenize_kwargs=dict(options)), within)
    for call in (
        lambda: ours("x", truncation=True, tokenize_kwargs={"truncation": True}),
        lambda: pipeline("feature-extraction", ours.model, ours.tokenizer, truncation=True,
                         tokenize_kwargs={"truncation": False}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="truncation is given twice"):
            call()


def test_offsets_from_outside(minilm_dir):
    ours, _ = pipelines("token-classification", "BertForTokenClassification", minilm_dir, num_labels=3)
    found = ours("in London")
    own = ours.tokenizer("in London", return_offsets_mapping=True)["offset_mapping"]
    assert ours("in London", offset_mapping=own) == found
    moved = [(start + 5, end + 5) for start, end in own]
    again = ours(["in London"], offset_mapping=[moved])[0]
    assert [(each["start"], each["end"]) for each in again] == [(e["start"] + 5, e["end"] + 5) for e in found]
    with pytest.raises(ValueError, match="offset_mapping of inputs has 3 pairs, but there are 4 tokens"):
        ours("in London", offset_mapping=own[:3])
    with pytest.raises(ValueError, match="offset_mapping is of 1 texts, but there are 2"):
        ours(["a", "b"], offset_mapping=[own])


def test_a_pipeline_is_saved_whole(saved, tmp_path):
    one = pipeline(model=saved["BertForTokenClassification"], aggregation_strategy="simple")
    one.save_pretrained(tmp_path / "copy")
    again = pipeline(model=tmp_path / "copy", aggregation_strategy="simple")
    assert again(TEXTS) == one(TEXTS)
    assert transformers.pipeline("ner", str(tmp_path / "copy"), aggregation_strategy="simple")(TEXTS)


# Zero-shot


@pytest.fixture(scope="module")
def zero_shot(minilm_dir):
    labels = {"label2id": {"contradiction": 0, "neutral": 1, "entailment": 2}}
    labels["id2label"] = {number: label for label, number in labels["label2id"].items()}
    return pipelines("zero-shot-classification", "BertForSequenceClassification", minilm_dir, 3, **labels)


@pytest.mark.parametrize(
    "options",
    [
        {"candidate_labels": "politics, sports,health"},
        {"candidate_labels": ["sports", "politics"], "multi_label": True},
        {"candidate_labels": ["one"]},
        {"candidate_labels": ["a", "b"], "hypothesis_template": "Here it is about {}!"},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, ["word " * 200]], ids=["one", "list", "cut"])
def test_zero_shot_is_that_of_transformers(zero_shot, inputs, options):
    ours, theirs = zero_shot
    mine, reference = ours(inputs, **options), theirs(inputs, **options)
    assert same(mine, reference)
    assert same(ours(sequences=inputs, **options), reference)


def test_zero_shot_errors(zero_shot, classifier):
    ours, _ = zero_shot
    for options, message in (
        ({}, "candidate_labels must be given"),
        ({"candidate_labels": []}, "candidate_labels is empty"),
        ({"candidate_labels": "a", "hypothesis_template": "about it"}, "hypothesis_template must have {}"),
    ):
        with pytest.raises(ValueError, match=message):
            ours("text", **options)
    with pytest.raises(ValueError, match=r"inputs\[1\] is empty"):
        ours(["text", ""], candidate_labels="a")
    with pytest.raises(TypeError, match="candidate_labels must be a list of str"):
        ours("text", candidate_labels=5)
    with pytest.raises(ValueError, match="a label that begins with 'entail'; its labels are LABEL_0"):
        pipeline("zero-shot-classification", *classifier)("text", candidate_labels="a")


# Processes


@pytest.mark.parametrize("task", [*HEADS, "zero-shot-classification"])
def test_pipelines_pickle(saved, task):
    one = pipeline(task, saved[HEADS.get(task, "BertForSequenceClassification")])
    inputs = {"fill-mask": "a [MASK].", "next-sentence-prediction": ("a", "b"),
              "question-answering": {"question": "who?", "context": "a man"}}.get(task, "a text")  # fmt: skip
    if task != "zero-shot-classification":
        expected = one(inputs)
        assert same(pickle.loads(pickle.dumps(one))(inputs), expected)
        assert same(copy.deepcopy(one)(inputs), expected)
    assert pickle.loads(pickle.dumps(one)).task == task


def test_a_lock_does_not_outlive_a_fork():
    lock = ForkedLock()
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        if not hasattr(os, "fork"):
            pytest.skip("no fork on this system")
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_take, args=(lock,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
    finally:
        go.set()
        thread.join()
    assert isinstance(pickle.loads(pickle.dumps(lock)), ForkedLock)


def _take(lock: ForkedLock) -> None:
    with lock:
        pass

"""The pipelines: results in transformers' shape and with its numbers; batching, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pipeline_case import pipelines, same, tiny
from reference import realign

import minibert
from minibert.pipelines import base, batches, pipeline

REACTIONS = [
    "C C ( = O ) O . [MASK] N C C",
    "c 1 c c [MASK] c c 1 Br . B ( O ) O",
    "[MASK] [MASK] = O",
    "N [MASK]",
    "C C O " * 40 + "[MASK] = O",
]
SENTENCES = ["One [MASK] two.", "[MASK] and [MASK], or don't.", "The [MASK] is tokenization " + "very " * 30 + "long."]


@pytest.fixture(scope="module")
def reactions(rxnfp_dir):
    """A real checkpoint in both libraries."""
    directory = rxnfp_dir / "bert_pretrained"
    model = realign(transformers.BertForMaskedLM.from_pretrained(directory))
    tokenizer = transformers.BertTokenizer.from_pretrained(directory, do_lower_case=False)
    return pipeline("fill-mask", directory), transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=[0, 1])
def fill_masks(request, minilm_dir):
    """A random tiny model in both libraries."""
    return pipelines("fill-mask", "BertForMaskedLM", minilm_dir, request.param)


@pytest.fixture(scope="module")
def fill_mask(minilm_dir):
    return pipeline("fill-mask", *tiny("BertForMaskedLM", minilm_dir, 0)[0])


@pytest.fixture(scope="module")
def next_sentences(minilm_dir):
    ours, theirs = tiny("BertForNextSentencePrediction", minilm_dir, 3)
    return pipeline("next-sentence-prediction", *ours), theirs


# fill-mask


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 30}], ids=str)
@pytest.mark.parametrize("form", ["one", "many", "list of one", "list of one with two masks"])
def test_fill_mask_gives_the_results_of_transformers(reactions, fill_masks, form, options):
    for (ours, theirs), texts in ((reactions, REACTIONS), (fill_masks, SENTENCES)):
        two = [text for text in texts if text.count("[MASK]") == 2]
        inputs = {"one": texts[0], "many": texts, "list of one": texts[:1], "list of one with two masks": two}[form]
        assert same(ours(inputs, **options), theirs(inputs, **options))


@pytest.mark.filterwarnings("ignore:target")
@pytest.mark.parametrize(
    "targets", ["good", ["good", "bad", "good"], ["unbelievably", "Good", "##ing"], ["[UNK]"], ["good", " "]], ids=str
)
def test_targets_are_those_of_transformers(fill_masks, targets):
    ours, theirs = fill_masks
    for inputs in (SENTENCES, SENTENCES[0]):
        for top_k in (None, 2):
            options = {"targets": targets} | ({"top_k": top_k} if top_k else {})
            assert same(ours(inputs, **options), theirs(inputs, **options))


def test_targets_beyond_the_vocabulary_are_told(fill_mask):
    with pytest.warns(UserWarning, match=r"target 'unbelievably' is not one token: 'un' is scored instead"):
        answers = fill_mask(SENTENCES[0], targets="unbelievably")
    assert [answer["token_str"] for answer in answers] == ["un"]


def test_real_text_in_batches(fill_masks, english):
    lines = [line.split() for line in english if 2 < len(line.split()) < 30][:25]
    texts = [" ".join([*words[: len(words) // 2], "[MASK]", *words[len(words) // 2 + 1 :]]) for words in lines]
    ours, theirs = fill_masks
    assert same(ours(texts), theirs(texts))
    assert same(ours(texts, batch_size=7), ours(texts))


def test_padding_and_text_with_special_tokens(fill_masks):
    """A predicted or written [PAD] is left out of the sequence; truncation and defaults are taken over."""
    ours, theirs = fill_masks
    texts = ["[PAD] a [MASK] [SEP] b", "x [MASK] [CLS] [MASK] [PAD]"]
    assert same(ours(texts, targets=["[PAD]", "a"]), theirs(texts, targets=["[PAD]", "a"]))
    long = "The [MASK] is " + "very " * 100 + "long."
    cut = {"tokenizer_kwargs": {"truncation": True, "max_length": 64}}
    assert same(ours(long, **cut), theirs(long, **cut))
    again = pipeline("fill-mask", ours.model, ours.tokenizer, top_k=2, tokenizer_kwargs={"truncation": True})
    assert same(
        again(long), theirs(long, top_k=2, **cut)
    )  # cut to the model's 64 positions, not to the tokenizer's 512
    assert len(again(long, top_k=3)) == 3


def test_only_the_masked_rows_are_scored(fill_mask, monkeypatch):
    rows = []
    plain = pipeline("fill-mask", fill_mask.model, fill_mask.tokenizer, fast=False)
    hook = plain.model.cls.register_forward_pre_hook(lambda module, inputs: rows.append(tuple(inputs[0].shape)))
    expected = plain(SENTENCES)
    hook.remove()
    assert rows == [(4, 32)]
    scored, logits = [], fill_mask._logits
    monkeypatch.setattr(fill_mask, "_logits", lambda *given: scored.append(logits(*given)) or scored[-1])
    assert same(fill_mask(SENTENCES), expected)
    assert [tuple(found.shape) for found in scored] == [(4, fill_mask.model.config.vocab_size)]


def test_a_model_in_train_mode_answers_as_in_eval_mode(fill_mask):
    expected = fill_mask(SENTENCES)
    fill_mask.model.train()
    again = pipeline("fill-mask", fill_mask.model, fill_mask.tokenizer)
    assert same(again(SENTENCES), expected)


def test_half_precision_scores_are_probabilities(minilm_dir):
    model, tokenizer = tiny("BertForMaskedLM", minilm_dir, 0)[0]
    answers = pipeline("fill-mask", model.to(torch.bfloat16), tokenizer)(SENTENCES[0], top_k=30522)
    eps = torch.finfo(torch.float32).eps  # of the scores, and not of bfloat16, in which the logits are
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=30522 * eps)


# next-sentence-prediction

PAIRS = [("He opened the door.", "Nobody was there."), ("Short.", "word " * 40), ("x", ""), ("", "")]


def test_next_sentence_has_the_probabilities_of_transformers(next_sentences):
    ours, (model, tokenizer) = next_sentences
    results = ours(PAIRS)
    for (text, text_pair), result in zip(PAIRS, results, strict=True):
        with torch.no_grad():
            row = model(**tokenizer([text], [text_pair], return_tensors="pt")).logits.softmax(-1)[0].tolist()
        expected = {
            "label": "IS_NEXT" if row[0] >= row[1] else "NOT_NEXT",
            "score": max(row),
            "probabilities": {"IS_NEXT": row[0], "NOT_NEXT": row[1]},
        }
        assert same(result, expected)
        assert same(ours(text, text_pair), expected)


@pytest.mark.parametrize(("label", "other"), [(minibert.NextSentence.IS_NEXT, 1), (minibert.NextSentence.NOT_NEXT, 0)])
def test_next_sentence_names_the_likelier_label(next_sentences, label, other):
    bias = next_sentences[0].model.cls.seq_relationship.bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[label] += 1000
    result = next_sentences[0](*PAIRS[0])
    bias.data.copy_(before)
    assert result["label"] == label.name
    assert result["score"] == result["probabilities"][label.name] == 1
    assert result["probabilities"][minibert.NextSentence(other).name] == 0


def test_next_sentence_takes_pairs_in_every_form(next_sentences):
    ours, _ = next_sentences
    text, text_pair = PAIRS[0]
    one = ours(text, text_pair)
    assert ours((text, text_pair)) == ours({"text": text, "text_pair": text_pair}) == one
    many = ours(PAIRS)
    assert isinstance(many, list)
    assert ours([list(pair) for pair in PAIRS]) == many
    assert ours(*(list(texts) for texts in zip(*PAIRS, strict=True))) == many
    assert ours([{"text": a, "text_pair": b} for a, b in PAIRS]) == many
    assert ours([PAIRS[0]]) == [one]
    assert ours([]) == []


# All tasks


@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    tokens=st.integers(1, 200),
    batch_size=st.none() | st.integers(1, 9),
)
def test_batches_hold_every_row_once_within_the_budget(lengths, tokens, batch_size):
    made = list(batches(lengths, tokens, batch_size))
    assert sorted(row for rows in made for row in rows) == list(range(len(lengths)))
    for rows in made:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= tokens
        assert batch_size is None or len(rows) <= batch_size
    for rows, more in pairwise(made):  # no batch could have taken the next row too
        assert len(rows) == batch_size or (len(rows) + 1) * max(lengths[row] for row in [*rows, *more]) > tokens


def test_small_batches_give_the_same_results(fill_mask, monkeypatch):
    expected = fill_mask(SENTENCES * 3)
    monkeypatch.setitem(base.TOKENS_PER_BATCH, "cpu", 10)
    assert same(fill_mask(SENTENCES * 3), expected)


def test_a_directory_and_its_parts(fill_mask, tmp_path):
    fill_mask.model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.txt"):
        pipeline("fill-mask", tmp_path)
    elsewhere = tmp_path / "tokenizer"
    fill_mask.tokenizer.save_pretrained(elsewhere)
    expected = fill_mask(SENTENCES)
    for tokenizer in (str(elsewhere), elsewhere, fill_mask.tokenizer):
        assert pipeline("fill-mask", str(tmp_path), tokenizer, device="cpu")(SENTENCES) == expected
    fill_mask.tokenizer.save_pretrained(tmp_path)
    assert pipeline("fill-mask", model=tmp_path, device=-1, top_k=5)(SENTENCES) == expected
    half = pipeline("fill-mask", tmp_path, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert "task='fill-mask', model=BertForMaskedLM" in repr(half)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ("fill-masc",),
            {},
            ValueError,
            "task must be one of 'fill-mask', 'next-sentence-prediction', .*; got 'fill-masc'",
        ),
        (("fill-mask", "model"), {}, ValueError, "tokenizer must be given"),
        (("fill-mask", "model", "tokenizer"), {"top_k": 0}, ValueError, "top_k must be.* 1 to .*30522, got 0"),
        (("fill-mask", "model", "tokenizer"), {"topk": 1}, TypeError, "topk"),
        (
            ("fill-mask", "model", "tokenizer"),
            {"dtype": "float16"},
            ValueError,
            "dtype=float16 is for a model given",
        ),
        (
            ("next-sentence-prediction", "model", "tokenizer"),
            {},
            TypeError,
            "needs a BertForNextSentencePrediction",
        ),
        (("fill-mask", "/no/such/directory"), {}, FileNotFoundError, "no such directory"),
    ],
    ids=str,
)
def test_errors_of_pipeline(fill_mask, arguments, options, error, message):
    parts = {"model": fill_mask.model, "tokenizer": fill_mask.tokenizer}
    with pytest.raises(error, match=message):
        pipeline(*(parts.get(argument, argument) for argument in arguments), **options)


def test_no_model_is_the_bundled_one(monkeypatch, fill_mask, tmp_path):
    monkeypatch.setattr("minibert.weights.hub._MODELS", tmp_path / "nothing")
    with pytest.raises(ValueError, match="no model is bundled with minibert: pass the name"):
        pipeline("fill-mask")
    fill_mask.model.save_pretrained(tmp_path / "tiny")
    fill_mask.tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr("minibert.weights.hub._MODELS", tmp_path)
    assert pipeline("fill-mask")(SENTENCES) == fill_mask(SENTENCES)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (None, {}, TypeError, "inputs must be a str, or a list or an iterator of them; got None"),
        (["[MASK]", 5], {}, TypeError, r"inputs\[1\] must be a str, got int"),
        ("no mask", {}, ValueError, r"inputs has no \[MASK\]: 'no mask'"),
        (["[MASK]", "[mask]"], {}, ValueError, r"inputs\[1\] has no \[MASK\]: '\[mask\]'"),
        ("a " * 63 + "[MASK]", {}, ValueError, r"inputs has 66 tokens, the model takes 64.*'truncation': True"),
        ("a " * 63 + "[MASK]", {"tokenizer_kwargs": {"truncation": True}}, ValueError, "left after truncation"),
        ("[MASK]", {"top_k": 30523}, ValueError, "top_k must be a whole number from 1 to 30522, got 30523"),
        ("[MASK]", {"top_k": 2.0}, ValueError, "top_k.*got 2.0"),
        ("[MASK]", {"targets": []}, ValueError, r"targets must name at least one word of the vocabulary, got \[\]"),
        ("[MASK]", {"targets": [1]}, TypeError, r"targets\[0\] must be a str, got int"),
        ("[MASK]", {"batch_size": 0}, ValueError, "batch_size must be a whole number from 1 up, got 0"),
        ("[MASK] \ud800", {}, ValueError, "not Unicode"),
        ("[MASK]", {"tokenizer_kwargs": {"padding": "no"}}, ValueError, "padding must be one of"),
        ("[MASK]", {"topk": 5}, TypeError, "topk"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_errors_of_fill_mask(fill_mask, inputs, options, error, message):
    with pytest.raises(error, match=message):
        fill_mask(inputs, **options)


def test_no_texts_give_no_answers(fill_mask):
    assert fill_mask([]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("a",),
            TypeError,
            r"inputs must be a pair \(.*\), or a list or an iterator of them; got str 'a'",
        ),
        ((["a", "b"],), TypeError, r"inputs\[0\] must be a pair.*got str 'a'"),
        (([("a", "b"), ("c", None)],), TypeError, r"inputs\[1\] must be a pair.*got tuple \('c', None\)"),
        (({"text": "a"},), TypeError, "must be a pair.*got dict"),
        (("a", ["b"]), ValueError, "inputs has 1 texts and text_pair 1: give both alone or as lists"),
        ((["a"], ["b", "c"]), ValueError, "inputs has 1 texts and text_pair 2"),
        (("a", 5), TypeError, "text_pair must be a str"),
        (("a", "b " * 70), ValueError, r"inputs has 74 tokens"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_errors_of_next_sentence(next_sentences, arguments, error, message):
    with pytest.raises(error, match=message):
        next_sentences[0](*arguments)

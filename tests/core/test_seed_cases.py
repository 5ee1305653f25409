"""The inputs and printed results of the three notebooks (seed_cases.json).

The figures need the Hub's bert-base and are marked `hub`; without it, the same flows are compared with transformers on
weights that both have.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference import assert_as_exact, assert_same, twins
from transformers import BertTokenizer as ReferenceTokenizer

import minibert
from minibert import demo

CASES = json.loads((Path(__file__).parents[1] / "seed_cases.json").read_text())
SIZES = {"vocab_size": 30522, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def tokenizer(minilm_dir) -> minibert.BertTokenizer:
    # The vocabulary of bert-base-uncased; the sentence encoder cuts texts shorter than BERT does
    return minibert.BertTokenizer(str(minilm_dir / "vocab.txt"))


@pytest.mark.parametrize("case", ["next_sentence", "pretraining_masked_input"])
def test_token_ids_and_segments(tokenizer, case):
    case = CASES[case]
    encoded = tokenizer(case["text"], case["text_pair"])
    first = case["first_segment_length"]
    assert list(encoded.keys()) == ["input_ids", "token_type_ids", "attention_mask"]
    assert encoded["input_ids"] == case["input_ids"]
    assert encoded["token_type_ids"] == [0] * first + [1] * (len(case["input_ids"]) - first)
    assert encoded["attention_mask"] == [1] * len(case["input_ids"])


def notebook_inputs(tokenizer):
    """As the third notebook makes them: every token is a label, then two are masked."""
    inputs = tokenizer(*demo.PRETRAINING, return_tensors="pt")
    inputs["labels"] = inputs["input_ids"].clone()
    assert inputs["labels"][0, [9, 44]].tolist() == CASES["pretraining_loss"]["unmasked_ids_at_9_and_44"]
    inputs["input_ids"][0, [9, 44]] = 103
    assert inputs["input_ids"][0].tolist() == CASES["pretraining_masked_input"]["input_ids"]
    inputs["next_sentence_label"] = torch.LongTensor([0])
    return inputs


def test_demo_uses_the_notebooks_texts():
    assert CASES["fill_mask"]["text"] == demo.FILL_MASK
    assert (CASES["next_sentence"]["text"], CASES["next_sentence"]["text_pair"]) == demo.NEXT_SENTENCE


def test_next_sentence_flow(tokenizer):
    reference, ours = twins("BertForNextSentencePrediction", **SIZES)
    inputs = tokenizer(*demo.NEXT_SENTENCE, return_tensors="pt")
    for label in minibert.NextSentence:
        expected = reference(**inputs, labels=torch.LongTensor([label]))
        assert_same(expected, ours(**inputs, labels=torch.LongTensor([label])))


def test_pretraining_flow(tokenizer):
    reference, ours = twins("BertForPreTraining", **SIZES)
    inputs = notebook_inputs(tokenizer)
    out = ours(**inputs)
    assert list(out.keys()) == CASES["pretraining_loss"]["output_keys"]
    assert_same(reference(**inputs), out)
    del inputs["labels"], inputs["next_sentence_label"]
    assert list(ours(**inputs).keys()) == CASES["pretraining_masked_input"]["output_keys"]
    assert_same(reference(**inputs), ours(**inputs))


def test_pretraining_loss_of_the_command(tokenizer):
    reference, ours = twins("BertForPreTraining", **SIZES)
    result = demo.pretraining_loss(ours, tokenizer, *demo.PRETRAINING, [9, 44])
    assert result["loss"] == reference(**notebook_inputs(tokenizer)).loss.item()
    assert [mask["token"] for mask in result["masked"]] == ["election", "attacked"]
    with pytest.raises(ValueError, match="mask position 63: the pair has the tokens 0 to 62"):
        demo.pretraining_loss(ours, tokenizer, *demo.PRETRAINING, [63])


def test_fill_mask_flow(tokenizer):
    _, ours = twins("BertForMaskedLM", **SIZES)
    answers = minibert.pipeline("fill-mask", ours, tokenizer)(CASES["fill_mask"]["text"])
    inputs = ReferenceTokenizer(tokenizer.get_vocab())(CASES["fill_mask"]["text"], return_tensors="pt")
    at = inputs["input_ids"][0].tolist().index(103)
    reference = twins("BertForMaskedLM", **SIZES)[0]
    scores, ids = reference(**inputs).logits[0, at].softmax(-1).topk(5)
    exact = reference.double()(**inputs).logits[0, at].softmax(-1)[ids]
    assert [answer["token"] for answer in answers] == ids.tolist()
    assert_as_exact(torch.tensor([answer["score"] for answer in answers]), scores, exact)


# With the Hub's checkpoints: every printed figure, to its last digit


def printed(tensor: torch.Tensor, digits: int = 4) -> list:
    return [[round(x, digits) for x in row] if isinstance(row, list) else round(row, digits) for row in tensor.tolist()]


@pytest.mark.hub
def test_fill_mask_figures():
    case = CASES["fill_mask"]
    fill_mask = minibert.pipeline("fill-mask", case["model"])
    assert fill_mask.model.config.vocab_size == case["vocab_size"]
    assert {token: fill_mask.tokenizer.get_vocab()[token] for token in case["special_tokens"]} == case["special_tokens"]
    answers = fill_mask(case["text"])
    assert [[answer["token_str"], round(answer["score"], 4)] for answer in answers] == case["top5"]


@pytest.mark.hub
def test_next_sentence_figures():
    case = CASES["next_sentence"]
    model = minibert.BertForNextSentencePrediction.from_pretrained(case["model"])
    inputs = minibert.BertTokenizer.from_pretrained(case["model"])(case["text"], case["text_pair"], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == case["input_ids"]
    with torch.inference_mode():
        outs = [model(**inputs, labels=torch.LongTensor([label])) for label in (0, 1)]
    assert printed(outs[0].logits[0]) == case["logits"]
    assert f"{outs[0].loss.item():.4e}" == f"{case['loss_if_label_0']:.4e}"
    assert round(outs[1].loss.item(), 4) == case["loss_if_label_1"]


@pytest.mark.hub
def test_pretraining_figures():
    case = CASES["pretraining_masked_input"]
    model, report = minibert.BertForPreTraining.from_pretrained(case["model"], output_loading_info=True)
    assert not report["missing_keys"]
    inputs = notebook_inputs(minibert.BertTokenizer.from_pretrained(case["model"]))
    with torch.inference_mode():
        out = model(**inputs)
    corners = case["prediction_logits_corners"]
    rows = out.prediction_logits[0, corners["rows"]]
    assert printed(rows[:, :3]) == corners["first_three_columns"]
    assert printed(rows[:, -3:]) == corners["last_three_columns"]
    assert printed(out.seq_relationship_logits[0]) == case["seq_relationship_logits"]
    assert round(out.loss.item(), 4) == CASES["pretraining_loss"]["loss"]


@pytest.mark.hub
@pytest.mark.parametrize(("name", "head"), [("bert-base-cased", "MaskedLM"), ("bert-base-uncased", "PreTraining")])
def test_loading_says_nothing(name, head, caplog, recwarn):
    getattr(minibert, f"BertFor{head}").from_pretrained(name)
    assert not caplog.records
    assert not recwarn.list

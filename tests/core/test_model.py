"""The model as an object: ties, resizing, initialisation, compiling, exporting, its records."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from reference import HEADS, TINY, assert_as_exact, batch_for, masks, twins

import minibert
from minibert import BertConfig


@pytest.fixture(autouse=True)
def _forget_compiled_graphs():
    torch.compiler.reset()  # the limit on recompilations counts over all models of a process


MLM_HEADS = ["BertForPreTraining", "BertForMaskedLM"]


def assert_tied(model: torch.nn.Module) -> None:
    head = model.cls.predictions
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias


@pytest.mark.parametrize("head", MLM_HEADS)
def test_the_decoder_is_the_embedding_whatever_happens(head):
    model = getattr(minibert, head)(BertConfig(**TINY))
    assert_tied(model)
    assert_tied(model.to(torch.float64))
    assert_tied(model.half())
    assert_tied(copy.deepcopy(model))
    assert_tied(pickle.loads(pickle.dumps(model)))
    assert_tied(torch.nn.Sequential(model).float()[0])
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert_tied(model)
    assert_tied(copy.deepcopy(model).to("meta"))
    assert_tied(copy.deepcopy(model).to_empty(device="cpu"))
    model.resize_token_embeddings(50)
    assert_tied(model)


@pytest.mark.parametrize("size", [60, 101, 130])
@pytest.mark.parametrize("head", MLM_HEADS)
def test_resize_keeps_the_rows_and_the_bias(head, size):
    model = twins(head)[1]
    words, bias = model.get_input_embeddings().weight.clone(), model.cls.predictions.bias.clone()
    kept = min(size, 101)
    returned = model.resize_token_embeddings(size)
    assert returned is model.get_input_embeddings()
    assert model.config.vocab_size == model.bert.config.vocab_size == size
    assert model.get_output_embeddings().out_features == size
    assert torch.equal(returned.weight[:kept], words[:kept])
    assert torch.equal(model.cls.predictions.bias[:kept], bias[:kept])
    assert (model.cls.predictions.bias[kept:] == 0).all()
    assert size <= 101 or torch.allclose(returned.weight[kept:], words.mean(0), atol=1e-3)
    ids = torch.tensor([[1, 2, size - 1]])
    logits = model(ids, labels=ids)[1]
    assert logits.shape == (1, 3, size)
    with pytest.raises(ValueError, match="vocab_size=0"):
        model.resize_token_embeddings(0)


def test_initialisation():
    torch.manual_seed(0)
    model = minibert.BertForPreTraining(BertConfig.named("mini", vocab_size=2000))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        else:
            # A normal distribution cut at two standard deviations keeps 0.88 of its own
            assert parameter.abs().max() < 0.0401, name
            assert parameter.numel() < 5000 or parameter.std().item() == pytest.approx(0.0176, rel=0.03), name
    assert (model.get_input_embeddings().weight[0] == 0).all()  # padding


def test_num_parameters_counts_ties_once():
    model = minibert.BertForPreTraining(BertConfig())
    assert model.num_parameters() == 110_106_428  # what transformers counts for bert-base-uncased
    assert model.num_parameters(only_trainable=True) == 110_106_428


@pytest.mark.parametrize("head", HEADS)
def test_compiles_as_one_graph(head):
    model = twins(head)[1].double()  # so that no rounding hides a slip
    inputs = batch_for(head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for key, value in model(**inputs).items():
        torch.testing.assert_close(compiled(**inputs)[key], value)


@pytest.mark.slow
def test_compiles_with_inductor_for_any_length():
    _, model = twins("BertForMaskedLM")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 9, 23):
            inputs = batch_for("BertModel", tokens=tokens)
            mask = masks(4, tokens)["right"]
            expected = model(**inputs, attention_mask=mask).logits
            exact = copy.deepcopy(model).double()(**inputs, attention_mask=mask).logits
            assert_as_exact(compiled(**inputs, attention_mask=mask).logits, expected, exact)


def test_exports_with_dynamic_shapes():
    model = twins()[1].double()
    inputs = {**batch_for("BertModel"), "attention_mask": masks(4, 17)["right"]}
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=2, max=41)
    shapes = {name: {0: batch, 1: tokens} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    other = {**batch_for("BertModel", batch=3, tokens=30), "attention_mask": masks(3, 30)["holes"]}
    expected, actual = model(**other), program.module()(**other)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual.prediction_logits, expected.prediction_logits)


def test_a_record_is_a_mapping():
    _, model = twins()
    inputs = batch_for("BertForPreTraining")
    out = model(**inputs)
    assert list(out.keys()) == ["loss", "prediction_logits", "seq_relationship_logits"]
    assert out[0] is out.loss is out["loss"] is out.get("loss")
    assert out[1:] == (out.prediction_logits, out.seq_relationship_logits)
    assert dict(**out).keys() == dict(out).keys()
    assert "hidden_states" not in out
    assert "mlm_loss" not in out
    assert out.mlm_loss + out.nsp_loss == out.loss
    assert len(out) == len(out.to_tuple()) == 3
    with pytest.raises(KeyError, match="has loss, prediction_logits"):
        out["logits"]


def test_config_defaults_for_outputs():
    model = minibert.BertModel(BertConfig(**TINY, output_hidden_states=True, output_attentions=True, return_dict=False))
    out = model(torch.ones(1, 3, dtype=torch.long))
    assert isinstance(out, tuple)
    assert len(out) == 4
    assert len(model(torch.ones(1, 3, dtype=torch.long), output_attentions=False, return_dict=True)) == 3


def test_next_sentence_labels_have_names():
    assert minibert.NextSentence.IS_NEXT == 0
    assert minibert.NextSentence.NOT_NEXT == 1


def test_config_must_be_ours():
    with pytest.raises(TypeError, match="BertConfig, got dict"):
        minibert.BertModel({})

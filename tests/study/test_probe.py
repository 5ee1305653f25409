"""Lens, attribution, patches, exercises, names: questions to a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import minibert
from minibert import BertConfig, BertTokenizer, study
from minibert.model import attention_probabilities
from minibert.study.probe import METHODS
from minibert.study.steps import google_variable
from minibert.weights import hub

HEADS = [f"BertFor{task}" for task in ("PreTraining", "MaskedLM", "NextSentencePrediction", "SequenceClassification",
                                       "TokenClassification", "QuestionAnswering", "MultipleChoice")]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return minibert.BertForPreTraining.from_pretrained(hub.default_model())


@pytest.fixture(scope="module")
def inputs():
    return dict(BertTokenizer.from_pretrained(hub.default_model())("She opened the [MASK].", return_tensors="pt"))


def bits(model, inputs):
    with torch.no_grad():
        return model(**inputs).prediction_logits


def test_last_lens_is_the_answer_to_the_bit(model, inputs):
    trace = study.trace(model, inputs)
    layers = study.lens(model, trace, k=3)
    top = trace.output.prediction_logits.softmax(-1).topk(3)
    assert [layer.layer for layer in layers] == list(range(5))
    assert torch.equal(layers[-1].ids, top.indices)
    assert torch.equal(layers[-1].probabilities, top.values)
    assert torch.equal(layers[-1].next_sentence, trace.output.seq_relationship_logits.softmax(-1))
    assert torch.equal(study.lens(model, trace, at=[4])[2].ids, study.lens(model, trace)[2].ids[:, [4]])
    mlm = minibert.BertForMaskedLM.from_pretrained(hub.default_model())
    assert study.lens(mlm, study.trace(mlm, inputs))[-1].next_sentence is None


def test_lens_and_attribution_need_the_head(inputs):
    model = minibert.BertForTokenClassification(BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="BertForTokenClassification has no MLM head"):
        study.lens(model, study.trace(model, inputs))
    with pytest.raises(ValueError, match="no MLM head"):
        study.attribute(model, inputs, at=1)


@pytest.mark.parametrize("method", METHODS)
def test_attribution(model, inputs, method):
    scores = study.attribute(model, inputs, at=4, method=method)
    assert scores.shape == (7,)
    assert torch.isfinite(scores).all()
    assert scores.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    if method in ("attention", "rollout"):
        torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("method", ["attention", "rollout"])
def test_a_trace_that_is_there_need_not_be_taken_again(model, inputs, method, monkeypatch):
    again, seen = study.attribute(model, inputs, at=4, method=method), study.trace(model, inputs)
    monkeypatch.setattr(model, "forward", None)
    assert torch.equal(study.attribute(model, inputs, at=4, method=method, target=0, seen=seen), again)


def test_leave_one_out_is_a_mask(model, inputs):
    answer = bits(model, inputs)[0, 4].argmax().item()
    masked = {**inputs, "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}
    lost = [bits(model, x)[0, 4].log_softmax(-1)[answer] for x in (inputs, masked)]
    torch.testing.assert_close(study.attribute(model, inputs, at=4)[2], lost[0] - lost[1], atol=1e-4, rtol=0)


def test_gradient_x_input_is_a_derivative(model, inputs):
    at, scores = 4, study.attribute(model, inputs, at=4, method="gradient_x_input", target=100)
    embeds = model.bert.embeddings.word_embeddings(inputs["input_ids"]).detach()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    step = 1e-3
    ends = []
    for sign in (1, -1):
        moved = embeds.clone()
        moved[0, 2] *= 1 + sign * step
        ends.append(bits(model, {**rest, "inputs_embeds": moved})[0, at].log_softmax(-1)[100])
    assert abs((ends[0] - ends[1]) / (2 * step) - scores[2]) < 0.02


def test_attribution_refuses_by_name(model, inputs):
    for arguments in ({"at": 7}, {"at": -1}, {"at": 4, "method": "shapley"}):
        with pytest.raises(ValueError, match="leave_one_out, gradient_x_input"):
            study.attribute(model, inputs, **arguments)


def test_a_head_taken_out_is_its_columns_zeroed(model, inputs):
    layer = "bert.encoder.layer.1.attention"
    plain, dense = bits(model, inputs), model.get_submodule(f"{layer}.output.dense")
    kept = dense.weight.detach().clone()
    with study.patch(model, {f"{layer}.self": study.zero_head(model, 3)}):
        without = bits(model, inputs)
    with torch.no_grad():
        dense.weight[:, 3 * 64 :] = 0
    zeroed = bits(model, inputs)
    with torch.no_grad():
        dense.weight.copy_(kept)
    torch.testing.assert_close(without, zeroed, atol=1e-4, rtol=1e-4)
    assert not torch.equal(without, plain)
    assert torch.equal(bits(model, inputs), plain)


def test_patches_are_seen_by_a_trace_and_undone_after_errors(model, inputs):
    plain, name = bits(model, inputs), "bert.encoder.layer.0.intermediate.intermediate_act_fn"
    module = model.get_submodule(name)
    with study.patch(model, {name: nn.GELU()}):
        assert torch.equal(bits(model, inputs), plain)
    with study.patch(model, {name: lambda x: x * 0}):
        assert study.trace(model, inputs)[name].abs().sum() == 0
    with pytest.raises(ZeroDivisionError), study.patch(model, {name: nn.ReLU(), "bert.pooler": lambda x: 1 / 0}):
        bits(model, inputs)
    assert model.get_submodule(name) is module
    assert torch.equal(bits(model, inputs), plain)
    with pytest.raises(ValueError, match="no module 'bert.pool'"), study.patch(model, {"bert.pool": nn.ReLU()}):
        pass
    with pytest.raises(ValueError, match="heads 0 to 3"):
        study.zero_head(model, 4)
    at_pooler = {"bert.pooler.dense": study.zero_head(model, 0)}
    with pytest.raises(ValueError, match="'bert.pooler.dense' has no heads"), study.patch(model, at_pooler):
        pass
    assert torch.equal(bits(model, inputs), plain)


def eager(query, key, value, mask, dropout_p=0.0):
    return attention_probabilities(query, key, mask) @ value


def loss_of_all(logits, labels):
    kept = labels != -100
    return functional.cross_entropy(logits[kept], labels[kept]) if kept.any() else logits.sum() * 0


RIGHT = {
    "embeddings": lambda word, segment, position: word + segment + position,
    "attention": lambda q, k, v, mask, dropout_p=0.0: functional.scaled_dot_product_attention(q, k, v, mask, dropout_p),
    "mask": lambda mask, dtype: None if mask is None or mask.all() else mask[:, None, None, :].bool(),
    "layer_norm": lambda x, gamma, beta, eps: functional.layer_norm(x, gamma.shape, gamma, beta, eps),
    "gelu": functional.gelu,
    "mlm_loss": loss_of_all,
    "next_sentence": lambda states, pooler, head: head(torch.tanh(pooler(states[:, 0]))),
    "google_name": google_variable,
}
WRONG = {
    "embeddings": lambda word, segment, position: word + position,
    "attention": eager,
    "mask": lambda mask, dtype: None if mask is None else ~mask.bool()[:, None, None, :],
    "layer_norm": lambda x, gamma, beta, eps: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + eps) * gamma + beta,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "mlm_loss": lambda logits, labels: functional.cross_entropy(logits, labels),
    "next_sentence": lambda states, pooler, head: head(torch.tanh(pooler(states.mean(1)))),
    "google_name": lambda name: name.replace(".", "/"),
}


@pytest.mark.parametrize("name", study.EXERCISES)
def test_exercises_tell_right_from_wrong(name, model, inputs):
    padded = {key: functional.pad(value, (0, 2)) for key, value in inputs.items()}
    before = bits(model, padded)
    assert study.check(name, RIGHT[name], model, padded) is True
    assert study.check(name, WRONG[name], model, padded) is False
    assert torch.equal(bits(model, padded), before)


def test_unknown_exercise(model, inputs):
    with pytest.raises(ValueError, match="there are embeddings, attention"):
        study.check("softmax", torch.softmax, model, inputs)
    with pytest.raises(ValueError, match="inside a BertForPreTraining, got BertModel"):
        study.check("gelu", functional.gelu, model.bert, inputs)


@pytest.mark.parametrize("head", ["BertModel", *HEADS])
def test_names_cover_everything_once(head):
    model = getattr(minibert, head)(BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    found = study.names(model)
    parameters = [row.name for row in found if row.shape is not None]
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert [row.name for row in found if row.shape is None] == [name for name, _ in model.named_modules()]
    shapes = dict(model.named_parameters(remove_duplicate=False))
    assert all(row.shape == tuple(shapes[row.name].shape) for row in found if row.shape is not None)
    assert all(row.google for row in found if row.shape is not None)


def test_names_are_google_s_variables():
    layers = 2
    model = minibert.BertForPreTraining(BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=layers))
    dense = [f"attention/self/{part}" for part in ("query", "key", "value")]
    dense += ["attention/output/dense", "intermediate/dense", "output/dense"]
    norms = ["attention/output/LayerNorm", "output/LayerNorm"]
    tables = ("word_embeddings", "token_type_embeddings", "position_embeddings", "LayerNorm/gamma", "LayerNorm/beta")
    expected = {f"bert/embeddings/{name}" for name in tables}
    for i in range(layers):
        expected |= {f"bert/encoder/layer_{i}/{name}/{part}" for name in dense for part in ("kernel", "bias")}
        expected |= {f"bert/encoder/layer_{i}/{name}/{part}" for name in norms for part in ("gamma", "beta")}
    expected |= {f"bert/pooler/dense/{part}" for part in ("kernel", "bias")}
    transform = {"dense/kernel", "dense/bias", "LayerNorm/gamma", "LayerNorm/beta"}
    expected |= {"cls/predictions/output_bias", *(f"cls/predictions/transform/{part}" for part in transform)}
    expected |= {"cls/seq_relationship/output_weights", "cls/seq_relationship/output_bias"}
    own = {name for name, _ in model.named_parameters()}  # each tied one once
    found = [row.google for row in study.names(model) if row.name in own]
    assert sorted(found) == sorted(expected)
    turned = {row.google for row in study.names(model) if row.transposed}
    assert turned == {name for name in expected if name.endswith("/kernel")}

"""Equal to transformers to the last bit, at small and odd sizes: outputs, losses, states, maps."""

from __future__ import annotations

import pytest
import torch
import transformers
from reference import HEADS, TINY, assert_as_exact, assert_same, batch_for, masks, twins

from minibert.activations import ACTIVATIONS
from minibert.inputs import kernel_mask

# Multiple choice flattens its mask, so that one of 4 dimensions means nothing there
MASKED = [(head, mask) for head in HEADS for mask in masks(1, 2) if (head, mask) != ("BertForMultipleChoice", "4D")]


@pytest.mark.parametrize(("head", "mask"), MASKED)
def test_head_equals_reference(head, mask):
    reference, ours = twins(head)
    inputs = batch_for(head)
    rows, tokens = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    attention_mask = masks(rows, tokens)[mask]
    if head == "BertForMultipleChoice" and attention_mask is not None:
        attention_mask = attention_mask[:, None].repeat(1, 3, 1)
    expected = reference(**inputs, attention_mask=attention_mask, output_hidden_states=True)
    assert_same(expected, ours(**inputs, attention_mask=attention_mask, output_hidden_states=True))


VARIANTS = [
    {"type_vocab_size": 1},
    {"type_vocab_size": 3},
    {"layer_norm_eps": 1e-5},
    {"num_attention_heads": 1},
    {"num_attention_heads": 12},
    {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 1},
    {"num_hidden_layers": 1, "pad_token_id": None},
    {"vocab_size": 7, "pad_token_id": 6},
    *({"hidden_act": name} for name in ACTIVATIONS),
]


@pytest.mark.parametrize("sizes", VARIANTS, ids=str)
def test_variant_equals_reference(sizes):
    reference, ours = twins(**sizes)
    for tokens in (1, 2, 41):
        inputs = batch_for("BertForPreTraining", batch=3, tokens=tokens, **sizes)
        expected = reference(**inputs, output_hidden_states=True)
        assert_same(expected, ours(**inputs, output_hidden_states=True))


@pytest.mark.parametrize("batch", [1, 5])
def test_inputs_embeds_and_position_ids(batch):
    reference, ours = twins("BertModel")
    embeds = torch.randn(batch, 9, TINY["hidden_size"])
    positions = torch.randint(0, 41, (batch, 9))
    assert_same(
        reference(inputs_embeds=embeds, position_ids=positions), ours(inputs_embeds=embeds, position_ids=positions)
    )
    assert_same(reference(inputs_embeds=embeds), ours(inputs_embeds=embeds))


@pytest.mark.parametrize("kind", ["classes", "several", "one number", "two numbers"])
def test_problem_types(kind):
    num_labels = {"classes": 3, "several": 4, "one number": 1, "two numbers": 2}[kind]
    problem = "regression" if kind == "two numbers" else None
    reference, ours = twins("BertForSequenceClassification", num_labels=num_labels, problem_type=problem)
    inputs = {"input_ids": batch_for("BertModel")["input_ids"]}
    labels = {
        "classes": torch.tensor([0, 2, 1, 2]),
        "several": torch.randint(0, 2, (4, 4)).float(),
        "one number": torch.randn(4),
        "two numbers": torch.randn(4, 2),
    }[kind]
    assert_same(reference(**inputs, labels=labels), ours(**inputs, labels=labels))


def test_classifier_dropout_is_used():
    _, ours = twins("BertForTokenClassification", classifier_dropout=0.3)
    assert ours.dropout.p == 0.3


@pytest.mark.parametrize("mask", ["none", "right", "holes"])
def test_attention_maps_equal_eager(mask):
    """Eager's maps come from its own hidden states, which differ in the last bits after layer 0. So each layer of it
    is given our states: then every map is equal."""
    eager, ours = twins("BertModel", attention="eager")
    inputs = batch_for("BertModel")
    attention_mask = masks(4, 17)[mask]
    expected = eager(**inputs, attention_mask=attention_mask, output_attentions=True)
    actual = ours(**inputs, attention_mask=attention_mask, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == 3
    assert torch.equal(expected.attentions[0], actual.attentions[0])
    boolean = kernel_mask(attention_mask, torch.float32)
    added = None if boolean is None else torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
    for layer, state, attention_map in zip(eager.encoder.layer, actual.hidden_states, actual.attentions, strict=False):
        assert torch.equal(layer.attention.self(state, added)[1], attention_map)
    exact = eager.double()(**inputs, attention_mask=attention_mask, output_attentions=True).attentions
    for theirs, found, true in zip(expected.attentions, actual.attentions, exact, strict=True):
        assert_as_exact(found, theirs, true)


def test_asking_for_maps_does_not_change_the_rest():
    _, ours = twins("BertModel")
    inputs = batch_for("BertModel")
    plain, with_maps = ours(**inputs), ours(**inputs, output_attentions=True)
    assert torch.equal(plain.last_hidden_state, with_maps.last_hidden_state)


def test_tuples():
    reference, ours = twins()
    inputs = batch_for("BertForPreTraining")
    expected = reference(**inputs, return_dict=False, output_hidden_states=True)
    actual = ours(**inputs, return_dict=False, output_hidden_states=True)
    assert isinstance(actual, tuple)
    assert len(actual) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected[:3], actual[:3], strict=True))


def test_half_precision_error_is_no_larger_than_the_references():
    for dtype in (torch.bfloat16, torch.float16):
        reference, ours = twins("BertModel", hidden_size=64, num_attention_heads=4)
        inputs = batch_for("BertModel", tokens=33)
        mask = masks(4, 33)["right"]
        exact = reference.double()(**inputs, attention_mask=mask).last_hidden_state
        theirs = reference.to(dtype)(**inputs, attention_mask=mask).last_hidden_state
        mine = ours.to(dtype)(**inputs, attention_mask=mask).last_hidden_state
        assert torch.equal(theirs, mine)
        assert (mine.double() - exact).abs().max() < 0.1


def test_module_and_parameter_names():
    for head in HEADS:
        reference, ours = twins(head)
        assert [n for n, _ in reference.named_modules()] == [n for n, _ in ours.named_modules()]
        assert [n for n, _ in reference.named_parameters()] == [n for n, _ in ours.named_parameters()]
        assert list(reference.state_dict()) == list(ours.state_dict())


def test_either_side_loads_the_others_state_dict():
    reference, ours = twins()
    fresh = transformers.BertForPreTraining(reference.config).eval()
    fresh.load_state_dict(ours.state_dict())
    inputs = batch_for("BertForPreTraining")
    assert_same(fresh(**inputs), ours(**inputs))

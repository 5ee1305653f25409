"""Bad input is a ValueError that names the argument, before anything is computed; odd input gives finite numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference import HEADS, assert_as_exact, batch_for, masks, twins

import minibert
from minibert import inputs as inputs_module

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
SQUARE = torch.ones(3, 3, dtype=torch.long).tril().expand(2, 3, 3)  # each token sees those before it


@pytest.fixture(scope="module")
def model() -> minibert.BertForPreTraining:
    return twins()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 3, 36)}, "exactly one"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor, got list"),
        ({"input_ids": IDS[0]}, r"input_ids must have 2 dimensions.*\(3,\)"),
        ({"input_ids": IDS[:, :0]}, r"input_ids.*\(2, 0\)"),
        ({"input_ids": IDS[:0]}, r"input_ids.*\(0, 3\)"),
        ({"input_ids": IDS.float()}, "input_ids must be a tensor of whole numbers.*float32"),
        ({"input_ids": IDS.bool()}, r"input_ids.*torch\.bool"),
        ({"input_ids": IDS + 100}, "input_ids must be from 0 to 100; got 110"),
        ({"input_ids": IDS - 6}, "input_ids must be from 0 to 100; got -1"),
        ({"input_ids": torch.ones(1, 42, dtype=torch.long)}, "42 tokens: max_position_embeddings allows 41"),
        ({"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids must be from 0 to 1; got 10"),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :2]}, r"token_type_ids must have shape \(2, 3\)"),
        ({"input_ids": IDS, "position_ids": IDS + 40}, "position_ids must be from 0 to 40; got 50"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \(2, 3\).*\(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2)}, "attention_mask must have shape"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]] * 2}, "attention_mask must be a tensor"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 3), -1e4)}, "attention_mask must hold 1.*-10000"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 3), 0.5)}, "attention_mask must hold 1.*0.5"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 3), torch.nan)}, "attention_mask must hold 1.*nan"),
        ({"input_ids": IDS, "attention_mask": 2 * torch.ones(2, 3).int()}, "attention_mask must hold 1.*to 2"),
        ({"input_ids": IDS, "attention_mask": (1 - SQUARE) * -10000}, "whole numbers must hold 1.*-10000 to 0"),
        ({"input_ids": IDS, "attention_mask": (1 - SQUARE[:, None]) * -10000}, "4D.*must hold 1.*-10000 to 0"),
        ({"input_ids": IDS, "attention_mask": SQUARE.float()}, r"3D.*added to the scores.*mask\.bool\(\)"),
        ({"input_ids": IDS, "attention_mask": SQUARE[:, None].half()}, r"4D.*added to the scores.*mask\.bool\(\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 1, 3)}, "4D.*added to the scores"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 3, 3), torch.nan)}, "no NaN"),
        ({"input_ids": IDS, "attention_mask": torch.full((2, 3, 3), torch.inf)}, r"no NaN and no \+inf"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 2, 3, 3)}, "attention_mask must have shape"),
        ({"inputs_embeds": torch.zeros(2, 3, 35)}, r"inputs_embeds.*\(2, 3, 36\).*\(2, 3, 35\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 36, dtype=torch.long)}, "inputs_embeds must be floating point"),
        ({"input_ids": IDS, "labels": IDS + 100}, "labels must be from 0 to 100, or -100"),
        ({"input_ids": IDS, "labels": IDS[0]}, r"labels must have shape \(2, 3\)"),
        ({"input_ids": IDS, "labels": IDS.float()}, "labels must be a tensor of whole numbers"),
        ({"input_ids": IDS, "next_sentence_label": torch.tensor([0, 2])}, "next_sentence_label must be from 0 to 1"),
        ({"input_ids": IDS, "next_sentence_label": torch.tensor([0])}, "next_sentence_label must have shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        ("BertForSequenceClassification", {"labels": torch.tensor([0, 2])}, "labels must be from 0 to 1"),
        ("BertForSequenceClassification", {"labels": torch.zeros(2)}, "labels must be floating point of shape"),
        ("BertForTokenClassification", {"labels": IDS}, "labels must be from 0 to 1"),
        ("BertForQuestionAnswering", {"start_positions": torch.tensor([-1, 0])}, "start_positions must be from 0"),
        (
            "BertForQuestionAnswering",
            {"end_positions": torch.tensor([0.5, 0])},
            "end_positions must be a tensor of whole",
        ),
    ],
)
def test_labels_of_other_heads(head, arguments, message):
    with pytest.raises(ValueError, match=message):
        twins(head)[1](IDS, **arguments)


def test_multiple_choice_needs_three_dimensions():
    with pytest.raises(ValueError, match="input_ids must have 3 dimensions"):
        twins("BertForMultipleChoice")[1](IDS)


def test_unknown_argument_is_a_type_error_that_names_it(model):
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        model(IDS, attention_masks=torch.ones(2, 3))


def test_question_answering_has_two_labels():
    with pytest.raises(ValueError, match="num_labels=3"):
        minibert.BertForQuestionAnswering(minibert.BertConfig.named("tiny", num_labels=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_fully_masked_row_is_finite(dtype):
    model = twins("BertModel")[1].to(dtype)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    for attention_mask in (mask, mask[:, None, None].expand(2, 1, 3, 3).bool()):
        out = model(IDS, attention_mask=attention_mask, output_attentions=True)
        assert out.last_hidden_state.isfinite().all()
        assert all(attention_map.isfinite().all() for attention_map in out.attentions)


@pytest.mark.parametrize("training", [False, True])
def test_no_label_is_loss_zero_with_zero_gradients(training):
    model = twins()[1].train(training)
    out = model(IDS, labels=torch.full_like(IDS, -100), next_sentence_label=torch.tensor([0, 1]))
    assert out.mlm_loss.item() == 0
    assert torch.equal(out.loss, out.nsp_loss)
    out.mlm_loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_each_label_gives_its_part_of_the_loss(model):
    inputs = batch_for("BertForPreTraining")
    both = model(**inputs)
    words = model(**{name: value for name, value in inputs.items() if name != "next_sentence_label"})
    pairs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    assert torch.equal(words.loss, both.mlm_loss)
    assert torch.equal(pairs.loss, both.nsp_loss)
    assert torch.equal(both.loss, both.mlm_loss + both.nsp_loss)
    assert model(inputs["input_ids"]).loss is None


def test_a_three_dimensional_mask_equals_the_four_dimensional(model):
    square = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).expand(2, 3, 3)
    three = model(IDS, attention_mask=square).prediction_logits
    assert torch.equal(three, model(IDS, attention_mask=square[:, None].bool()).prediction_logits)
    added = torch.where(square.bool(), 0.0, -torch.inf)
    found, exact = model(IDS, attention_mask=added), copy.deepcopy(model).double()(IDS, attention_mask=square)
    assert_as_exact(found.prediction_logits, three, exact.prediction_logits)  # added: other products


def test_padding_without_a_mask_warns_once(model, monkeypatch):
    monkeypatch.setattr(inputs_module, "_warned", set())
    padded = torch.tensor([[5, 6, 0]])
    with pytest.warns(UserWarning, match="padding id 0 but no attention_mask"):
        model(padded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(padded)
        model(padded, attention_mask=torch.tensor([[1, 1, 0]]))


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_any_width(model, dtype):
    segments, positions = torch.tensor([[0, 1, 1]]), torch.tensor([[2, 1, 0]])
    expected = model(IDS, token_type_ids=segments, position_ids=positions).prediction_logits
    ids = {"token_type_ids": segments.to(dtype), "position_ids": positions.to(dtype)}
    assert torch.equal(model(IDS.to(dtype), **ids).prediction_logits, expected)
    with pytest.raises(ValueError, match="input_ids must be from 0 to 100; got 110"):
        model((IDS + 100).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_labels_of_any_width(head, dtype):
    model, inputs = twins(head)[1], batch_for(head)
    narrow = {name: value.to(dtype) for name, value in inputs.items()}
    assert torch.equal(model(**narrow).loss, model(**inputs).loss)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_numbers_as_labels_of_any_width(problem):
    model = twins("BertForSequenceClassification")[1]
    model.config.problem_type = problem
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    expected = model(IDS, labels=labels).loss
    for dtype in (torch.float64, torch.bfloat16):
        loss = model(IDS, labels=labels.to(dtype)).loss  # numpy's numbers are float64
        assert torch.equal(loss, expected)
        loss.backward()


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids", "attention_mask", "inputs_embeds"])
def test_lists_are_refused_by_name(model, name):
    inputs = {} if name in ("input_ids", "inputs_embeds") else {"input_ids": IDS}
    with pytest.raises(ValueError, match=f"{name} must be a tensor.*got list"):
        model(**inputs, **{name: [[1, 1, 1], [1, 1, 1]]})


@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_lists_of_labels_are_refused_by_name(head):
    inputs = batch_for(head)
    for name in set(inputs) - {"input_ids", "token_type_ids"}:
        with pytest.raises(ValueError, match=f"{name} must be a tensor.*got list"):
            twins(head)[1](**{**inputs, name: inputs[name].tolist()})
    if head == "BertForSequenceClassification":
        model = twins(head, num_labels=1)[1]
        with pytest.raises(ValueError, match="labels must be a tensor.*got list"):
            model(IDS, labels=[0.5, 0.5])


def test_a_mask_of_scores_may_hold_any_finite_number(model):
    scores = torch.tensor([[0.0, 1.0, 2.5], [0.5, 0.0, -3.0], [-torch.inf, -1e4, 0.0]]).expand(2, 3, 3)
    assert model(IDS, attention_mask=scores).prediction_logits.isfinite().all()
    assert torch.equal(model(IDS, attention_mask=torch.zeros(2, 1, 1, 3))[0], model(IDS)[0])


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, torch.uint64, torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_any_type(model, dtype):
    ids, mask = torch.randint(1, 101, (4, 17)), masks(4, 17)["holes"]
    expected = model(ids, mask).prediction_logits
    assert torch.equal(model(ids, mask.to(dtype)).prediction_logits, expected)
    if not dtype.is_floating_point:
        assert torch.equal(model(ids, mask.to(dtype)[:, None].expand(4, 17, 17)).prediction_logits, expected)
    if dtype not in (torch.bool, torch.float16):
        with pytest.raises(ValueError, match="attention_mask must hold 1"):
            model(ids, (mask + 1).to(dtype))


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
@pytest.mark.parametrize("kind", ["sparse", "jagged"])
def test_tensors_that_are_not_dense_are_refused_by_name(model, name, kind):
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    if name == "inputs_embeds":
        inputs = {name: torch.ones(2, 3, 36)}
    dense = inputs.get(name, torch.ones(2, 3, dtype=torch.long))
    inputs[name] = dense.to_sparse() if kind == "sparse" else torch.nested.nested_tensor([*dense], layout=torch.jagged)
    with pytest.raises(ValueError, match=rf"{name} must be a tensor.* a nested or sparse one \(torch"):
        model(**inputs)

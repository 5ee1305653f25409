"""Ready models that do more than their class: what hooks, adapters and subclasses compute is in the answers."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from pipeline_case import same, tiny
from reference import rounding
from torch import nn

import minibert
from minibert.heads import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification
from minibert.pipelines import pipeline

TEXTS = ["Sarah lives in London.", "It was an unbelievably fine day."]


@pytest.fixture(scope="module")
def classifier(minilm_dir):
    return tiny("BertForSequenceClassification", minilm_dir, 0, num_labels=3)[0]


class Doubled(nn.Module):
    """A layer in place of another, as adapters put it there."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class ShiftedClassifier(BertForSequenceClassification):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits + torch.tensor([5.0, 0.0, 0.0])
        return output


class MaskedByHand(BertForMaskedLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits.roll(1, -1)
        return output


def adapted(model):
    layer = model.bert.encoder.layer[0].attention.self
    layer.query = Doubled(layer.query)
    return model


def hooked(model):
    model.bert.encoder.layer[1].register_forward_hook(lambda module, inputs, output: output + 1.0)
    return model


def hooked_at_the_top(model):
    def shift(module, inputs, output):
        output.logits = output.logits + torch.tensor([0.0, 3.0, 0.0])
        return output

    model.register_forward_hook(shift)
    return model


def subclassed(model):
    model.__class__ = ShiftedClassifier
    return model


def trained_by_fused_kernels(model):  # as transformers' Trainer does by default
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    model.train()(torch.tensor([[1, 2, 3]]), labels=torch.tensor([0])).loss.backward()
    optimizer.step()
    return model.eval()


def expected(model, tokenizer, texts):
    with torch.inference_mode():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return [row.softmax(-1).max().item() for row in logits]


def as_good_as(model, scores) -> Any:
    """Four times what float32 costs the logits of the model, which a probability moves by half of at most."""
    return pytest.approx(scores, abs=4 * rounding(model), rel=0)


@pytest.mark.parametrize(
    ("change", "used_before"),
    [
        (adapted, True),
        (hooked, True),
        (hooked_at_the_top, False),
        (subclassed, False),
        (trained_by_fused_kernels, True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*plain model.*")
def test_what_a_model_does_beside_its_class_is_done(classifier, change, used_before):
    model, tokenizer = copy.deepcopy(classifier[0]), classifier[1]
    classify = pipeline("text-classification", model, tokenizer)
    if used_before:
        classify(TEXTS)
    change(model)
    scores = [answer["score"] for answer in classify(TEXTS)]
    assert scores == as_good_as(model, expected(model, tokenizer, TEXTS))
    assert scores != as_good_as(model, expected(*classifier, TEXTS))


def test_a_masked_word_model_of_ones_own(minilm_dir):
    (model, tokenizer), _ = tiny("BertForMaskedLM", minilm_dir, 0)
    text = "a [MASK] here"
    base = pipeline("fill-mask", model, tokenizer, fast=False)(text)[0]
    model.__class__ = MaskedByHand
    for fast in (None, False):
        with pytest.warns(UserWarning, match="plain model") if fast is None else contextlib.nullcontext():
            found = pipeline("fill-mask", model, tokenizer, fast=fast)(text)[0]
        assert found["token"] == (base["token"] + 1) % 30522


def test_the_plain_path_is_told_once_and_refused_if_the_fast_one_is_insisted_on(classifier):
    model, tokenizer = hooked(copy.deepcopy(classifier[0])), classifier[1]
    classify = pipeline("text-classification", model, tokenizer)
    with pytest.warns(UserWarning, match="text-classification computes on the plain model: ") as told:  # noqa: PT031
        for _ in range(2):
            classify(TEXTS)
    assert len(told) == 1
    with pytest.raises(TypeError):
        pipeline("text-classification", model, tokenizer, fast=True)(TEXTS)


def test_a_peft_model(classifier):
    peft = pytest.importorskip("peft")
    model, tokenizer = copy.deepcopy(classifier[0]), classifier[1]
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    wrapped = peft.get_peft_model(model, config).eval()
    with pytest.warns(UserWarning, match="plain model"):
        scores = [answer["score"] for answer in pipeline("text-classification", wrapped, tokenizer)(TEXTS)]
    assert scores == as_good_as(wrapped, expected(wrapped, tokenizer, TEXTS))
    with pytest.warns(UserWarning, match="plain model"):  # the model that was changed in place
        again = [answer["score"] for answer in pipeline("text-classification", model, tokenizer)(TEXTS)]
    assert again == scores


ADAPTERS = {
    "dora": lambda peft: peft.LoraConfig(target_modules=["query"], use_dora=True, init_lora_weights=False),
    "embeddings": lambda peft: peft.LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False),
    "ia3": lambda peft: peft.IA3Config(
        target_modules=["query", "value"], feedforward_modules=[], init_ia3_weights=False
    ),
    "oft": lambda peft: peft.OFTConfig(target_modules=["query"], oft_block_size=8, init_weights=False),
    "vera": lambda peft: peft.VeraConfig(target_modules=["query"], init_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:.*plain model.*")
def test_adapters_of_every_kind(classifier, kind, tmp_path):
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(classifier[0]), ADAPTERS[kind](peft)).eval()
    wanted, tokenizer = expected(wrapped, classifier[1], TEXTS), classifier[1]
    assert wanted != as_good_as(wrapped, expected(*classifier, TEXTS))
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(classifier[0]), tmp_path)
    for model in (wrapped, loaded, copy.deepcopy(wrapped).merge_and_unload()):
        scores = [answer["score"] for answer in pipeline("text-classification", model, tokenizer)(TEXTS)]
        assert scores == as_good_as(model, wanted)


def test_a_neighbouring_text_does_not_matter_to_a_model_of_ones_own(minilm_dir):
    class Tagger(BertForTokenClassification):
        def __init__(self, config):
            super().__init__(config)
            self.lstm = nn.LSTM(config.hidden_size, config.hidden_size // 2, bidirectional=True, batch_first=True)

        def forward(self, input_ids, attention_mask=None, token_type_ids=None, **options):
            states = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
            packed = nn.utils.rnn.pack_padded_sequence(
                states, attention_mask.sum(-1), batch_first=True, enforce_sorted=False
            )
            states = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
            return minibert.outputs.LogitsOutput(logits=self.classifier(states))

    (plain, tokenizer), _ = tiny("BertForTokenClassification", minilm_dir, 0)
    tag = pipeline("ner", Tagger(plain.config).eval(), tokenizer, ignore_labels=[])
    with pytest.warns(UserWarning, match="plain model"):
        together = tag(TEXTS)
    assert same(together, [tag(text) for text in TEXTS], 4 * rounding(tag.model))

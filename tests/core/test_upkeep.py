"""What training leans on and no output shows: the padding's row, layers computed again, a head on a bare encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minibert

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(("words", "pad"), [(30, 0), (12, 0), (30, 7)])
def test_resizing_keeps_the_paddings_row(words, pad):
    """It is never trained: without padding_idx its embedding would get a gradient."""
    model = minibert.BertForMaskedLM(minibert.BertConfig(**SIZES, pad_token_id=pad))
    assert model.get_input_embeddings().padding_idx == pad
    model.resize_token_embeddings(words)
    embeddings = model.get_input_embeddings()
    assert embeddings.padding_idx == pad
    assert model.config.vocab_size == words
    ids = torch.tensor([[2, 3, pad]])
    model.bert(ids, torch.tensor([[1, 1, 1]])).last_hidden_state.square().sum().backward()
    assert embeddings.weight.grad[pad].abs().max() == 0
    assert embeddings.weight.grad[2].abs().max() > 0


@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining", "BertForTokenClassification"])
def test_gradient_checkpointing_computes_each_layer_twice(kind):
    computed = []

    def layers_computed(model: torch.nn.Module) -> int:
        computed.clear()
        out = model(torch.tensor([[2, 3, 4]]))
        out[0].sum().backward()
        return len(computed)

    model = getattr(minibert, kind)(minibert.BertConfig(**SIZES)).train()
    for module in model.modules():
        if type(module).__name__ == "BertLayer":
            module.register_forward_pre_hook(lambda *_: computed.append(1))
    assert layers_computed(model) == 2
    model.gradient_checkpointing_enable()
    assert layers_computed(model) == 4
    assert layers_computed(model.eval()) == 2
    model.train().gradient_checkpointing_disable()
    assert layers_computed(model) == 2


def test_a_classifier_on_an_encoder_without_pooler(tmp_path: Path):
    encoder = minibert.BertModel(minibert.BertConfig(**SIZES), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    model = minibert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)
    assert model(torch.tensor([[2, 3]])).logits.isfinite().all()

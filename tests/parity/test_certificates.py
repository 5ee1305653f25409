"""Certificates of real checkpoints can be made again; what `compare` takes and refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import minibert
from minibert.cli import main


@pytest.mark.parametrize(
    ("fixture", "inside"),
    [
        (None, ""),
        *(
            pytest.param(fixture, inside, marks=pytest.mark.slow)
            for fixture, inside in (
                ("minilm_dir", ""),
                ("rxnfp_dir", "bert_pretrained"),
                ("rxnfp_dir", "bert_ft"),
                ("rxnfp_dir", "bert_ft_10k_25s"),
            )
        ),
    ],
)
def test_it_can_be_made_again(fixture, inside, request, tmp_path):
    model = [str(request.getfixturevalue(fixture) / inside)] if fixture else []
    assert main(["parity", *model, "--path", "plain", "--checks", "tokenizer", "-o", str(tmp_path), "--quiet"]) == 0
    [made] = json.loads((tmp_path / "certificate.json").read_text())["predicate"]["measurements"]["comparisons"]
    assert (made["level"], made["verdict"]) == ("bits", "same bits")


class Foreign(nn.Module):
    """Someone's own BERT: BERT's names of modules, a bare tensor as result, no config."""

    def __init__(self, model: minibert.BertModel):
        super().__init__()
        self.embeddings, self.encoder = model.embeddings, model.encoder

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        return self.encoder(self.embeddings(input_ids, token_type_ids), mask)


def test_a_bert_of_ones_own_is_certified_against_ours():
    torch.manual_seed(0)
    config = minibert.BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    ours = minibert.BertModel(config, add_pooling_layer=False).eval()
    own = Foreign(ours).eval()
    report = minibert.parity.compare(own, ours, require="bits")
    assert report, report
    assert report.rows
    own.encoder.layer[1].output.LayerNorm = nn.LayerNorm(24, eps=1e-5)
    report = minibert.parity.compare(own, minibert.BertModel(config, add_pooling_layer=False).eval())
    assert report.verdict == "bug"
    assert json.loads(report.to_json())["bug"]["step"] == "embeddings.word_embeddings"


class Wrapped(nn.Module):
    """A model that asks for float32, and cannot be trained."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        if self.model.dtype != torch.float32:
            raise TypeError("float32 alone")
        with torch.inference_mode():
            return self.model(**inputs)


def test_what_a_model_cannot_do_is_noted_and_the_rest_compared():
    torch.manual_seed(0)
    config = minibert.BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    ours = minibert.BertModel(config).eval()
    report = minibert.parity.compare(Wrapped(ours), ours, torch.randint(1, 50, (2, 9)))
    assert report, report
    assert any("does not compute in float64" in note for note in report.notes)
    assert any("gradients are not compared" in note for note in report.notes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", "text"), TypeError, "model must be a model, a callable or a mapping"),
        ((len, {}), TypeError, "reference must map names to tensors"),
        ((len, {"x": 1}), TypeError, "reference must map names to tensors"),
        ((len, len), ValueError, "inputs must be given"),
        ((len, len, []), ValueError, "inputs is empty"),
        ((len, len, [3]), TypeError, r"inputs\[0\] must be a mapping of tensors"),
    ],
)
def test_what_cannot_be_compared_is_told(arguments, error, message):
    with pytest.raises(error, match=message):
        minibert.parity.compare(*arguments)
    with pytest.raises(ValueError, match="require='same': must be one of bits, exact, answers"):
        minibert.parity.compare(len, len, require="same")
    with pytest.raises(ValueError, match="checks has 'forward': must be of gradients, train, invariance"):
        minibert.parity.compare(len, len, checks=["forward"])


def test_sides_without_a_common_output_are_told():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="no output in common: a and b"):
        minibert.parity.compare(lambda input_ids: {"a": torch.ones(1)}, {"b": torch.ones(1)}, ids)

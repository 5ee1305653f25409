"""BertConfig: what it refuses, what it passes over, and the round trip with transformers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from minibert import BertConfig, BertForMaskedLM, BertModel


def test_defaults_are_those_of_transformers():
    reference, ours = transformers.BertConfig(), BertConfig()
    for name in ours.to_dict():
        if name not in ("model_type", "id2label", "label2id"):
            assert getattr(ours, name) == getattr(reference, name), name
    assert ours.id2label == reference.id2label
    assert ours.num_labels == reference.num_labels


def test_round_trip_and_transformers_reads_it(tmp_path):
    config = BertConfig(
        hidden_size=48, num_attention_heads=4, id2label={0: "no", 1: "yes", 2: "maybe"}, pad_token_id=None
    )
    assert BertConfig.from_dict(config.to_dict()) == config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    reference = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(reference) is transformers.BertConfig
    assert reference.id2label == config.id2label
    assert reference.pad_token_id is None
    assert BertConfig.from_pretrained(tmp_path) == config


def test_reads_what_transformers_writes(tmp_path):
    transformers.BertConfig(num_labels=3, layer_norm_eps=1e-5).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    assert config.num_labels == 3
    assert config.layer_norm_eps == 1e-5


def test_real_configs(minilm_dir, rxnfp_dir):
    assert BertConfig.from_pretrained(minilm_dir).hidden_size == 384
    assert BertConfig.from_pretrained(rxnfp_dir / "bert_pretrained").vocab_size == 591
    # It says num_labels 50 and names two by default names: the number counts, as in transformers
    assert BertConfig.from_pretrained(rxnfp_dir / "bert_ft_10k_25s").num_labels == 50


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 10**9),
        ("hidden_size", 0),
        ("hidden_size", 12.5),
        ("hidden_size", 770),  # not a multiple of 12 heads
        ("num_hidden_layers", -1),
        ("num_hidden_layers", True),
        ("num_attention_heads", "12"),
        ("type_vocab_size", 0),
        ("hidden_act", "gelux"),
        ("hidden_act", None),
        ("hidden_dropout_prob", 1.5),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", "1e-12"),
        ("pad_token_id", 30522),
        ("problem_type", "guess"),
        ("num_labels", 0),
        ("id2label", {0: "a", 2: "b"}),
        ("return_dict", 1),
    ],
)
def test_refused_values_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        BertConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("is_encoder_decoder", True),
        ("tie_word_embeddings", False),
        ("pruned_heads", {"0": [1]}),
        ("embedding_size", 128),
        ("auto_map", {"AutoModel": "modeling.Model"}),
    ],
)
def test_fields_that_would_change_the_model_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        BertConfig.from_dict({field: value})


def test_a_field_that_nobody_knows_is_kept_and_named(caplog):
    config = BertConfig(hiden_size=3)
    assert "hiden_size=3" in caplog.text
    assert config.hiden_size == 3
    assert config.to_dict()["hiden_size"] == 3


def test_assignments_are_checked_one_by_one_and_together_by_the_model():
    config = BertConfig()
    with pytest.raises(ValueError, match="hidden_size"):
        config.hidden_size = 0
    with pytest.raises(ValueError, match="is_decoder"):
        config.is_decoder = True
    config.hidden_size, config.num_attention_heads, config.is_decoder = 30, 3, False
    config.check()
    config.num_attention_heads = 4
    with pytest.raises(ValueError, match="multiple of num_attention_heads=4"):
        BertModel(config)


def test_labels_agree_after_each_assignment():
    config = BertConfig()
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.id2label = {"0": "no", "1": "yes"}
    assert (config.num_labels, config.label2id) == (2, {"no": 0, "yes": 1})
    config.label2id = {"a": 0}
    assert (config.num_labels, config.id2label) == (1, {0: "a"})


def test_a_head_and_its_encoder_share_one_config():
    model = BertForMaskedLM(BertConfig.named("tiny", vocab_size=30))
    assert model.config is model.bert.config
    model.config.output_hidden_states = True
    assert len(model(torch.tensor([[1, 2]])).hidden_states) == 3


def test_every_field_transformers_writes_is_known():
    for config in (transformers.BertConfig(), transformers.BertConfig(num_labels=7)):
        BertConfig.from_dict(config.to_dict())


def test_labels_agree():
    config = BertConfig(id2label={"0": "no", "1": "yes"})
    assert config.label2id == {"no": 0, "yes": 1}
    assert BertConfig(label2id={"a": 0, "b": 1, "c": 2}).id2label == {0: "a", 1: "b", 2: "c"}
    assert BertConfig.from_dict(config.to_dict(), num_labels=4).id2label[3] == "LABEL_3"
    with pytest.raises(ValueError, match="num_labels=3 but id2label names 2"):
        BertConfig(num_labels=3, id2label={0: "no", 1: "yes"})
    with pytest.raises(ValueError, match="label2id"):
        BertConfig(id2label={0: "no", 1: "yes"}, label2id={"yes": 0, "no": 1})


def test_named_sizes():
    assert BertConfig.named("base") == BertConfig()
    large = BertConfig.named("large", vocab_size=28996)
    assert (large.num_hidden_layers, large.hidden_size, large.intermediate_size) == (24, 1024, 4096)
    with pytest.raises(ValueError, match="tiny, mini"):
        BertConfig.named("huge")


@pytest.mark.parametrize("text", ["{", "[]", "\xff", '"bert"'])
def test_broken_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        BertConfig.from_pretrained(tmp_path)

"""What transformers' scripts do with a config, and the Auto classes."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
import transformers
from reference import HEADS, TINY, twins

import minibert
from minibert import BertConfig

AUTO = {f"Auto{head.replace('Bert', 'Model')}": head for head in HEADS if head != "BertModel"} | {
    "AutoModel": "BertModel"
}


def test_every_field_of_the_reference_is_taken_and_its_dictionary_too():
    reference = transformers.BertConfig(**TINY, num_labels=3)
    for values in (reference.to_dict(), reference.to_diff_dict(), BertConfig(**TINY).to_dict()):
        config = BertConfig(**values)
        assert config.hidden_size == 36
        assert transformers.BertConfig(**config.to_dict()).num_labels == config.num_labels
    ours = BertConfig(**TINY, num_labels=3)
    assert ours.id2label == reference.id2label
    plain = "use_cache is_decoder is_encoder_decoder chunk_size_feed_forward model_type bos_token_id eos_token_id"
    for name in [*plain.split(), "use_return_dict", "add_cross_attention", "tie_word_embeddings"]:
        assert getattr(ours, name) == getattr(reference, name), name
    for name in ("quantization_config", "auto_map"):
        assert hasattr(ours, name) == hasattr(reference, name), name
    assert BertConfig.model_type == "bert"


def test_scripts_arguments():
    config = BertConfig(is_decoder=False, use_cache=True, position_embedding_type="absolute", tie_word_embeddings=True)
    assert config.use_cache is True
    assert config.position_embedding_type == "absolute"
    config.use_cache = False
    assert config.to_dict()["use_cache"] is False
    for name, value in {
        "is_decoder": True,
        "add_cross_attention": True,
        "position_embedding_type": "relative_key",
    }.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} is not supported"):
            setattr(config, name, value)
        with pytest.raises(ValueError, match=f"{name}={value!r} is not supported"):
            BertConfig(**{name: value})


def test_update_is_all_or_nothing(caplog):
    config = BertConfig(**TINY)
    config.update({"hidden_dropout_prob": 0.3, "num_labels": 4})
    assert (config.hidden_dropout_prob, config.num_labels, config.label2id["LABEL_3"]) == (0.3, 4, 3)
    with pytest.raises(ValueError, match="is_decoder=True"):
        config.update({"hidden_dropout_prob": 0.4, "is_decoder": True})
    assert config.hidden_dropout_prob == 0.3
    with caplog.at_level(logging.WARNING, "minibert"):
        config.update({"nobodys": 1})
    assert config.nobodys == 1
    assert "nobodys=1" in caplog.text


def test_files(tmp_path, caplog):
    config = BertConfig(**TINY, id2label={0: "no", 1: "yes"}, hidden_dropout_prob=0.2)
    config.save_pretrained(tmp_path / "new" / "place")
    config.to_json_file(tmp_path / "any.json")
    assert json.loads(config.to_json_string())["id2label"] == {"0": "no", "1": "yes"}
    assert "layer_norm_eps" not in json.loads(config.to_json_string())
    assert "layer_norm_eps" in json.loads(config.to_json_string(use_diff=False))
    for again in (
        BertConfig.from_pretrained(tmp_path / "new", subfolder="place"),
        BertConfig.from_json_file(tmp_path / "any.json"),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert again == config
    assert transformers.BertConfig.from_pretrained(tmp_path / "new" / "place").id2label == config.id2label
    place = tmp_path / "new" / "place"
    changed, unused = BertConfig.from_pretrained(place, num_labels=5, foo=1, return_unused_kwargs=True)
    assert (changed.num_labels, unused) == (5, {"foo": 1})
    BertConfig.from_pretrained(pretrained_model_name_or_path=place, trust_remote_code=True, force_download=False)
    assert not caplog.text
    with pytest.raises(ValueError, match="push_to_hub"):
        config.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("name", sorted(AUTO))
def test_auto_classes_make_the_models(tmp_path, name):
    auto, head = getattr(minibert, name), AUTO[name]
    assert hasattr(transformers, name)
    _, model = twins(head)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path, torch_dtype=torch.float32, trust_remote_code=True)
    assert type(again) is getattr(minibert, head)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    config = minibert.AutoConfig.from_pretrained(tmp_path)
    assert config == again.config
    new = auto.from_config(config, dtype="bfloat16", attn_implementation="sdpa")
    assert type(new) is type(again)
    assert new.dtype == torch.bfloat16
    assert new.config == config
    with pytest.raises(TypeError, match=f"{name}.from_pretrained"):
        auto(config)


def test_auto_config_and_tokenizer(tmp_path, minilm_dir):
    assert type(minibert.AutoTokenizer.from_pretrained(minilm_dir)) is minibert.BertTokenizer
    assert minibert.AutoConfig.from_pretrained(minilm_dir).hidden_size == 384
    assert minibert.AutoConfig.for_model("bert", hidden_size=48).hidden_size == 48
    with pytest.raises(ValueError, match="model_type='gpt2' is not supported"):
        minibert.AutoConfig.for_model("gpt2")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(ValueError, match="model_type='roberta' is not supported"):
        minibert.AutoModel.from_pretrained(tmp_path)


def test_fields_from_a_string(tmp_path):
    ours, theirs = BertConfig(), transformers.BertConfig()
    text = "num_hidden_layers=4,hidden_act=relu,use_cache=false, hidden_dropout_prob = 0.25,layer_norm_eps=1e-7"
    for config in (ours, theirs):
        config.update_from_string(text.replace(" ", ""))
    fields = ["num_hidden_layers", "hidden_act", "use_cache", "hidden_dropout_prob", "layer_norm_eps"]
    assert [getattr(ours, name) for name in fields] == [getattr(theirs, name) for name in fields]
    ours.update_from_string(text)
    ours.update_from_string("hidden_dropout_prob=0")
    assert type(ours.hidden_dropout_prob) is float
    before = dict(ours.__dict__)
    for wrong in ("num_hidden_layers=4,nonsense=3", "num_hidden_layers", "num_hidden_layers=4.5", "use_cache=perhaps",
                  "num_hidden_layers=4,hidden_act=unheard_of", "vocab_size=-1"):  # fmt: skip
        with pytest.raises(ValueError, match=wrong.split(",")[-1].partition("=")[0]):
            ours.update_from_string(wrong)
    assert ours.__dict__ == before
    ours.save_pretrained(tmp_path)
    fields, unused = BertConfig.get_config_dict(tmp_path, num_hidden_layers=3, other=1)
    assert fields == {**ours.to_dict(), "num_hidden_layers": 3}
    assert unused == {"other": 1}

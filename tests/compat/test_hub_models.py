"""What transformers' scripts do with a model: names, switches, counts, another vocabulary, another loading call."""

from __future__ import annotations

import copy
import logging
import os

import pytest
import torch
import transformers
from reference import HEADS, TINY, assert_as_exact, batch_for, twins
from torch import nn

import minibert
from minibert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, BertPreTrainedModel

IDS = batch_for("BertModel")["input_ids"]
MLM_HEADS = ["BertForPreTraining", "BertForMaskedLM"]


@pytest.mark.parametrize("head", HEADS)
def test_counts_and_names_are_the_references(head):
    reference, ours = twins(head)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == reference.num_parameters(**options)
    assert ours.num_labels == ours.config.num_labels == 2
    assert ours.get_memory_footprint() == sum(p.nbytes for p in ours.parameters())
    assert (ours.get_output_embeddings() is None) == (reference.get_output_embeddings() is None)
    assert ours.base_model is getattr(ours, "bert", ours)
    assert ours.config_class is BertConfig
    assert ours.main_input_name == reference.main_input_name
    assert not ours.can_generate()


def test_embeddings_can_be_replaced():
    model = BertForMaskedLM(BertConfig(**TINY)).eval()
    words = nn.Embedding(101, 36)
    model.set_input_embeddings(words)
    assert model.get_input_embeddings() is words
    assert model.get_output_embeddings().weight is not words.weight
    model.tie_weights()
    assert model.get_output_embeddings().weight is words.weight
    decoder = nn.Linear(36, 99)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    with pytest.raises(ValueError, match=r"decoder.weight \(99, 36\) cannot be a parameter \(101, 36\)"):
        model.tie_weights()
    with pytest.raises(TypeError, match="BertModel has no projection"):
        BertModel(BertConfig(**TINY)).set_output_embeddings(decoder)


@pytest.mark.parametrize("change", ["to", "double", "load_state_dict", "deepcopy"])
def test_only_what_was_one_parameter_is_made_one(change):
    model = BertForMaskedLM(BertConfig(**TINY)).eval()
    model.cls.predictions.decoder = nn.Linear(36, 99)
    if change == "load_state_dict":
        model.load_state_dict(model.state_dict(), assign=True)
    else:
        model = {"to": lambda: model.to("cpu"), "double": model.double, "deepcopy": lambda: copy.deepcopy(model)}[
            change
        ]()
    assert model(IDS).logits.shape == (4, 17, 99)


def test_a_head_and_its_encoder_see_one_config():
    model = BertForMaskedLM(BertConfig(**TINY)).eval()
    model.config.output_hidden_states = model.config.output_attentions = True
    assert len(model(IDS).hidden_states) == 4
    assert len(model(IDS).attentions) == 3
    assert copy.deepcopy(model).config is not model.config


def test_another_config_is_seen_by_all_who_shared_the_old_one():
    model = minibert.BertForSequenceClassification(minibert.BertConfig(**TINY)).eval()
    model.second = minibert.BertModel(minibert.BertConfig(**TINY)).eval()  # with a config of its own
    kept = model.second.config
    model.config = minibert.BertConfig(**TINY, output_hidden_states=True)
    assert model.bert.config is model.config
    assert model.second.config is kept
    ids = torch.tensor([[1, 2, 3]])
    assert len(model(ids).hidden_states) == 4
    assert model.second(ids).hidden_states is None
    copied = copy.deepcopy(model)
    assert copied.bert.config is copied.config is not model.config
    with pytest.raises(TypeError, match="config must be a minibert.BertConfig, got dict"):
        model.config = {}
    with pytest.raises(ValueError, match="hidden_size=36 must be a multiple"):
        broken = copy.copy(model.config)
        broken.num_attention_heads = 5
        model.config = broken
    assert model.bert.config is model.config
    assert model.config.num_attention_heads == 3


def test_attention_maps_have_gradients():
    reference, ours = twins("BertForSequenceClassification", attention="eager")
    gradients = []
    for model in (reference, ours, copy.deepcopy(ours).double()):
        out = model(IDS, output_attentions=True, labels=torch.tensor([0, 1, 0, 1]))
        for attention_map in out.attentions:
            attention_map.retain_grad()
        out.loss.backward()
        gradients.append([attention_map.grad for attention_map in out.attentions])
    for expected, actual, exact in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_as_exact(actual, expected, exact)


def test_gradient_checkpointing_and_inputs_that_require_gradients():
    model = BertForSequenceClassification(BertConfig(**TINY))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="debug: only use_reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"debug": True})
    assert BertForSequenceClassification(BertConfig(**TINY, gradient_checkpointing=True)).is_gradient_checkpointing
    model.requires_grad_(False)
    assert not model(IDS).logits.requires_grad
    model.enable_input_require_grads()
    model.enable_input_require_grads()  # twice is once
    assert model(IDS).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(IDS).logits.requires_grad


def test_attention_implementations_by_name():
    model = BertModel(BertConfig(**TINY))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == model.config.attn_implementation == "eager"
    assert BertModel(BertConfig(**TINY, attn_implementation="eager")).config._attn_implementation == "eager"
    assert "_attn_implementation" not in model.config.to_dict()
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': must be None or one of sdpa, eager"):
        model.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("head", ["BertModel", *MLM_HEADS])
def test_new_rows_are_drawn_as_the_reference_draws_them(head, mean_resizing):
    reference, ours = twins(head)
    with torch.no_grad():
        for model in (reference, ours):
            model.get_input_embeddings().weight += 0.3
    for model in (reference, ours):
        torch.manual_seed(1)
        model.resize_token_embeddings(120, mean_resizing=mean_resizing)
    expected, actual = reference.get_input_embeddings().weight, ours.get_input_embeddings().weight
    assert torch.equal(actual[:101], expected[:101])
    if mean_resizing:
        assert torch.equal(actual[101:], expected[101:])
    else:  # the same rule, other draws: a normal distribution around 0
        assert actual[101:].mean().abs() < 0.01
        assert 0.01 < actual[101:].std() < 0.03
    if head != "BertModel":
        assert torch.equal(ours.cls.predictions.bias, reference.cls.predictions.bias)
        assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight


def test_sizes_of_a_vocabulary():
    model = BertForMaskedLM(BertConfig(**TINY))
    embeddings = model.get_input_embeddings()
    assert model.resize_token_embeddings() is embeddings
    assert model.resize_token_embeddings(pad_to_multiple_of=64).num_embeddings == 128
    assert model.resize_token_embeddings(60, pad_to_multiple_of=8).num_embeddings == model.config.vocab_size == 64
    assert model.get_input_embeddings() is embeddings  # hooks on it stay
    assert model(IDS % 64).logits.shape[-1] == 64
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        model.resize_token_embeddings(60, pad_to_multiple_of=0)
    model.set_output_embeddings(nn.Linear(36, 64))
    model.resize_token_embeddings(70)  # an untied decoder too
    assert model(IDS % 64).logits.shape[-1] == 70


class Own(BertPreTrainedModel):
    """A head as users write them: parameters and buffers that no other class has."""

    def __init__(self, config, scale=2.0):
        super().__init__(config)
        self.bert = BertModel(config)
        self.gate = nn.Parameter(torch.ones(4))
        self.conv = nn.Conv1d(4, 4, 3)
        self.lstm = nn.LSTM(8, 8)
        self.out = nn.Linear(36, 2)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("passing", torch.full((3,), 7.0), persistent=False)
        self.plain = torch.full((2,), scale)
        self.frozen = nn.Parameter(torch.linspace(0, 1, 3), requires_grad=False)
        self.limit = torch.ones(3).sum().item()  # a constructor may look at values
        self.init_weights()

    def forward(self, input_ids, **others):
        return self.bert(input_ids, **others)


@pytest.mark.parametrize("head", ["BertModel", "BertForPreTraining", "BertForMaskedLM"])
def test_what_a_users_constructor_makes_stays(tmp_path, head):
    _, encoder = twins(head)
    encoder.save_pretrained(tmp_path)
    torch.manual_seed(3)
    expected = Own(encoder.config)
    torch.manual_seed(3)
    own, report = Own.from_pretrained(tmp_path, scale=5.0, output_loading_info=True)
    assert torch.equal(own(IDS)[0], encoder(IDS, output_hidden_states=True).hidden_states[-1])
    for name, tensor in own.state_dict().items():
        if not name.startswith("bert."):
            assert torch.equal(tensor, expected.state_dict()[name]), name
            assert name in report["missing_keys"]
    assert torch.equal(own.passing, torch.full((3,), 7.0))
    assert torch.equal(own.plain, torch.full((2,), 5.0))
    assert own.limit == 3
    assert not own.frozen.requires_grad


def test_what_a_users_model_saved_comes_back(tmp_path):
    own = Own(BertConfig(**TINY))
    with torch.no_grad():
        own.gate.mul_(3)
        own.steps += 2
    own.save_pretrained(tmp_path)
    again, report = Own.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert report["missing_keys"] == set()
    assert torch.equal(again.gate, torch.full((4,), 3.0, dtype=torch.bfloat16))
    assert torch.equal(again.steps, torch.arange(5) + 2)  # whole numbers stay whole
    assert again.passing.dtype == again.dtype == torch.bfloat16
    before = again.out.weight.clone()
    again.init_weights()
    assert torch.equal(again.out.weight, before)  # what is loaded is never initialised again


class Lazy(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.head = nn.LazyLinear(3)
        self.post_init()

    def forward(self, input_ids):
        return self.head(self.bert(input_ids).pooler_output)


def test_a_layer_whose_size_is_not_known_yet(tmp_path):
    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path / "encoder")
    model, ids = Lazy.from_pretrained(tmp_path / "encoder"), torch.tensor([[1, 2, 3]])
    answer = model(ids)
    assert answer.isfinite().all()
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(Lazy.from_pretrained(tmp_path / "whole")(ids), answer)


def test_a_users_model_needs_the_encoders_weights(tmp_path):
    class Renamed(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.backbone = BertModel(config)
            self.post_init()

    BertModel(BertConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of Renamed: backbone\.embeddings\.word_embeddings\.weight"):
        Renamed.from_pretrained(tmp_path)


@pytest.fixture
def classifier(tmp_path):
    _, model = twins("BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    return model


def test_another_number_of_labels(tmp_path, classifier, caplog):
    with pytest.raises(ValueError, match="classifier.weight is .2, 36.*ignore_mismatched_sizes=True"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with caplog.at_level(logging.WARNING, "minibert"):
        model, report = BertForSequenceClassification.from_pretrained(tmp_path, **options)
    _, theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path, **options)
    assert report["mismatched_keys"] == report.mismatched_keys
    assert report.mismatched_keys == {(key, tuple(a), tuple(b)) for key, a, b in theirs["mismatched_keys"]}
    assert report["missing_keys"] == report["unexpected_keys"] == set()
    assert "classifier.weight ((2, 36) in the file, (5, 36) here)" in caplog.text
    assert (model.classifier.bias == 0).all()
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert torch.equal(model.bert(IDS).pooler_output, classifier.bert(IDS).pooler_output)


def test_transformers_arguments_are_taken(tmp_path, classifier):
    model = BertForSequenceClassification.from_pretrained(
        pretrained_model_name_or_path=tmp_path,
        torch_dtype="float16",
        device_map="auto",
        attn_implementation="eager",
        low_cpu_mem_usage=True,
        trust_remote_code=True,
        use_safetensors=True,
        force_download=False,
        quantization_config=None,
    )
    assert model.dtype == torch.float16
    assert model.name_or_path == str(tmp_path)
    assert model.config._attn_implementation == "eager"
    given = BertConfig(**TINY)
    model = BertForSequenceClassification.from_pretrained(tmp_path, config=given, attn_implementation="eager")
    assert (given._attn_implementation, model.config._attn_implementation) == ("sdpa", "eager")
    for device_map in ("cpu", {"": "cpu"}, {"bert": "cpu", "classifier": "cpu"}, torch.device("cpu")):
        assert BertForSequenceClassification.from_pretrained(tmp_path, device_map=device_map).device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"load_in_8bit": True}, ValueError, "load_in_8bit=True"),
        ({"quantization_config": {"bits": 4}}, ValueError, "quantization_config="),
        ({"from_tf": True}, ValueError, "from_tf=True"),
        ({"force_download": True}, ValueError, "force_download=True"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "must be None or one of sdpa, eager"),
        ({"device_map": {"bert": 0, "classifier": "cpu"}}, ValueError, "one device for the whole model"),
        ({"device_map": "disk"}, ValueError, "disk"),
        ({"device": "cpu", "device_map": "cuda"}, ValueError, "give one of them"),
        ({"dtype": "float32", "torch_dtype": "float16"}, ValueError, "give one of them"),
        ({"use_safetensors": False}, FileNotFoundError, "looked for pytorch_model.bin"),
        ({"subfolder": "../x"}, ValueError, "must be a file inside"),
        ({"atention": 1}, TypeError, "no argument atention"),
        ({"is_decoder": True}, ValueError, "is_decoder=True is not supported"),
    ],
)
def test_arguments_that_are_refused(tmp_path, classifier, arguments, error, message):
    with pytest.raises(error, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path, **arguments)


def test_not_under_the_meta_device(tmp_path, classifier):
    with torch.device("meta"), pytest.raises(RuntimeError, match="would lose what it reads"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_state_dict_instead_of_files(tmp_path, classifier):
    state = classifier.state_dict()
    for name in (None, tmp_path):
        config = None if name else classifier.config
        model = BertForSequenceClassification.from_pretrained(name, config=config, state_dict=state)
        assert torch.equal(model(IDS).logits, classifier(IDS).logits)
        assert model.classifier.weight.data_ptr() != classifier.classifier.weight.data_ptr()
    with pytest.raises(ValueError, match="both config and state_dict"):
        BertForSequenceClassification.from_pretrained(config=classifier.config)


@pytest.mark.parametrize("size", ["5GB", 30_000])
def test_variants_and_subfolders(tmp_path, classifier, size):
    folder = tmp_path / "inside"
    classifier.save_pretrained(folder, variant="fp16", max_shard_size=size)
    model = BertForSequenceClassification.from_pretrained(tmp_path, subfolder="inside", variant="fp16")
    assert torch.equal(model(IDS).logits, classifier(IDS).logits)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder, variant="fp16")
    assert theirs.load_state_dict(classifier.state_dict())
    with pytest.raises(FileNotFoundError, match=r"looked for model\.safetensors"):
        BertForSequenceClassification.from_pretrained(folder)
    theirs.save_pretrained(folder, variant="theirs", max_shard_size=size)
    model = BertForSequenceClassification.from_pretrained(folder, variant="theirs")
    assert torch.equal(model(IDS).logits, classifier(IDS).logits)
    names = sorted(os.listdir(folder))
    classifier.save_pretrained(folder, variant="fp16", max_shard_size=size)  # its own files are replaced, no others
    assert sorted(os.listdir(folder)) == names


def test_saving_as_transformers_scripts_do(tmp_path, caplog):
    model = BertForMaskedLM(BertConfig(**TINY))
    model.save_pretrained(save_directory=tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, safe_serialization=True, state_dict=state)
    saved = minibert.BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(saved.get_input_embeddings().weight, model.get_input_embeddings().weight + 1)
    assert not caplog.text
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "writes safetensors all the same" in caplog.text
    with pytest.raises(ValueError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(TypeError, match="no argument shard_size"):
        model.save_pretrained(tmp_path, shard_size=3)

"""pretrained.py: what loads, what is said about it, what is refused; saving; weights that stay tied."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from reference import HEADS
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import minibert
from minibert.weights.ties import aliases

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
CONFIG = minibert.BertConfig(**SIZES)
IDS = torch.tensor([[2, 5, 7, 3], [2, 9, 3, 4]])


def new(head: str = "BertForPreTraining", **options: Any) -> Any:
    """A model with random weights; biases too, whose zeros would hide mistakes."""
    torch.manual_seed(0)
    model = getattr(minibert, head)(CONFIG, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tied parameter once."""
    return {name: value.clone() for name, value in model.state_dict().items() if name not in aliases(model)}


def write(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint of any tensors."""
    directory.mkdir(exist_ok=True)
    values = {**CONFIG.to_dict(), **config}
    (directory / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value != ...}))
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def is_same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """What a test does not look at must not be said: `said(caplog)` takes it."""
    yield
    assert [record.message for record in caplog.records if record.name.startswith("minibert")] == []
    assert [
        str(warning.message) for warning in recwarn if Path(minibert.__file__).parent in Path(warning.filename).parents
    ] == []


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return messages


# Loading what others saved, and the reverse


@pytest.mark.parametrize("head", HEADS)
def test_transformers_opens_what_we_save(tmp_path: Path, head: str) -> None:
    model = new(head)
    model.save_pretrained(tmp_path)
    reference, info = getattr(transformers, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert is_same(reference, model)
    assert reference.config.architectures == [head]
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("head", HEADS)
def test_we_open_what_transformers_saves(tmp_path: Path, head: str) -> None:
    torch.manual_seed(0)
    reference = getattr(transformers, head)(transformers.BertConfig(**SIZES))
    reference.save_pretrained(tmp_path)
    model = getattr(minibert, head).from_pretrained(tmp_path)
    assert is_same(model, reference)
    assert not model.training


@pytest.mark.parametrize("written_as", ["zip", "legacy", "shards", "bin shards"])
def test_other_formats(tmp_path: Path, written_as: str) -> None:
    model = new()
    model.save_pretrained(tmp_path, max_shard_size=20_000 if written_as == "shards" else "5GB")
    if written_as == "shards":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        (tmp_path / "model.safetensors").unlink()
        parts = [dict(model.state_dict())]
        if written_as == "bin shards":
            items = list(weights(model).items())
            parts = [dict(items[:9]), dict(items[9:])]
            index = {name: f"pytorch_model-{i}.bin" for i, part in enumerate(parts) for name in part}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        for i, part in enumerate(parts):
            name = "pytorch_model.bin" if len(parts) == 1 else f"pytorch_model-{i}.bin"
            torch.save(part, tmp_path / name, _use_new_zipfile_serialization=written_as == "zip")
    assert is_same(minibert.BertForPreTraining.from_pretrained(tmp_path), model)


OLD_NAMES: dict[str, Callable[[str], str]] = {
    "gamma and beta": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    ),
    "no prefix": lambda name: name.removeprefix("bert."),
    "distributed": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
}


@pytest.mark.parametrize("names", OLD_NAMES)
def test_other_names(tmp_path: Path, names: str) -> None:
    model = new()
    buffers = {"bert.embeddings.position_ids": torch.arange(20)[None]}
    tensors = {OLD_NAMES[names](name): value for name, value in {**weights(model), **buffers}.items()}
    loaded, report = minibert.BertForPreTraining.from_pretrained(write(tmp_path, tensors), output_loading_info=True)
    assert is_same(loaded, model)
    assert report.named("expected extra") == ["bert.embeddings.position_ids"]
    renamed = [tensor for tensor in report.tensors if tensor.status == "renamed"]
    assert renamed
    assert all(OLD_NAMES[names](tensor.name) == tensor.source for tensor in renamed)


def test_bare_encoder_of_a_model_with_heads(tmp_path: Path) -> None:
    model = new()
    encoder, report = minibert.BertModel.from_pretrained(write(tmp_path, weights(model)), output_loading_info=True)
    assert is_same(encoder, model.bert)
    assert {name.split(".")[0] for name in report.named("expected extra")} == {"cls"}


def test_real_checkpoints(minilm_dir: Path, rxnfp_dir: Path) -> None:
    """Old pickles of transposed tensors without decoder.bias, a bare encoder, a classifier: silent and complete."""
    for directory, head, statuses in (
        (minilm_dir, "BertModel", {"loaded": 103, "expected extra": 1}),
        (rxnfp_dir / "bert_pretrained", "BertForPreTraining", {"loaded": 206, "tied alias": 2}),
        (rxnfp_dir / "bert_ft", "BertModel", {"loaded": 199}),
        (rxnfp_dir / "bert_ft_10k_25s", "BertForSequenceClassification", {"loaded": 201}),
    ):
        model, report = getattr(minibert, head).from_pretrained(directory, output_loading_info=True)
        reference = getattr(transformers, head).from_pretrained(directory)
        assert is_same(model, reference)
        assert {status: len(report.named(status)) for status in statuses} == statuses
        assert len(report.tensors) == sum(statuses.values())


# The report


def test_report(tmp_path: Path) -> None:
    model = new()
    tensors = {OLD_NAMES["gamma and beta"](name): value for name, value in weights(model).items()}
    path = write(tmp_path, tensors)
    _, report = minibert.BertForPreTraining.from_pretrained(path, output_loading_info=True)
    assert [tensor.name for tensor in report.tensors] == list(model.state_dict())
    for entry in report.to_dict():
        assert entry["shape"] == list(model.state_dict()[entry["name"]].shape)
        if entry["status"] != "tied alias":
            digest = hashlib.sha256(tensors[entry["source"]].numpy().tobytes()).hexdigest()
            assert (entry["sha256"], entry["dtype"], entry["file"]) == (digest, "float32", "model.safetensors")
    assert json.dumps(report.to_dict())
    assert report["missing_keys"] == report["unexpected_keys"] == report["mismatched_keys"] == set()


def test_converting_back_gives_equal_bytes(tmp_path: Path, rxnfp_dir: Path) -> None:
    source = rxnfp_dir / "bert_pretrained"
    model, report = minibert.BertForPreTraining.from_pretrained(source, output_loading_info=True)
    back = {tensor.source: model.state_dict()[tensor.name] for tensor in report.tensors if tensor.source}
    original = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert back.keys() == original.keys()
    assert all(back[name].numpy().tobytes() == original[name].contiguous().numpy().tobytes() for name in original)


def test_inspecting_reads_no_weights(tmp_path: Path) -> None:
    path = write(tmp_path, {name: value for name, value in weights(new()).items() if "pooler" not in name})
    model, report = minibert.BertForPreTraining.inspect_pretrained(path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert report.named("missing") == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]


# What is said, and what is refused


def test_new_head_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, weights(new()))
    torch.manual_seed(1)
    model, report = minibert.BertForSequenceClassification.from_pretrained(path, num_labels=3, output_loading_info=True)
    (line,) = said(caplog)
    assert "classifier.weight, classifier.bias" in line
    assert report.named("newly initialised") == ["classifier.weight", "classifier.bias"]
    assert report.missing_keys == report["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (3, 32)
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert not model.classifier.bias.any()
    assert model.classifier.weight.requires_grad


def test_half_a_head_is_missing(tmp_path: Path) -> None:
    tensors = weights(new("BertForSequenceClassification"))
    del tensors["classifier.bias"]
    with pytest.raises(ValueError, match=r"lacks weights of BertForSequenceClassification: classifier\.bias"):
        minibert.BertForSequenceClassification.from_pretrained(write(tmp_path, tensors))


def test_all_missing_weights_are_listed(tmp_path: Path) -> None:
    tensors = weights(new())
    gone = [name for name in tensors if "layer.1.attention" in name or name.startswith("cls.predictions.transform")]
    tensors = {name: value for name, value in tensors.items() if name not in gone}
    tensors["bert.encoder.layer.1.atention.query.weight"] = torch.ones(2)
    with pytest.raises(ValueError, match="lacks weights of BertForPreTraining") as caught:
        minibert.BertForPreTraining.from_pretrained(write(tmp_path, tensors))
    assert all(name in str(caught.value) for name in [*gone, "atention", str(tmp_path)])


def test_encoder_without_pooler(tmp_path: Path) -> None:
    model = new("BertModel", add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight, pooler\.dense\.bias;.*add_pooling_layer=False"):
        minibert.BertModel.from_pretrained(tmp_path)
    assert is_same(minibert.BertModel.from_pretrained(tmp_path, add_pooling_layer=False), model)


def test_foreign_tensors_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**weights(new()), **{f"crf.{i}": torch.ones(2) for i in range(9)}}
    minibert.BertForPreTraining.from_pretrained(write(tmp_path, tensors))
    (line,) = said(caplog)
    assert "crf.0, crf.1, crf.2, crf.3, crf.4 and 4 more" in line


def test_fewer_layers_than_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = minibert.BertForPreTraining.from_pretrained(write(tmp_path, weights(new())), num_hidden_layers=1)
    assert len(model.bert.encoder.layer) == 1
    assert "bert.encoder.layer.1" in said(caplog)[0]


def test_wrong_shapes_are_all_listed(tmp_path: Path) -> None:
    path = write(tmp_path, weights(new("BertForSequenceClassification")))
    with pytest.raises(ValueError, match=r"model\.safetensors.*classifier\.weight is \(2, 32\).*not \(5, 32\).*bias"):
        minibert.BertForSequenceClassification.from_pretrained(path, num_labels=5)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = {**weights(new()), "cls.predictions.bias": torch.ones(61, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"cls\.predictions\.bias is \(61,\) of torch\.int64"):
        minibert.BertForPreTraining.from_pretrained(write(tmp_path, tensors))


ALIAS, OWNER = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def test_contradicted_tie(tmp_path: Path) -> None:
    tensors = weights(new())
    path = write(tmp_path, {**tensors, ALIAS: tensors[OWNER].clone()})
    assert ALIAS in minibert.BertForPreTraining.from_pretrained(path).state_dict()
    path = write(tmp_path, {**tensors, ALIAS: tensors[OWNER] + 1})
    with pytest.raises(ValueError, match=rf"{ALIAS} differs from {OWNER}"):
        minibert.BertForPreTraining.from_pretrained(path)


def test_tied_weights_stored_under_the_other_name(tmp_path: Path) -> None:
    model = new()
    other = {owner: alias for alias, owner in aliases(model).items()}
    tensors = {other.get(name, name): value for name, value in weights(model).items()}
    loaded, report = minibert.BertForPreTraining.from_pretrained(write(tmp_path, tensors), output_loading_info=True)
    assert is_same(loaded, model)
    assert next(tensor.source for tensor in report.tensors if tensor.name == OWNER) == ALIAS


WRONG_CONFIGS = {
    "model_type": "roberta",
    "hidden_act": "swiglu",
    "position_embedding_type": "relative_key",
    "is_decoder": True,
    "hidden_size": -1,
    "num_hidden_layers": 10**9,
    "vocab_size": 10**18,
    "layer_norm_eps": "small",
}


@pytest.mark.parametrize("field", WRONG_CONFIGS)
def test_refused_configs(tmp_path: Path, field: str) -> None:
    path = write(tmp_path, weights(new()), **{field: WRONG_CONFIGS[field]})
    with pytest.raises(ValueError, match=rf"config\.json.*{field}"):
        minibert.BertForPreTraining.from_pretrained(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"model_type": "bert"'])
def test_config_that_is_none(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, weights(new()))
    (path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        minibert.BertForPreTraining.from_pretrained(path)


def test_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path, weights(new()))
    (path / "model.safetensors").rename(path / "weights")
    with pytest.raises(FileNotFoundError, match=r"no weights: looked for model\.safetensors.*'weights'"):
        minibert.BertModel.from_pretrained(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        minibert.BertModel.from_pretrained(path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        minibert.BertModel.from_pretrained(path / "weights")


def test_wrong_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, weights(new()))
    for arguments, error, message in (
        ({"torch_type": torch.float16}, TypeError, "no argument torch_type"),
        ({"dtype": "int8"}, ValueError, "dtype='int8': must be None or one of fp32, fp16"),
        ({"dtype": torch.int8}, ValueError, "must be None or one of"),
        ({"config": CONFIG, "num_labels": 3}, TypeError, "either config or its fields"),
        ({"device": "nowhere"}, ValueError, "device=.nowhere."),
    ):
        with pytest.raises(error, match=message):
            minibert.BertModel.from_pretrained(path, **arguments)
    assert minibert.BertModel.from_pretrained(path, config=CONFIG).config == CONFIG


@contextmanager
def as_nobody(tmp_path: Path) -> Iterator[None]:
    """Without the right, which root has, to read any file."""
    if os.geteuid() != 0:
        yield
        return
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own folders, closed to others
        if folder.name.startswith("pytest-of-"):
            break
        folder.chmod(0o755)
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_permission_to_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, weights(new()))
    minibert.BertModel.from_pretrained(path)  # imports what it needs
    (path / name).chmod(0)
    with as_nobody(tmp_path), pytest.raises(PermissionError, match=name):
        minibert.BertModel.from_pretrained(path)


# Types, devices, what loading does not do


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    new().to(dtype).save_pretrained(tmp_path)
    model = minibert.BertForPreTraining.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    converted = minibert.BertForPreTraining.from_pretrained(tmp_path, dtype="fp32")
    assert is_same(converted, model.float())


def test_file_of_several_types_becomes_the_widest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name: value if "LayerNorm" in name else value.bfloat16() for name, value in weights(new()).items()}
    model = minibert.BertForTokenClassification.from_pretrained(write(tmp_path, tensors))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(said(caplog)) == 1


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    """Parameters are not initialised only to be overwritten."""
    path = write(tmp_path, weights(new()))
    before = torch.get_rng_state()
    minibert.BertForPreTraining.from_pretrained(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_imports_little(tmp_path: Path) -> None:
    """A directory needs no Hub client; building on the meta device does not import torch's compiler."""
    path = write(tmp_path, weights(new()))
    code = f"""
import sys, minibert
minibert.BertForPreTraining.from_pretrained({str(path)!r})
print([name for name in ("huggingface_hub", "torch._dynamo", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


# Saving


def test_saving_over_what_was_loaded(tmp_path: Path) -> None:
    new().save_pretrained(tmp_path)
    model = minibert.BertForPreTraining.from_pretrained(tmp_path)
    with torch.no_grad():
        model.cls.seq_relationship.bias.fill_(7)
    model.save_pretrained(tmp_path)
    assert is_same(minibert.BertForPreTraining.from_pretrained(tmp_path), model)


def test_shards_come_and_go(tmp_path: Path) -> None:
    model = new()
    (tmp_path / "vocab.txt").write_text("[PAD]")
    for size, files in (("5GB", 1), (20_000, 5), (40_000, 3), ("5GB", 1)):
        model.save_pretrained(tmp_path, max_shard_size=size)
        names = {path.name for path in tmp_path.iterdir()} - {"config.json", "vocab.txt"}
        assert len([name for name in names if name.endswith(".safetensors")]) == files
        assert ("model.safetensors.index.json" in names) == (files > 1)
        assert is_same(minibert.BertForPreTraining.from_pretrained(tmp_path), model)
        assert is_same(transformers.BertForPreTraining.from_pretrained(tmp_path), model)
    assert (tmp_path / "vocab.txt").read_text() == "[PAD]"


def test_full_disk(tmp_path: Path) -> None:
    """The system refuses to write more than some bytes: what was there is there, and nothing else."""
    old = new()
    old.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            new("BertForMaskedLM").save_pretrained(tmp_path)
        with pytest.raises(OSError, match="too large"):
            new("BertForMaskedLM").save_pretrained(tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_wrong_saves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        new().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="max_shard_size"):
        new().save_pretrained(tmp_path / "new", max_shard_size="much")
    assert not (tmp_path / "new").exists()


def save_and_die(model: Any, directory: Path, step: int) -> bool:
    """Save in a process of its own that dies at the n-th change of the directory; whether it got to the end."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(directory) in str(arguments):
                left -= 1
                if left < 0:
                    os._exit(1)

        sys.addaudithook(count)
        model.save_pretrained(directory, max_shard_size=40_000)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_crash_at_every_step(tmp_path: Path) -> None:
    """Config, index and shards are all old or all new: here a classifier of 2 labels and one of 3."""
    old, changed = new("BertForSequenceClassification"), new("BertForSequenceClassification")
    changed.config = minibert.BertConfig(**SIZES, num_labels=3)
    changed.classifier = nn.Linear(32, 3)
    results, ended = [], False
    while not ended:
        directory = tmp_path / str(len(results))
        old.save_pretrained(directory, max_shard_size=20_000)
        ended = save_and_die(changed, directory, len(results))
        loaded = minibert.BertForSequenceClassification.from_pretrained(directory)
        results.append(is_same(loaded, changed))
        assert results[-1] or is_same(loaded, old)
    assert results == sorted(results)
    assert results.count(False) > 10
    assert results.count(True) > 5


# Tied weights stay tied


def resized(model: Any) -> Any:
    model.resize_token_embeddings(70)
    return model


def reloaded(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path)


def with_state(model: Any, **options: Any) -> Any:
    model.load_state_dict(copy.deepcopy(model.state_dict()), **options)
    return model


AFTER: dict[str, Callable[[Any, Path], Any]] = {
    "loading": reloaded,
    "deepcopy": lambda model, tmp_path: copy.deepcopy(model),
    "pickle": lambda model, tmp_path: pickle.loads(pickle.dumps(model)),
    "dtype": lambda model, tmp_path: model.to(torch.bfloat16).double().float(),
    "device": lambda model, tmp_path: model.to("meta").to_empty(device="cpu"),
    "resize": lambda model, tmp_path: resized(model),
    "resize after loading": lambda model, tmp_path: resized(reloaded(model, tmp_path)),
    "load_state_dict": lambda model, tmp_path: with_state(model),
    "load_state_dict with assign": lambda model, tmp_path: with_state(model, assign=True),
    "share_memory": lambda model, tmp_path: model.share_memory(),
    "DistributedDataParallel": lambda model, tmp_path: nn.parallel.DistributedDataParallel(model),
    "FullyShardedDataParallel": lambda model, tmp_path: FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu")
    ),
    "fully_shard": lambda model, tmp_path: sharded(model),
}


def sharded(model: Any) -> Any:
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("head", ["BertForPreTraining", "BertForMaskedLM"])
def test_tied_after(after: str, head: str, tmp_path: Path, process_group: None) -> None:
    wrapped = AFTER[after](new(head), tmp_path)
    model = getattr(wrapped, "module", wrapped)

    def check() -> None:
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
        names = [name for name, _ in model.named_parameters()]
        assert not set(names) & aliases(model).keys()
        assert model.cls.predictions.decoder.out_features == len(model.cls.predictions.bias)

    check()
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    wrapped(IDS, labels=IDS).loss.backward()
    optimizer.step()
    check()


def test_a_device_that_is_not_here_is_named(tmp_path):
    minibert.BertModel(minibert.BertConfig.named("tiny", vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='musical'"):
        minibert.BertModel.from_pretrained(tmp_path, device="musical")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda:0': torch finds no CUDA GPU"):
            minibert.BertModel.from_pretrained(tmp_path, device="cuda:0")
    for name, kind in (("mps", torch.backends.mps), ("xpu", torch.xpu)):
        if not kind.is_available():
            with pytest.raises(ValueError, match=f"device='{name}': ."):
                minibert.BertModel.from_pretrained(tmp_path, device=name)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match="device='cuda:7': torch finds 2 CUDA GPUs here"):
            minibert.BertModel.from_pretrained(tmp_path, device="cuda:7")
    assert minibert.BertModel.from_pretrained(tmp_path, device="meta").device.type == "meta"

"""checkpoint.py: reading whatever a file is laid out like, refusing what is broken, names, reports, writing."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import minibert
from minibert.weights import checkpoint, hub, tensors
from minibert.weights.ties import aliases

CONFIG = minibert.BertConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=20,
)


@pytest.fixture(scope="module")
def model() -> minibert.BertForPreTraining:
    torch.manual_seed(0)
    return minibert.BertForPreTraining(CONFIG).eval()


@pytest.fixture
def directory(model: minibert.BertForPreTraining, tmp_path: Path) -> Path:
    """A small checkpoint on disk."""
    model.save_pretrained(tmp_path)
    return tmp_path


def tensors_in(*paths: Path) -> dict[str, Tensor]:
    stored = checkpoint.open_files(paths)
    return dict(zip(stored, checkpoint.read(stored.values()), strict=True))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
    )


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header, also one that lies."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


# Reading


@pytest.mark.parametrize("padding", range(0, 64, 5))
def test_header_length_does_not_matter(
    directory: Path, model: minibert.BertForPreTraining, padding: int, tmp_path: Path
) -> None:
    """Each weight lies at a multiple of 64 bytes, and one-row products, which depend on that, are equal."""
    tensors = {name: value for name, value in model.state_dict().items() if name not in aliases(model)}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt", "padding": "x" * padding})
    loaded = minibert.BertForPreTraining.from_pretrained(directory)
    assert {parameter.data_ptr() % 64 for parameter in loaded.parameters()} == {0}
    ids = torch.tensor([[2, 5, 7, 3]])
    with torch.inference_mode():
        for found, expected in zip(loaded(ids).to_tuple(), model(ids).to_tuple(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", checkpoint.WEIGHT_DTYPES)
@pytest.mark.parametrize("written_by", ["minibert", "safetensors", "zip", "legacy"])
def test_formats(tmp_path: Path, dtype: torch.dtype, written_by: str) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(64, 64),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(1.5),
    }
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    path = tmp_path / ("pytorch_model.bin" if written_by in ("zip", "legacy") else "model.safetensors")
    if written_by == "minibert":
        checkpoint.write_file(path, tensors)
    elif written_by == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=written_by == "zip")
    found = tensors_in(path)
    assert same(found, tensors)
    assert all(value.data_ptr() % 64 == 0 for value in found.values())


def test_transposed_and_tied_tensors_of_a_pickle(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    torch.save({"state_dict": {"a": weight.t(), "b": weight.t(), "c": weight[1:, 1]}}, tmp_path / "x.bin")
    found = tensors_in(tmp_path / "x.bin")
    assert same(found, {"a": weight.t(), "b": weight.t(), "c": weight[1:, 1]})
    assert all(value.is_contiguous() for value in found.values())


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_CHUNK", 1000)
    values = {"a": torch.randn(3), "b": torch.randn(77, 33), "c": torch.randn(5000)}
    write_raw(tmp_path / "x.safetensors", *_shifted(values))
    assert same(tensors_in(tmp_path / "x.safetensors"), values)


def _shifted(tensors: dict[str, Tensor]) -> tuple[bytes, bytes]:
    """Header and data such that no tensor lies at a multiple of 2 bytes, as some old writers left them."""
    text = safetensors.torch.save(tensors)
    length = int.from_bytes(text[:8], "little")
    header, data = text[8 : 8 + length].rstrip(), text[8 + length :]
    return header + b" " * (1 - len(header) % 2), data


def test_file_is_not_changed_by_training(directory: Path) -> None:
    path = directory / "model.safetensors"
    before = path.read_bytes()
    model = minibert.BertForPreTraining.from_pretrained(directory).train()
    model(torch.tensor([[2, 5, 7]]), labels=torch.tensor([[2, 5, 7]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert path.read_bytes() == before
    assert not same(dict(model.state_dict()), dict(minibert.BertForPreTraining.from_pretrained(directory).state_dict()))


def test_loaded_weights_outlive_the_file(directory: Path, model: minibert.BertForPreTraining) -> None:
    loaded = minibert.BertForPreTraining.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


# Broken and hostile files

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
LIES: dict[str, tuple[Any, bytes]] = {
    "no JSON": (b"{", b""),
    "no object": ([], b""),
    "binary": (b"\xff\xfe", b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [4, 12]}}, bytes(12)),
    "gap": ({"a": A, "b": {**B, "data_offsets": [16, 24]}}, bytes(24)),
    "out of range": ({"a": A, "b": B}, bytes(12)),
    "trailing data": ({"a": A}, bytes(12)),
    "wrong shape": ({"a": {**A, "shape": [3]}}, bytes(8)),
    "huge shape": ({"a": {**A, "shape": [2**62, 2**62]}}, bytes(8)),
    "negative shape": ({"a": {**A, "shape": [-2]}}, bytes(8)),
    "negative offset": ({"a": {**A, "data_offsets": [-8, 0]}}, bytes(8)),
    "reversed offsets": ({"a": {**A, "data_offsets": [8, 0]}}, bytes(8)),
    "unknown type": ({"a": {**A, "dtype": "F31"}}, bytes(8)),
    "deep": (b"[" * 100_000, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header(tmp_path: Path, lie: str) -> None:
    write_raw(tmp_path / "model.safetensors", *LIES[lie])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        tensors_in(tmp_path / "model.safetensors")


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_lying_header_length(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": A}, bytes(8), length)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        tensors_in(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>", b"\x80\x02}q\x00.", bytes(100)])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is (not a valid|damaged or no)"):
        tensors_in(tmp_path / name)


def test_unreadable_type_is_named_when_it_is_needed(tmp_path: Path) -> None:
    write_raw(
        tmp_path / "x.safetensors",
        {"a": A, "b": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [8, 16]}},
        bytes(16),
    )
    stored = checkpoint.open_files([tmp_path / "x.safetensors"])
    assert checkpoint.read([stored["a"]])[0].shape == (2,)
    assert len(stored["b"].sha256) == 64
    with pytest.raises(ValueError, match=r"x\.safetensors: b is of type F8_E4M3"):
        checkpoint.read([stored["b"]])


class Run:
    """Unpickled by anything but a careful reader, this runs code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("import pathlib, sys; pathlib.Path(sys.argv[0] + '.hacked').touch(); sys.hacked = True",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_pickle_that_runs_code(tmp_path: Path, is_zip: bool) -> None:
    import sys

    torch.save({"a": torch.ones(2), "b": Run()}, tmp_path / "x.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"x\.bin asks for \S*exec.*safetensors") as caught:
        tensors_in(tmp_path / "x.bin")
    assert "weights_only=False" in str(caught.value)
    assert not hasattr(sys, "hacked")


@pytest.mark.parametrize("content", [{"a": 3}, {1: torch.ones(2)}, [torch.ones(2)], {"a": torch.eye(2).to_sparse()}])
def test_pickle_of_other_things(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin.*(not a dense tensor|not the tensors of a model)"):
        tensors_in(tmp_path / "x.bin")


@pytest.mark.parametrize("padding", ["", "12345678"], ids=["mapped", "copied"])
def test_what_is_read_is_what_was_opened(tmp_path: Path, padding: str) -> None:
    """A save that replaces a file after its header was read changes nothing in what is then read."""
    path = tmp_path / "x.safetensors"
    metadata = {"padding": padding}
    safetensors.torch.save_file({"a": torch.zeros(4096)}, path, metadata)
    stored = checkpoint.open_files([path])["a"]
    safetensors.torch.save_file({"a": torch.ones(4096)}, tmp_path / "new", metadata)
    (tmp_path / "new").replace(path)
    assert torch.equal(checkpoint.read([stored])[0], torch.zeros(4096))
    path.unlink()
    assert stored.sha256 == checkpoint.open_files([_saved(tmp_path / "same", torch.zeros(4096))])["a"].sha256


def _saved(path: Path, tensor: Tensor) -> Path:
    path = path.with_suffix(".safetensors")
    safetensors.torch.save_file({"a": tensor}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_replaced_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Between the look at a header and what a library reads by the file's name."""
    path = tmp_path / f"x{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save({"a": torch.zeros(64)}, path)
    save({"a": torch.ones(64)}, tmp_path / "new")
    module, name = (safetensors, "safe_open") if suffix == ".safetensors" else (torch, "load")
    original = getattr(module, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "new").exists():
            (tmp_path / "new").replace(path)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, replaced)
    with pytest.raises(OSError, match="was replaced while it was opened"):
        checkpoint.open_files([path])


def test_shards_of_two_saves_are_never_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes a save at any moment while the files are opened: all are old, or all are new."""

    def save(value: float) -> None:
        model = {name: torch.full((1000,), value) for name in "abc"}
        with hub.replacing(tmp_path, stale=checkpoint.is_shard) as staging:
            checkpoint.write(staging, model, max_shard_size=4000)

    original = tensors.OpenFile
    for moment in range(1, 8):
        save(0)
        opened = 0

        def opening(path: Path, moment: int = moment) -> tensors.OpenFile:
            nonlocal opened
            opened += 1
            if opened == moment:
                save(1)
            return original(path)

        monkeypatch.setattr(tensors, "OpenFile", opening)
        stored = checkpoint.open_weights(hub.Source(tmp_path))
        monkeypatch.setattr(tensors, "OpenFile", original)
        values = {float(tensor[0]) for tensor in checkpoint.read(list(stored.values()))}
        assert values == ({1.0} if moment <= 3 else {0.0})


def test_a_config_of_another_save_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _saved(tmp_path / "model", torch.zeros(3))
    source = hub.Source(tmp_path)
    source.file("config.json")
    with hub.replacing(tmp_path) as staging:
        (staging / "config.json").write_text('{"a": 1}')
        _saved(staging / "model", torch.ones(3))
    with pytest.raises(OSError, match=r"config\.json was replaced while the model was opened: open it again"):
        checkpoint.open_weights(source)
    assert checkpoint.open_weights(hub.Source(tmp_path))


def test_each_copied_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """Who keeps one misaligned tensor keeps its bytes, and not those of all others."""
    many = {f"t{i}": torch.ones(100_000) for i in range(8)}
    safetensors.torch.save_file(many, tmp_path / "x.safetensors", {"padding": "12345678"})
    stored = list(checkpoint.open_files([tmp_path / "x.safetensors"]).values())
    tracemalloc.start()
    kept = checkpoint.read(stored)[0]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept.nbytes <= held < 2 * kept.nbytes


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1000)}, tmp_path / "x.safetensors", {"padding": "12345678"})
    stored = checkpoint.open_files([tmp_path / "x.safetensors"])["a"]
    assert stored.offset % 64 != 0
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:500])
    with pytest.raises(OSError, match=r"x\.safetensors ended while it was read"):
        checkpoint.read([stored])


def test_shards_that_repeat_a_name(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        checkpoint.write_file(tmp_path / name, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"a is in both .*1\.safetensors and .*2\.safetensors"):
        tensors_in(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


def variants(original: bytes, seed: int, count: int, front: int) -> Iterator[bytes]:
    """The bytes cut short somewhere, or with 1 to 20 bits flipped, half of the time within the first `front` bytes."""
    rng = random.Random(seed)
    for i in range(count):
        if i % 5 == 0:
            yield original[: rng.randrange(len(original))]
            continue
        spoilt = bytearray(original)
        for _ in range(rng.choice([1, 1, 1, 4, 20])):
            spoilt[rng.randrange(front if i % 2 else len(spoilt))] ^= 1 << rng.randrange(8)
        yield bytes(spoilt)


@pytest.mark.parametrize("kind", ["model.safetensors", "zip", "legacy", "config.json", "model.safetensors.index.json"])
def test_spoilt_files(directory: Path, model: minibert.BertForPreTraining, kind: str) -> None:
    """300 variants of each file: a clear error that names the file or the model, or what a careful reader finds."""
    path = directory / kind
    if kind in ("zip", "legacy"):
        path = directory / "pytorch_model.bin"
        torch.save(dict(model.state_dict()), path, _use_new_zipfile_serialization=kind == "zip")
        (directory / "model.safetensors").unlink()
    elif kind.endswith("index.json"):
        model.save_pretrained(directory, max_shard_size=10_000)
    original, loaded = path.read_bytes(), 0
    for spoilt in variants(original, seed=1, count=300, front=min(len(original), 4000)):
        path.unlink()  # and not overwritten: the last model may still be mapped
        path.write_bytes(spoilt)
        try:
            found = minibert.BertForPreTraining.from_pretrained(directory)
        except (ValueError, OSError) as error:
            assert str(directory) in str(error), error
            continue
        loaded += 1
        if kind == "model.safetensors":
            expected = safetensors.torch.load(spoilt)
        elif path.suffix == ".bin":
            expected = torch.load(path, weights_only=True)
        else:
            expected = dict(model.state_dict())
        for name, value in found.state_dict().items():
            assert name not in expected or torch.equal(_bits(value), _bits(expected[name]))
    assert 0 < loaded < 200


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)  # as numbers, NaNs differ from themselves


def test_a_tensor_without_data(tmp_path: Path) -> None:
    """torch.load gives it whatever the memory held."""
    path = tmp_path / "x.bin"
    tensor = torch.zeros(1000)
    torch.save({"a": tensor, "b": tensor[:10]}, path, _use_new_zipfile_serialization=False)
    assert list(tensors.open_files([path])) == ["a", "b"]
    key = str(tensor.untyped_storage()._cdata).encode()
    before, of_a, of_b, in_list = path.read_bytes().split(key)
    path.write_bytes(before + key + of_a + b"1" + key[1:] + of_b + key + in_list)
    assert torch.load(path)["b"].shape == (10,)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged or no PyTorch checkpoint: it refers to data")):
        tensors.open_files([path])


def test_damage_that_torch_does_not_see(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    spoilt = bytearray((tmp_path / "x.bin").read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    (tmp_path / "x.bin").write_bytes(spoilt)
    assert not torch.equal(torch.load(tmp_path / "x.bin")["a"], torch.zeros(1000))
    with pytest.raises(ValueError, match=r"x\.bin is damaged.*CRC"):
        tensors_in(tmp_path / "x.bin")


def test_zip_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(tensors_in(tmp_path / "x.bin"), {"a": torch.ones(3)})


def test_compressed_zip(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.bin")
    packed = zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "x.bin") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"y\.bin is damaged.*compressed"):
        tensors_in(tmp_path / "y.bin")


# Names

NAMES = [
    ("bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.weight"),
    ("bert.encoder.layer.0.output.LayerNorm.beta", "bert.encoder.layer.0.output.LayerNorm.bias"),
    ("cls.predictions.transform.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.weight"),
    ("embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
    ("module.bert.pooler.dense.bias", "bert.pooler.dense.bias"),
    ("_orig_mod.module.encoder.layer.1.x", "bert.encoder.layer.1.x"),
    ("classifier.weight", "classifier.weight"),
    ("my.gamma", "my.gamma"),
    ("encoder.gamma_network.beta", "bert.encoder.gamma_network.beta"),
    ("bert.embeddings.MyLayerNorm.gamma", "bert.embeddings.MyLayerNorm.gamma"),
]


@pytest.mark.parametrize(("stored", "name"), NAMES)
def test_rename(stored: str, name: str) -> None:
    assert checkpoint.rename(stored, "bert.") == name
    assert checkpoint.rename(name, "bert.") == name
    assert checkpoint.rename(stored, "") == name.removeprefix("bert.")


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_renaming_has_an_inverse(model: minibert.BertForPreTraining, prefix: str) -> None:
    old = {"weight": "gamma", "bias": "beta"}
    stored = [
        f"module.{name.removesuffix(kind)}{old[kind]}" if f"LayerNorm.{kind}" in name else f"module.{name}"
        for name in model.state_dict()
        for kind in [name.rpartition(".")[2]]
    ]
    sources = checkpoint.rename_all(stored, prefix)
    assert sorted(sources.values()) == sorted(stored)
    assert set(sources) == {checkpoint.rename(name, prefix) for name in model.state_dict()}


def test_two_names_of_one_parameter() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm\.gamma and .*LayerNorm\.weight are the same parameter"):
        checkpoint.rename_all(["embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"], "bert.")


# Writing


def test_everything_that_can_be_is_aligned(tmp_path: Path) -> None:
    tensors = {"odd": torch.randn(3), "a": torch.randn(16, 4), "b": torch.randn(8, 8), "scalar": torch.tensor(1.0)}
    checkpoint.write_file(tmp_path / "x.safetensors", tensors)
    stored = checkpoint.open_files([tmp_path / "x.safetensors"])
    assert {name: stored[name].offset % 64 for name in ("a", "b", "odd")} == {"a": 0, "b": 0, "odd": 0}
    assert same(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), ("1", 1), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("10KB", 10_000)]
)
def test_sizes(size: int | str, expected: int) -> None:
    assert checkpoint.as_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, "0GB", "5 apples", "", "GB", True, None, 1.5])
def test_wrong_sizes(size: object) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        checkpoint.as_bytes(size)


def test_shards() -> None:
    tensors = {name: torch.zeros(count) for name, count in (("a", 2), ("b", 2), ("c", 9), ("d", 1))}
    assert checkpoint.shards(tensors, 10**6) == {"model.safetensors": ["a", "b", "c", "d"]}
    assert list(checkpoint.shards(tensors, 16).values()) == [["a", "b"], ["c"], ["d"]]
    assert list(checkpoint.shards(tensors, 1)) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert all(map(checkpoint.is_shard, [*checkpoint.shards(tensors, 1), "model.safetensors.index.json"]))
    assert not any(map(checkpoint.is_shard, ["pytorch_model.bin", "my-model.safetensors", "model.safetensors.bak"]))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(directory: Path, name: str):
    (directory / "model.safetensors").unlink()
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        minibert.BertModel.from_pretrained(directory)

"""convert.py: checkpoints as they are on the Hub, to a clean directory that transformers opens with equal outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentence_transformers
import torch
import transformers
from reference import assert_as_exact
from test_pretrained import CONFIG, OLD_NAMES, new, weights
from torch import Tensor

import minibert
from minibert.weights import checkpoint
from minibert.weights.convert import HEADS, TIED, convert, inspect
from minibert.weights.ties import aliases

BUFFERS = {"bert.embeddings.position_ids": torch.arange(20)[None]}
POOLING = {
    "modules.json": [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}],
    "1_Pooling/config.json": {"pooling_mode_cls_token": True},
    "sentence_bert_config.json": {"max_seq_length": 20},
}


def without(tensors: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not any(part in name for part in parts)}


def with_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the tied tensors under both of their names."""
    tied = TIED.items()
    return {**tensors, **{alias: tensors[owner].clone() for alias, owner in tied if owner in tensors}}


def renamed(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {OLD_NAMES[kind](name): value for name, value in tensors.items()}


# How well-known checkpoints are stored: (tensors, file, architectures in the config, class of the result)
LAYOUTS: dict[str, tuple[Callable[[], dict[str, Tensor]], str, str | None, str]] = {
    "bert-base-uncased": (
        lambda: renamed("gamma and beta", weights(new())), "safetensors", "BertForMaskedLM", "BertForMaskedLM",
    ),
    "bert-base-uncased as .bin": (
        lambda: without(with_decoder(renamed("gamma and beta", weights(new()))), "decoder.bias"), "legacy",
        "BertForMaskedLM", "BertForMaskedLM",
    ),
    "bert-large-uncased-whole-word-masking": (
        lambda: with_decoder(weights(new())), "zip", "BertForMaskedLM", "BertForMaskedLM",
    ),
    "bert-base-multilingual-cased": (lambda: with_decoder(weights(new())), "bin shards", None, "BertForPreTraining"),
    "bert-base-chinese": (
        lambda: without(weights(new()), "seq_relationship"), "shards", "BertForMaskedLM", "BertForMaskedLM",
    ),
    "MiniLM": (lambda: weights(new("BertModel")), "legacy", None, "BertModel"),
    "BGE": (
        lambda: {**weights(new("BertModel")), "embeddings.position_ids": torch.arange(20)[None]}, "safetensors",
        "BertModel", "BertModel",
    ),
    "E5": (lambda: weights(new("BertModel").half()), "safetensors", "BertModel", "BertModel"),
    "GTE": (
        lambda: without(weights(new("BertModel").bfloat16()), "pooler"), "safetensors", "BertModel", "BertModel",
    ),
    "encoder of an MLM that kept its prefix": (
        lambda: {**without(weights(new()), "cls."), **BUFFERS}, "zip", "BertForMaskedLM", "BertModel",
    ),
    "distributed": (lambda: renamed("distributed", weights(new())), "zip", "BertForPreTraining", "BertForPreTraining"),
    "classifier": (
        lambda: weights(new("BertForSequenceClassification")), "safetensors", "BertForSequenceClassification",
        "BertForSequenceClassification",
    ),
    "NER": (
        lambda: weights(new("BertForTokenClassification")), "zip", "BertForTokenClassification",
        "BertForTokenClassification",
    ),
    "SQuAD": (lambda: weights(new("BertForQuestionAnswering")), "legacy", None, "BertForQuestionAnswering"),
    "NSP": (lambda: weights(new("BertForNextSentencePrediction")), "zip", None, "BertForNextSentencePrediction"),
}  # fmt: skip


def write(directory: Path, layout: str) -> Path:
    make, kind, architecture, _ = LAYOUTS[layout]
    tensors = make()
    directory.mkdir()
    config = {**CONFIG.to_dict(), "architectures": [architecture] if architecture else None}
    others = {"config.json": config, "tokenizer_config.json": {"do_lower_case": True}, **POOLING}
    for name, content in others.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    (directory / "README.md").write_text("not needed")
    items = list(tensors.items())
    parts = [dict(items[::2]), dict(items[1::2])] if "shards" in kind else [tensors]
    stem, suffix = ("model", ".safetensors") if kind in ("safetensors", "shards") else ("pytorch_model", ".bin")
    for i, part in enumerate(parts):
        path = directory / f"{stem}{f'-{i}' if len(parts) > 1 else ''}{suffix}"
        if suffix == ".bin":
            torch.save(part, path, _use_new_zipfile_serialization=kind != "legacy")
        else:
            safetensors.torch.save_file(part, path)
    if len(parts) > 1:
        index = {name: f"{stem}-{i}{suffix}" for i, part in enumerate(parts) for name in part}
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def written(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_well_known_checkpoints_need_no_flags(tmp_path: Path, layout: str) -> None:
    source, out = write(tmp_path / "source", layout), tmp_path / "out"
    # transformers itself knows nothing of the prefix of DistributedDataParallel
    report = convert(source, out, verify=layout != "distributed")
    tensors, config = written(out), json.loads((out / "config.json").read_text())
    assert config["architectures"] == [LAYOUTS[layout][3]]
    original = {checkpoint.rename(name, "bert."): value for name, value in LAYOUTS[layout][0]().items()}
    assert all(torch.equal(value, original[checkpoint.rename(name, "bert.")]) for name, value in tensors.items())
    dropped = original.keys() - {checkpoint.rename(name, "bert.") for name in tensors}
    assert dropped <= {*BUFFERS, *TIED}
    assert not any(part in name for name in tensors for part in ("gamma", "beta", "module."))
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "modules.json", "1_Pooling",
        "sentence_bert_config.json",
    }  # fmt: skip
    assert (out / "1_Pooling" / "config.json").read_text() == json.dumps(POOLING["1_Pooling/config.json"])
    assert report.named("unexpected") == []


def test_all_heads_of_the_source_can_be_opened(tmp_path: Path) -> None:
    """bert-base-uncased calls itself BertForMaskedLM, and its next-sentence head is not lost."""
    convert(write(tmp_path / "source", "bert-base-uncased"), tmp_path / "out")
    expected = new()
    for library in (minibert, transformers):
        model = library.BertForPreTraining.from_pretrained(tmp_path / "out")
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("head", ["encoder", "masked-lm", "next-sentence", "pretraining"])
def test_one_head_only(tmp_path: Path, head: str) -> None:
    convert(write(tmp_path / "source", "bert-base-uncased as .bin"), tmp_path / "out", head=head, verify=True)
    kind = getattr(minibert, HEADS[head])
    model = kind.from_pretrained(tmp_path / "out")
    assert written(tmp_path / "out").keys() == set(weights(model))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", torch.float64])
def test_type(tmp_path: Path, dtype: Any) -> None:
    convert(write(tmp_path / "source", "E5"), tmp_path / "out", dtype=dtype, verify=True)
    types = {str(value.dtype).removeprefix("torch.") for value in written(tmp_path / "out").values()}
    assert types == {json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]}


def test_real_checkpoints(tmp_path: Path, minilm_dir: Path, rxnfp_dir: Path) -> None:
    """Every tensor of the source is there once, equal to the byte; transformers and minibert give equal outputs."""
    for name in ("bert_pretrained", None):
        out = tmp_path / str(name)
        report = convert(rxnfp_dir / name if name else minilm_dir, out, verify=True)
        after = checkpoint.open_files([out / "model.safetensors"])
        for tensor in report.tensors:
            if tensor.status in ("loaded", "renamed"):
                assert after[tensor.name].sha256 == tensor.sha256
    assert (tmp_path / "None" / "1_Pooling" / "config.json").exists()


def test_sentence_transformers_opens_what_we_write(tmp_path: Path, minilm_dir: Path) -> None:
    convert(minilm_dir, tmp_path / "converted")
    minibert.BertModel.from_pretrained(minilm_dir).save_pretrained(tmp_path / "saved")
    minibert.BertTokenizer.from_pretrained(minilm_dir).save_pretrained(tmp_path / "saved")
    texts = ["A cat sat on the mat.", "Two sentences. One text."]
    original, converted, saved = (
        sentence_transformers.SentenceTransformer(str(path), device="cpu")
        for path in (minilm_dir, tmp_path / "converted", tmp_path / "saved")  # it pools by the mean if no file says how
    )
    options = {"normalize_embeddings": True, "convert_to_tensor": True}
    expected, found = original.encode(texts, **options), [m.encode(texts, **options) for m in (converted, saved)]
    exact = original.double().encode(texts, **options)
    for vectors in found:
        assert_as_exact(vectors, expected, exact)


def test_in_place(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "bert-base-chinese")
    convert(source, source, verify=True)
    names = sorted(path.name for path in source.glob("*.safetensors*"))
    assert names == ["model-0.safetensors", "model-1.safetensors", "model.safetensors"]  # two with names not ours
    assert minibert.BertForMaskedLM.from_pretrained(source)


def test_nothing_of_an_earlier_conversion_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = write(tmp_path / "source", "BGE")
    (source / "tokenizer.json").write_text("{}")
    convert(source, out)
    (out / "mine.txt").write_text("")
    for name in ("tokenizer.json", "modules.json"):
        (source / name).unlink()
    convert(source, out)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json", "1_Pooling", "mine.txt",
        "sentence_bert_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["model.safetensors", "pytorch_model.bin"]])
def test_dense_layer_of_sentence_transformers_comes_along(tmp_path: Path, files: list[str]) -> None:
    source = write(tmp_path / "source", "BGE")
    (source / "modules.json").write_text(json.dumps([*POOLING["modules.json"], {"idx": 2, "path": "2_Dense"}]))
    (source / "2_Dense").mkdir()
    for name in ("config.json", *files):
        (source / "2_Dense" / name).write_text(name)
    convert(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "2_Dense").iterdir()} == {"config.json", files[0]}


def test_failed_verification_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write(tmp_path / "source", "MiniLM"), tmp_path / "out"
    honest = checkpoint.write_file
    monkeypatch.setattr(
        checkpoint, "write_file", lambda path, tensors: honest(path, {name: t + 1e-3 for name, t in tensors.items()})
    )
    with pytest.raises(
        ValueError, match=r"(?s)the result is not equal to the source: .* bug at embeddings\.word_embeddings"
    ):
        convert(source, out, verify=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("BGE", {"head": "masked-lm"}, "lacks weights of BertForMaskedLM: cls.predictions"),
        ("BGE", {"head": "sequence-classification"}, "lacks weights of BertForSequenceClassification: classifier"),
        ("BGE", {"head": "poet"}, "head='poet': must be one of encoder, pretraining"),
        ("BGE", {"dtype": "int4"}, "dtype='int4'"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, layout: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "source", layout), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_inspect_names_what_is_missing(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "BGE")
    model, report = inspect(source)
    assert type(model) is minibert.BertModel
    assert {tensor.status for tensor in report.tensors} == {"loaded", "expected extra"}
    model, report = inspect(source, "masked-lm")
    assert type(model) is minibert.BertForMaskedLM
    assert len(report.named("missing")) == 5
    assert set(report.named("tied alias")) == set(aliases(model))


def test_classifier_of_unknown_kind(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "classifier")
    (source / "config.json").write_text(json.dumps({**CONFIG.to_dict(), "architectures": ["MyModel"]}))
    with pytest.raises(ValueError, match="has a classifier.*give head, one of"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", head="token-classification")
    assert minibert.BertForTokenClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("modules", ["{", "[3]", '[{"path": "../../x"}]'])
def test_hostile_modules(tmp_path: Path, modules: str) -> None:
    source = write(tmp_path / "source", "BGE")
    (source / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match=r"modules\.json|must be a file inside the model"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verification_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        convert(write(tmp_path / "source", "BGE"), tmp_path / "out", verify=True)


def test_the_tool(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "BGE")
    tool = Path(__file__).parents[2] / "tools" / "convert.py"
    subprocess.run([sys.executable, tool, source, tmp_path / "out", "--dtype", "bf16"], check=True)
    assert minibert.BertModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16

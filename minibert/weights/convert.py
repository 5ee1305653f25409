"""From any BERT checkpoint to a clean directory: one format, today's names, each parameter once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minibert
from minibert.weights import checkpoint, hub
from minibert.weights.checkpoint import LoadReport
from minibert.weights.pretrained import Pretrained, as_dtype, load_config, write_model

# The classes by their public names: what is above this room is not imported, but asked of the package when it is needed
HEADS = {
    "encoder": "BertModel",
    "pretraining": "BertForPreTraining",
    "masked-lm": "BertForMaskedLM",
    "next-sentence": "BertForNextSentencePrediction",
    "sequence-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "multiple-choice": "BertForMultipleChoice",
}

# What the head of masked words shares with others, under a second name: stored once
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# How sentence-transformers pools; modules.json names folders with more
_POOLING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def convert(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    head: str | None = None,
    verify: bool = False,
    **where: Any,
) -> LoadReport:
    """Write a checkpoint anew: config.json, safetensors with each tied tensor once, and the tokenizer's files.

    The result is written whole or not at all. What sentence-transformers needs for pooling comes along. Returns what
    became of each tensor.

    Args:
        source: a directory or a name on the Hub; `where` is the keyword arguments of `minibert.weights.hub.Source`.
        dtype: of the result, such as "bf16"; default that of the source.
        head: the only head to keep, one of `HEADS` ("encoder" for none); default all that are there.
        verify: open source and result with transformers and compare all outputs, before anything is replaced.

    Raises:
        ValueError: the source is damaged or incomplete, has no such head, or verification finds a difference.
        ImportError: verify without transformers.
        OSError: the source cannot be found or the result not written.
    """
    if verify:
        _transformers()
    dtype = as_dtype(dtype)
    origin = hub.as_source(source, **where)
    model, report = _choose(origin, head)
    if absent := report.named("missing", "newly initialised"):
        raise ValueError(f"{origin.name} lacks weights of {type(model).__name__}: {', '.join(absent)}")
    tensors = _tensors(report, dtype, every_head=head is None)
    with hub.replacing(out_dir, stale=_is_ours) as staging:
        write_model(staging, type(model).__name__, model.config, tensors)
        _copy_other_files(origin, staging)
        if verify:
            _verify(origin, staging, model, dtype)
    return report


def inspect(source: str | os.PathLike, head: str | None = None, **where: Any) -> tuple[Pretrained, LoadReport]:
    """The model that a checkpoint holds, without its weights, and what would become of each tensor.

    head: one of `HEADS`; default what the checkpoint was saved as. Weights that are missing are in the report; other
    errors are those of `convert`.
    """
    return _choose(hub.as_source(source, **where), head)


def _is_ours(name: str) -> bool:
    """Whether a file left by an earlier conversion would be read together with the new ones."""
    return checkpoint.is_shard(name) or name in (*TOKENIZER_FILES, *_POOLING_FILES)


def _choose(origin: hub.Source, head: str | None) -> tuple[Pretrained, LoadReport]:
    """The class of the result, without weights: the named one, else what the config says, else what the file holds."""
    if head is not None and head not in HEADS:
        raise ValueError(f"head={head!r}: must be one of {', '.join(HEADS)}")
    config = load_config(minibert.BertConfig, origin, {})
    names = {checkpoint.rename(name, "bert.") for name in checkpoint.open_weights(origin)}
    kinds = _candidates(names, config) if head is None else [getattr(minibert, HEADS[head])]
    if not kinds:
        raise ValueError(
            f"{origin.name} has a classifier, and its config does not say of what: give head, one of "
            "sequence-classification, token-classification, multiple-choice"
        )
    for kind in kinds:
        has_pooler = any(name.startswith("bert.pooler.") for name in names)
        options = {"add_pooling_layer": has_pooler} if kind is minibert.BertModel else {}
        model, report = kind.inspect_pretrained(origin, config=config, **options)
        if not report.named("missing", "newly initialised"):
            break
    return model, report  # of the last if none is complete


def _candidates(names: set[str], config: Any) -> list[type[Pretrained]]:
    """Classes that a checkpoint may be of, the likeliest first; a bare encoder only if it has no head."""

    def has(part: str) -> bool:
        return any(name.startswith(part) for name in names)

    by_name = {name: getattr(minibert, name) for name in HEADS.values() if name != "BertModel"}
    kinds = [by_name[name] for name in config.architectures or () if name in by_name]
    if has("cls.predictions."):
        kinds += [minibert.BertForPreTraining] * has("cls.seq_relationship.") + [minibert.BertForMaskedLM]
    if has("cls.seq_relationship."):
        kinds.append(minibert.BertForNextSentencePrediction)
    if has("qa_outputs."):
        kinds.append(minibert.BertForQuestionAnswering)
    return kinds if has("classifier.") else [*kinds, minibert.BertModel]


def _tensors(report: LoadReport, dtype: torch.dtype | None, every_head: bool) -> dict[str, Tensor]:
    """What to write, by name in the result; heads beside that of the class too, if every head is wanted."""
    statuses = ("loaded", "renamed", "expected extra") if every_head else ("loaded", "renamed")
    names = {tensor.name for tensor in report.tensors}
    aliases = {alias for alias, owner in TIED.items() if owner in names}
    tensors = {}
    for tensor in report.tensors:
        if tensor.status not in statuses or checkpoint.is_buffer(tensor.name) or tensor.name in aliases:
            continue
        value = checkpoint.read([tensor.stored])[0]
        tensors[tensor.name] = value if dtype is None else value.to(dtype)
    return tensors


def _copy_other_files(origin: hub.Source, directory: Path) -> None:
    """Copy the files of the tokenizer and of sentence-transformers' pooling, as they are."""
    names = [*TOKENIZER_FILES, *_POOLING_FILES]
    modules = origin.file("modules.json")
    if modules is not None:
        try:
            folders = [module["path"] for module in json.loads(modules.read_text(encoding="utf-8")) if module["path"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{modules} is no list of sentence-transformers' modules: {error!r}") from None
        for folder in folders:
            weights = [f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"]  # a dense layer has them
            names += [f"{folder}/config.json", *[name for name in weights if origin.file(name)][:1]]
    for name in names:
        path = origin.file(name)
        if path is not None:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("verification compares with transformers: pip install transformers") from None
    return transformers


def _verify(origin: hub.Source, result: Path, model: Pretrained, dtype: torch.dtype | None) -> None:
    """Compare the result, in transformers and in minibert, with the source in transformers: every step, bit for bit.

    Raises ValueError if any differs, or if transformers itself finds weights missing.
    """
    transformers, kind = _transformers(), type(model)
    options = {"add_pooling_layer": model.pooler is not None} if isinstance(model, minibert.BertModel) else {}
    config_file = origin.file("config.json")
    opened = {}
    for name, directory, wanted in (("the source", config_file.parent, dtype), ("the result", result, None)):
        try:
            reference, info = getattr(transformers, kind.__name__).from_pretrained(
                directory, dtype=wanted or "auto", output_loading_info=True, local_files_only=True, **options
            )
        except Exception as error:
            raise ValueError(f"transformers does not open {name}: {type(error).__name__}: {error}") from error
        if info["missing_keys"]:
            raise ValueError(f"transformers finds weights missing in {name}: {', '.join(sorted(info['missing_keys']))}")
        opened[name] = reference
    opened["the result in minibert"] = kind.from_pretrained(result, **options)
    expected = aligned(opened.pop("the source"))
    for name, found in opened.items():
        report = minibert.parity.compare(aligned(found), expected, _inputs(model), require="bits", checks=())
        if not report or report.first is not None:
            raise ValueError(f"{name} is not equal to the source: {report}")


def _inputs(model: Pretrained) -> list[dict[str, Tensor]]:
    """A batch with padding, and one text alone."""
    config, random = model.config, torch.Generator().manual_seed(0)
    choices = (2,) if isinstance(model, minibert.BertForMultipleChoice) else ()
    batches = []
    for batch, length in ((3, min(24, config.max_position_embeddings)), (1, min(7, config.max_position_embeddings))):
        shape = (batch, *choices, length)
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, ..., length // 2 :] = 0 if batch > 1 else 1
        batches.append(
            {
                "input_ids": torch.randint(config.vocab_size, shape, generator=random),
                "token_type_ids": torch.randint(config.type_vocab_size, shape, generator=random),
                "attention_mask": mask,
            }
        )
    return batches


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """Rounding depends on how weights lie in memory: on alignment, and on row or column order (old .bin files hold
    transposed views, as TensorFlow had them). So they are put in aligned memory, row by row.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model

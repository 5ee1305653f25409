"""Text in, answers out: `pipeline("fill-mask", "bert-base-uncased")("Paris is the [MASK] of France.")`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import nn

from minibert.checks import check_choice, shown
from minibert.pipelines.base import Pipeline, batches, chosen_device
from minibert.pipelines.classification import TextClassificationPipeline
from minibert.pipelines.features import FeatureExtractionPipeline
from minibert.pipelines.fill_mask import FillMaskPipeline
from minibert.pipelines.next_sentence import NextSentencePipeline
from minibert.pipelines.question_answering import QuestionAnsweringPipeline
from minibert.pipelines.tagging import TokenClassificationPipeline
from minibert.pipelines.zero_shot import ZeroShotClassificationPipeline
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub
from minibert.weights.pretrained import load_config

__all__ = [
    "PIPELINES",
    "PRETRAINED",
    "FeatureExtractionPipeline",
    "FillMaskPipeline",
    "NextSentencePipeline",
    "Pipeline",
    "QuestionAnsweringPipeline",
    "TextClassificationPipeline",
    "TokenClassificationPipeline",
    "ZeroShotClassificationPipeline",
    "batches",
    "chosen_device",
    "pipeline",
]

Model = str | os.PathLike[str] | nn.Module | None
Tokenizer = str | os.PathLike[str] | BertTokenizer | None

PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        FillMaskPipeline,
        NextSentencePipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
        ZeroShotClassificationPipeline,
        FeatureExtractionPipeline,
    )
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
PRETRAINED = ("fill-mask", "next-sentence-prediction", "feature-extraction")  # what needs no fine-tuning
TASK_OF = {kind.model_class.__name__: task for task, kind in reversed(PIPELINES.items())}  # a class -> its first task
TASK_OF["BertForPreTraining"] = "fill-mask"
# Arguments of transformers' pipeline that change nothing here, and the values that they may have (None: any)
IGNORED: dict[str, tuple[Any, ...] | None] = {
    "use_fast": None, "trust_remote_code": None, "framework": ("pt", None), "config": (None,),
    "pipeline_class": (None,), "feature_extractor": (None,), "image_processor": (None,), "processor": (None,),
}  # fmt: skip


@overload
def pipeline(
    task: Literal["fill-mask"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> FillMaskPipeline: ...


@overload
def pipeline(
    task: Literal["next-sentence-prediction"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> NextSentencePipeline: ...


@overload
def pipeline(
    task: Literal["text-classification", "sentiment-analysis"],
    model: Model = ...,
    tokenizer: Tokenizer = ...,
    **options: Any,
) -> TextClassificationPipeline: ...


@overload
def pipeline(
    task: Literal["token-classification", "ner"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> TokenClassificationPipeline: ...


@overload
def pipeline(
    task: Literal["question-answering"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> QuestionAnsweringPipeline: ...


@overload
def pipeline(
    task: Literal["zero-shot-classification"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> ZeroShotClassificationPipeline: ...


@overload
def pipeline(
    task: Literal["feature-extraction"], model: Model = ..., tokenizer: Tokenizer = ..., **options: Any
) -> FeatureExtractionPipeline: ...


@overload
def pipeline(task: str | None = ..., model: Model = ..., tokenizer: Tokenizer = ..., **options: Any) -> Any: ...


def pipeline(
    task: str | None = None,
    model: Model = None,
    tokenizer: Tokenizer = None,
    *,
    device: str | int | torch.device | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    fast: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Pipeline:
    """A callable for `task`: "fill-mask", "next-sentence-prediction", "text-classification" ("sentiment-analysis"),
    "token-classification" ("ner"), "question-answering", "zero-shot-classification" or "feature-extraction"; without a
    task, that of the head which the model was saved with.

    model is a directory, a name on the Hub, or a model of the class that the task needs; for tasks that need no
    fine-tuning the default is the model bundled with minibert. tokenizer defaults to the one beside it. device: a name,
    or the number of a GPU (-1: the CPU); default a GPU if there is one, and for a ready model the place where it is.
    device_map says the same in transformers' way: one device for all, or "auto". fast: compute on `optimize(model)`;
    default for float32 on a CPU, see `Pipeline`. dtype (torch_dtype), revision, cache_dir, local_files_only, token and
    model_kwargs are arguments of `from_pretrained`. options are the task's own, and defaults for its calls (top_k=3).

    Raises ValueError for an unknown task, for a model that is not fine-tuned for it and for several devices, TypeError
    for an option that the task does not have, and what loading raises.
    """
    for name in [name for name in options if name in IGNORED]:
        value = options.pop(name)
        if IGNORED[name] is not None and value not in IGNORED[name]:
            raise ValueError(f"{name} is not for a pipeline of BERT: leave it out, got {shown(value)}")
    device = _one_device(device, device_map)
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(f"give dtype or torch_dtype, which is its older name, got {dtype} and {torch_dtype}")
    dtype = torch_dtype if dtype is None else dtype
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    task = _task_of(model, where) if task is None else ALIASES.get(task, task)
    kind = PIPELINES[check_choice("task", task, [*PIPELINES, *ALIASES])]
    if model is None and task not in PRETRAINED:
        raise ValueError(f"{task} needs a fine-tuned model: pass its directory or its name on the Hub")
    if model is None:
        model = hub.default_model()
    is_ready = isinstance(model, nn.Module)
    if tokenizer is None and is_ready:
        raise ValueError("tokenizer must be given where model is a ready model and not a name")
    if is_ready and dtype not in (None, "auto"):
        raise ValueError(f"dtype={dtype} is for a model given by name; cast a ready one with model.to(dtype)")
    if is_ready and model_kwargs:
        raise ValueError(f"model_kwargs ({', '.join(model_kwargs)}) are for a model given by name")
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = BertTokenizer.from_pretrained(model if tokenizer is None else tokenizer, **where)
    if not is_ready:
        device = chosen_device(device)
        model = kind.load(model, **{"dtype": dtype, "device": device} | where | dict(model_kwargs or {}))
        device = None  # it is there
    return kind(model, tokenizer, fast=fast, device=device, **options)


def _one_device(device: Any, device_map: Any) -> Any:
    """The device that both arguments ask for, None for none."""
    if device_map is None:
        return device
    if device is not None:
        raise ValueError(f"give device or device_map, not both, got {device!r} and {device_map!r}")
    devices = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(devices) != 1:
        raise ValueError(f"device_map must name one device for the whole model, got {device_map!r}")
    found = devices.pop()
    return None if found in ("auto", "balanced", "sequential") else found


def _task_of(model: Any, where: Mapping[str, Any]) -> str:
    """The task of a model's head."""
    if model is None:
        raise ValueError("give a task, or a model, whose head says what its task is")
    if isinstance(model, nn.Module):
        names = [cls.__name__ for cls in type(getattr(model, "get_base_model", lambda: model)()).__mro__]
    else:
        from minibert.model import BertModel

        names = load_config(BertModel.config_class, hub.as_source(model, **where), {}).architectures or []
    for name in names:
        if name in TASK_OF:
            return TASK_OF[name]
    raise ValueError(f"give a task: {model if names == [] else ', '.join(names)} does not say which it is for")

"""Text in, answers out: `pipeline("fill-mask", "bert-base-uncased")("Paris is the [MASK] of France.")`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from minibert.pipelines.base import Pipeline, batches
from minibert.pipelines.classification import TextClassificationPipeline
from minibert.pipelines.features import FeatureExtractionPipeline
from minibert.pipelines.question_answering import QuestionAnsweringPipeline
from minibert.pipelines.tagging import TokenClassificationPipeline
from minibert.pipelines.words import FillMaskPipeline, NextSentencePipeline
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub
from minibert.weights.pretrained import as_device

__all__ = ["PIPELINES", "PRETRAINED", "Pipeline", "batches", "chosen_device", "pipeline"]

PIPELINES: dict[str, type[Pipeline]] = {
    kind.task: kind
    for kind in (
        FillMaskPipeline,
        NextSentencePipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
        FeatureExtractionPipeline,
    )
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
PRETRAINED = ("fill-mask", "next-sentence-prediction", "feature-extraction")  # what needs no fine-tuning


def chosen_device(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name, or the GPU of that number (-1: the CPU); for None a GPU if there is one, else the CPU.

    Raises ValueError for one that torch does not know or that is not here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif isinstance(device, int):
        device = f"cuda:{device}" if device >= 0 else "cpu"
    return as_device(device)


def pipeline(
    task: str,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: str | os.PathLike[str] | BertTokenizer | None = None,
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    fast: bool | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **options: Any,
) -> Pipeline:
    """A callable for `task`: "fill-mask", "next-sentence-prediction", "text-classification" ("sentiment-analysis"),
    "token-classification" ("ner"), "question-answering" or "feature-extraction".

    model is a directory, a name on the Hub, or a model of the class that the task needs; for tasks that need no
    fine-tuning the default is the model bundled with minibert. tokenizer defaults to the one beside it. device: a name,
    or the number of a GPU (-1: the CPU); default a GPU if there is one, and for a ready model the place where it is.
    fast: compute on `optimize(model)`; default for float32 on a CPU, see `Pipeline`. dtype, revision, cache_dir,
    local_files_only and token are those of `from_pretrained`. options are the task's own, and defaults for its calls
    (top_k=3).

    Raises ValueError for an unknown task, and what loading raises.
    """
    task = ALIASES.get(task, task)
    if task not in PIPELINES:
        raise ValueError(f"task must be one of {', '.join(map(repr, [*PIPELINES, *ALIASES]))}; got {task!r}")
    kind = PIPELINES[task]
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    if model is None and task not in PRETRAINED:
        raise ValueError(f"{task} needs a fine-tuned model: pass its directory or its name on the Hub")
    if model is None:
        model = hub.default_model()
    if tokenizer is None and isinstance(model, nn.Module):
        raise ValueError("tokenizer must be given where model is a ready model and not a name")
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = BertTokenizer.from_pretrained(model if tokenizer is None else tokenizer, **where)
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype={dtype} is for a model given by name; cast a ready one with model.to(dtype)")
        ready = model if device is None else model.to(chosen_device(device))
        return kind(ready, tokenizer, fast=fast, **options)
    loaded = kind.load(model, dtype=dtype, device=chosen_device(device), **where)
    return kind(loaded, tokenizer, fast=fast, **options)

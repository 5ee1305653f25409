"""What a fine-tuning starts from: the encoder in float32, and a head that fits the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minibert.config import BertConfig
from minibert.embedding import SentenceEncoder
from minibert.embedding.modules import Normalize
from minibert.finetuning.examples import REGRESSION
from minibert.finetuning.sentence_pairs import SentencePairs
from minibert.finetuning.tasks import Task
from minibert.model import BertModel
from minibert.text.tokenizer import BertTokenizer


@dataclass(frozen=True)
class Start:
    """label_ids: the numbers of the labels, {} where there are none. head: a line about the head."""

    model: nn.Module
    tokenizer: BertTokenizer
    label_ids: dict[str, int]
    head: str


def longest(name: str, **where: Any) -> int:
    """How many tokens a model and its tokenizer take."""
    limit = BertConfig.from_pretrained(name, **where).max_position_embeddings
    return min(limit, BertTokenizer.from_pretrained(name, **where).model_max_length)


def open_model(
    task: Task, name: str, labels: list[str] | None, seed: int, *, device: str | None = None, **where: Any
) -> Start:
    """The model that a task trains, in float32 whatever the file holds: small steps are lost in half precision.

    The head is the model's own if it was trained for this task and knows all the labels; its numbers for them are kept
    then. Otherwise it is new, drawn from `seed`. By default the model goes to a GPU, if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(task, SentencePairs):
        return _open_encoder(task, name, device, where)
    tokenizer = BertTokenizer.from_pretrained(name, **where)
    config = BertConfig.from_pretrained(name, **where)
    torch.manual_seed(seed)
    if _keeps_head(task, config, labels):
        fields = {"problem_type": task.problem_type} if task.problem_type else {}
        model = task.model_class.from_pretrained(name, dtype=torch.float32, device=device, **fields, **where)
        return Start(model, tokenizer, {} if labels is None else dict(config.label2id), "the model's own")
    fields = _fields(task, labels)
    model = _with_new_head(task, name, fields, where).to(device)
    what = "numbers" if task.problem_type == REGRESSION else "answers"
    line = f"new, for {what if labels is None else f'{len(labels)} labels'}"
    if any(
        kind.endswith(("Classification", "QuestionAnswering", "MultipleChoice")) for kind in config.architectures or []
    ):
        known = ", ".join(list(config.label2id)[:5]) + (" ..." if len(config.label2id) > 5 else "")
        line += f"; the model's ({config.architectures[0]}: {known}) is left out"
    return Start(model, tokenizer, fields.get("label2id", {}), line)


def _keeps_head(task: Task, config: BertConfig, labels: list[str] | None) -> bool:
    if task.model_class.__name__ not in (config.architectures or []):
        return False
    if task.problem_type is None:  # of tags and of answers there is one kind
        return labels is None or set(labels) <= set(config.label2id)
    usual = REGRESSION if config.num_labels == 1 else "single_label_classification"
    if (config.problem_type or usual) != task.problem_type:
        return False
    return config.num_labels == 1 if labels is None else set(labels) <= set(config.label2id)


def _fields(task: Task, labels: list[str] | None) -> dict[str, Any]:
    """Of the config."""
    fields: dict[str, Any] = {"problem_type": task.problem_type}
    if labels is None:
        return fields | {"num_labels": 1 if task.problem_type == REGRESSION else 2}
    return fields | {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _with_new_head(task: Task, name: str, fields: dict[str, Any], where: dict[str, Any]) -> nn.Module:
    """A model whose encoder is the checkpoint's (with its pooler, if both have one), the rest newly drawn."""
    model = task.model_class(BertConfig.from_pretrained(name, **fields, **where))
    pooler = model.bert.pooler is not None
    if pooler:
        _, report = BertModel.inspect_pretrained(name, **where)
        pooler = not any(missing.startswith("pooler.") for missing in report.named("missing"))
    encoder = BertModel.from_pretrained(name, add_pooling_layer=pooler, dtype=torch.float32, **where)
    left = model.bert.load_state_dict(encoder.state_dict(), strict=False)
    unfilled = [key for key in (*left.missing_keys, *left.unexpected_keys) if pooler or not key.startswith("pooler.")]
    if unfilled:
        raise ValueError(f"{name} does not fill the encoder of {type(model).__name__}: {', '.join(unfilled[:5])}")
    return model


def _open_encoder(task: SentencePairs, name: str, device: str, where: dict[str, Any]) -> Start:
    encoder = SentenceEncoder.from_pretrained(name, dtype=torch.float32, device=device, fast=False, **where)
    if unknown := [type(module).__name__ for module in encoder.after if not isinstance(module, Normalize)]:
        raise ValueError(f"{name} has {', '.join(unknown)} behind its pooling, which fine-tuning does not train")
    if encoder.options().prompt and not encoder.pooling.include_prompt:
        raise ValueError(f"{name} leaves its prompt out of the pooling, which fine-tuning does not do")
    task.encoder = encoder
    return Start(encoder.model, encoder.tokenizer, {}, f"none: {', '.join(encoder.pooling.modes)} pooling")

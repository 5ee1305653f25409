"""What the tests of the pipelines share: tiny models in both libraries, and when results are the same."""

from __future__ import annotations

import functools

import torch
import transformers
from reference import realign, rounding

import minibert

# A task, and the class of models that it needs
HEADS = {
    "fill-mask": "BertForMaskedLM",
    "next-sentence-prediction": "BertForNextSentencePrediction",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "feature-extraction": "BertModel",
}


@functools.cache
def tolerance() -> float:
    """How far a score may be off: four times what float32 costs the logits of models of `tiny`'s sizes, here.

    The fast path rounds in another order, as does a product of fewer rows. A probability moves by at most half of what
    its logits move by, a logit itself (`function_to_apply="none"`) by all of it.
    """
    heads = ["BertForMaskedLM", "BertForNextSentencePrediction", "BertForTokenClassification"]
    return 4 * max(rounding(model_pair(head, seed, 64)[1]) for head in heads for seed in (0, 1))


def same(ours, theirs, within: float | None = None) -> bool:
    """Equal in shape, keys and their order, ids and texts; scores within rounding."""
    within = tolerance() if within is None else within
    if isinstance(theirs, float) or type(theirs).__name__ == "float32":
        return type(ours) is float and abs(ours - theirs) <= within
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key], within) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(same(*pair, within) for pair in zip(ours, theirs, strict=True))
    return type(ours) is type(theirs) and ours == theirs


def model_pair(name: str, seed: int, positions: int, **config):
    """A random model of the class `name` with sharp predictions, in both libraries: (ours, transformers')."""
    sizes = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": positions, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(transformers.BertConfig(**sizes, **config)).eval()
    ours = getattr(minibert, name)(minibert.BertConfig(**sizes, **config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return realign(ours), realign(theirs)


def tiny(name: str, vocabulary, seed: int, *, positions: int = 64, **config):
    """A random model of the class `name` with sharp predictions, and a real tokenizer, in both libraries."""
    ours, theirs = model_pair(name, seed, positions, **config)
    settings = {"model_max_length": positions}
    return (
        (ours, minibert.BertTokenizer.from_pretrained(vocabulary, **settings)),
        (theirs, transformers.BertTokenizer.from_pretrained(vocabulary, **settings)),
    )


def pipelines(task: str, name: str, vocabulary, seed: int = 0, options: dict | None = None, **config):
    """The same pipeline in both libraries."""
    ours, theirs = tiny(name, vocabulary, seed, **config)
    reference = transformers.pipeline(task, model=theirs[0], tokenizer=theirs[1], **(options or {}))
    return minibert.pipeline(task, *ours, **(options or {})), reference

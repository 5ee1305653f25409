"""The flows of the three notebooks that minibert was asked to reproduce, as `minibert demo` shows them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minibert.heads import BertForNextSentencePrediction, BertForPreTraining, NextSentence
from minibert.pipelines import chosen_device, pipeline
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub

FILL_MASK = "If you don't [MASK] at the sign, you will get a ticket."
NEXT_SENTENCE = (
    "Deliver huge imporvements to your machine learning pipelines without spending hours fine-tuning parameters!",
    "This book's practical case-studies reveal feature engineering techniques that upgrade your data "
    "wrangling-and optimization.",
)
PRETRAINING = (
    "After Abraham Lincoln won the November 1860 presidential election on an anti-slavery platform, an initial seven "
    "slave states declared their secession from the country to form the Confederacy.",
    "War broke out in April 1861 when secessionist forces attacked Fort Sumter in South Carolina, just over a month "
    "after Lincoln's inauguration.",
)
PRETRAINING_MASKED = ("election", "attacked")  # the words whose first tokens are masked


def run(
    model: str | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The three flows: on `model`, else on the Hub's bert-base where it can be had, else on the bundled model."""
    cased, uncased = (model, model) if model else _bert_base_or_bundled()
    where: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": chosen_device(device)}
    tokenizer = BertTokenizer.from_pretrained(uncased, revision=revision)

    judge = BertForNextSentencePrediction.from_pretrained(uncased, **where)
    inputs = tokenizer(*NEXT_SENTENCE, return_tensors="pt").to(judge.device)
    labels = []
    with torch.inference_mode():
        for label in NextSentence:
            out = judge(**inputs, labels=torch.tensor([label], device=judge.device))
            labels.append({"label": label.name, "logit": out.logits[0, label].item(), "loss": out.loss.item()})

    ids = tokenizer(*PRETRAINING)["input_ids"]
    first_ids = dict.fromkeys(tokenizer.encode(word, add_special_tokens=False)[0] for word in PRETRAINING_MASKED)
    masked = [ids.index(first) for first in first_ids]
    losses = pretraining_loss(BertForPreTraining.from_pretrained(uncased, **where), tokenizer, *PRETRAINING, masked)
    return {
        "fill_mask": {
            "model": cased,
            "text": FILL_MASK,
            "answers": pipeline("fill-mask", cased, **where)(FILL_MASK),
        },
        "next_sentence": {"model": uncased, "texts": NEXT_SENTENCE, "labels": labels},
        "pretraining": {"model": uncased, "texts": PRETRAINING, **losses},
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The result of `run`, to be read."""
    flow = result["fill_mask"]
    found = [f"fill-mask with {Path(flow['model']).name}", f"  {flow['text']}"]
    found += [f"  {answer['score']:.4f}  {answer['token_str']}" for answer in flow["answers"]]

    flow = result["next_sentence"]
    found += ["", f"next sentence with {Path(flow['model']).name}", *_pair_lines(flow["texts"])]
    for each in flow["labels"]:
        found += [f"  logit {each['logit']:8.4f}, loss if the label is {each['label']}: {each['loss']:.4e}"]

    flow = result["pretraining"]
    what = f"{' and '.join(PRETRAINING_MASKED)} masked, every token a label"
    found += ["", f"pretraining with {Path(flow['model']).name}: {what}", *_pair_lines(flow["texts"])]
    found += [f"  {key} {flow[key]}" for key in ("prediction_logits", "seq_relationship_logits")]
    found += [f"  {key:8}  {flow[key]:.4f}" for key in ("loss", "mlm_loss", "nsp_loss")]
    for mask in flow["masked"]:
        found += [f"  position {mask['position']}: {mask['token']} has probability {mask['probability']:.4f}"]
    return found


def _pair_lines(texts: Sequence[str]) -> list[str]:
    return [f"  {name}: {text}" for name, text in zip("AB", texts, strict=True)]


def _bert_base_or_bundled() -> tuple[str, str]:
    """Names of a cased and an uncased model."""
    names = ("bert-base-cased", "bert-base-uncased")
    offline = not hub.is_reachable()
    for name in names:
        try:  # what the cache holds needs no Hub
            hub.fetch_weights(name, local_files_only=offline)
        except OSError:
            bundled = hub.default_model()
            warnings.warn(
                f"{name} is not in the cache and the Hub cannot be reached: this is minibert's own small model",
                stacklevel=3,
            )
            return bundled, bundled
    return names


def pretraining_loss(
    model: BertForPreTraining,
    tokenizer: BertTokenizer,
    text: str,
    text_pair: str,
    masked: Sequence[int] = (),
    label: NextSentence = NextSentence.IS_NEXT,
) -> dict[str, Any]:
    """Both losses on one pair where every token is a label, as in the notebook; the logits; each [MASK]'s best guess.

    masked: numbers of the tokens to be replaced by [MASK]. Raises ValueError for one that is not there.
    """
    inputs = tokenizer(text, text_pair, return_tensors="pt").to(model.device)
    labels = inputs["input_ids"].clone()  # (1, T)
    T = labels.shape[1]
    for position in masked:
        if not 0 <= position < T:
            raise ValueError(f"mask position {position}: the pair has the tokens 0 to {T - 1}")
        inputs["input_ids"][0, position] = tokenizer.mask_token_id
    with torch.inference_mode():
        out = model(**inputs, labels=labels, next_sentence_label=torch.tensor([label], device=model.device))
    probabilities = out.prediction_logits[0].float().softmax(-1)  # (T, V)
    return {
        "loss": out.loss.item(),
        "mlm_loss": out.mlm_loss.item(),
        "nsp_loss": out.nsp_loss.item(),
        "tokens": T,
        "prediction_logits": out.prediction_logits,
        "seq_relationship_logits": out.seq_relationship_logits,
        "masked": [
            {
                "position": position,
                "token": tokenizer.decode([labels[0, position].item()]),
                "probability": probabilities[position, labels[0, position]].item(),
                "predicted": tokenizer.decode([probabilities[position].argmax().item()]),
            }
            for position in masked
        ],
    }

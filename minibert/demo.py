"""The flows of the three notebooks that minibert was asked to reproduce, as `minibert demo` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minibert.heads import BertForNextSentencePrediction, BertForPreTraining, NextSentence
from minibert.pipelines import pipeline
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


def run(model: str | None = None) -> None:
    """Print the three flows: on `model`, else on the Hub's bert-base where it can be had, else on the bundled model."""
    cased, uncased = (model, model) if model else _bert_base_or_bundled()
    print(f"fill-mask with {Path(cased).name}\n  {FILL_MASK}")
    for answer in pipeline("fill-mask", cased)(FILL_MASK):
        print(f"  {answer['score']:.4f}  {answer['token_str']}")

    tokenizer = BertTokenizer.from_pretrained(uncased)
    print(f"\nnext sentence with {Path(uncased).name}\n  A: {NEXT_SENTENCE[0]}\n  B: {NEXT_SENTENCE[1]}")
    judge = BertForNextSentencePrediction.from_pretrained(uncased)
    inputs = tokenizer(*NEXT_SENTENCE, return_tensors="pt")
    with torch.inference_mode():
        for label in NextSentence:
            out = judge(**inputs, labels=torch.tensor([label]))
            print(f"  logit {out.logits[0, label]:8.4f}, loss if the label is {label.name}: {out.loss:.4e}")

    print(f"\npretraining with {Path(uncased).name}: {' and '.join(PRETRAINING_MASKED)} masked, every token a label")
    print(f"  A: {PRETRAINING[0]}\n  B: {PRETRAINING[1]}")
    ids = tokenizer(*PRETRAINING)["input_ids"]
    first_ids = dict.fromkeys(tokenizer.encode(word, add_special_tokens=False)[0] for word in PRETRAINING_MASKED)
    masked = [ids.index(first) for first in first_ids]
    result = pretraining_loss(BertForPreTraining.from_pretrained(uncased), tokenizer, *PRETRAINING, masked)
    for key in ("prediction_logits", "seq_relationship_logits"):
        print(f"  {key} {result.pop(key)}")
    for key in ("loss", "mlm_loss", "nsp_loss"):
        print(f"  {key:8}  {result[key]:.4f}")
    for mask in result["masked"]:
        print(f"  position {mask['position']}: {mask['token']} has probability {mask['probability']:.4f}")


def _bert_base_or_bundled() -> tuple[str, str]:
    """Names of a cased and an uncased model."""
    names = ("bert-base-cased", "bert-base-uncased")
    offline = not hub.is_reachable()
    for name in names:
        try:  # what the cache holds needs no Hub
            hub.fetch_weights(name, local_files_only=offline)
        except OSError:
            bundled = hub.default_model()
            print(f"{name} is not in the cache and the Hub cannot be reached.\nThis is minibert's own small model.\n")
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
    inputs = tokenizer(text, text_pair, return_tensors="pt")
    labels = inputs["input_ids"].clone()  # (1, T)
    T = labels.shape[1]
    for position in masked:
        if not 0 <= position < T:
            raise ValueError(f"mask position {position}: the pair has the tokens 0 to {T - 1}")
        inputs["input_ids"][0, position] = tokenizer.mask_token_id
    with torch.inference_mode():
        out = model(**inputs, labels=labels, next_sentence_label=torch.tensor([label]))
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

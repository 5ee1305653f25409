"""How good is a pretraining model on a text it has not seen?

    python benchmarks/bundled_model.py [--model NAME] [--text FILE] [--seed 0] [--save]

One pass over the text: pairs of up to 128 tokens, half of them random, 15% of the tokens to predict. Beside the model:
always the most frequent token, by the text's own counts (which flatters this baseline); and always the more frequent
answer to "next sentence?". Ten everyday sentences show what the model makes of a gap.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import RESULTS
from torch import Tensor

from minibert.heads import BertForPreTraining
from minibert.pipelines import pipeline
from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.loss import PretrainingLoss
from minibert.pretraining.order import plan_batches
from minibert.pretraining.pairs import PairRules
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub

TEXT = Path(__file__).parents[2] / "shared" / "corpus" / "validation.txt.xz"
SENTENCES = (
    "The capital of France is [MASK].",
    "She opened the [MASK] and went into the house.",
    "He has not eaten all day and is very [MASK].",
    "In winter it is [MASK] and the days are short.",
    "The king and the [MASK] lived in a castle.",
    "Water is made of hydrogen and [MASK].",
    "I would like a cup of [MASK], please.",
    "The doctor told the [MASK] to stay in bed.",
    "They sailed across the [MASK] in a small ship.",
    "Two and two make [MASK].",
)


@torch.no_grad()
def evaluate(model: BertForPreTraining, corpus: Corpus, seed: int, batches: int | None = None) -> dict[str, float]:
    """Losses, accuracies and counts over one pass, or the first batches of it."""
    rules = PairRules(max_length=min(128, model.config.max_position_embeddings), seed=seed)
    maker, loss, sums, labels, nexts = BatchMaker(corpus, rules), PretrainingLoss(model.eval()), torch.zeros(4), [], []
    for plan in plan_batches(corpus, rules, 32):
        batch = maker[plan]
        sums += loss(**vars(batch))
        labels.append(batch.masked_labels[batch.masked_labels >= 0])
        nexts.append(batch.next_sentence_label)
        if plan.after.epoch or len(nexts) == batches:
            break
    tokens, pairs = torch.cat(labels), torch.cat(nexts)
    mlm_loss, words, nsp_loss, right = (sums.double() / torch.tensor([len(tokens)] * 2 + [len(pairs)] * 2)).tolist()
    unigram_accuracy, unigram_loss = unigram(tokens, corpus)
    return {
        "pairs": len(pairs),
        "predicted_tokens": len(tokens),
        "mlm_accuracy": words,
        "unigram_accuracy": unigram_accuracy,
        "mlm_loss": mlm_loss,
        "unigram_loss": unigram_loss,
        "perplexity": math.exp(mlm_loss),
        "nsp_accuracy": right,
        "majority_accuracy": max(float(pairs.double().mean()), 1 - float(pairs.double().mean())),
        "nsp_loss": nsp_loss,
    }


def unigram(labels: Tensor, corpus: Corpus) -> tuple[float, float]:
    """Accuracy and loss of predicting every token from how often tokens occur in the text."""
    everything = corpus.tokens(0, int(corpus.sentences[-1]))
    counts = torch.from_numpy(np.bincount(everything, minlength=corpus.vocab_size)) + 1.0
    shares = counts / counts.sum()
    return float((labels == shares.argmax()).double().mean()), float(-shares.log()[labels].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the Hub; default: the bundled model")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--batches", type=int, help="of 32 pairs, instead of one pass over the text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write results/bundled_model.json")
    arguments = parser.parse_args()
    name = arguments.model or hub.default_model()
    model = BertForPreTraining.from_pretrained(name).float()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = BertTokenizer.from_pretrained(name)
        corpus = build_corpus(arguments.text, Path(directory) / "corpus", tokenizer, num_workers=1)
        result = evaluate(model, corpus, arguments.seed, arguments.batches)
    for key, value in result.items():
        print(f"{key:20} {value:,.4f}" if isinstance(value, float) else f"{key:20} {value:,}")
    fill_mask = pipeline("fill-mask", name)
    answers = {text: [answer["token_str"] for answer in fill_mask(text)] for text in SENTENCES}
    for text, words in answers.items():
        print(f"{text:55} {', '.join(words)}")
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "bundled_model.json").write_text(json.dumps(result | {"sentences": answers}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One pretraining step of bert-base: minibert against transformers, on the same pairs.

    python benchmarks/training.py [--batch 16] [--rounds 3] [--bf16] [--compile] [--lengths full natural] [--save]
    python benchmarks/training.py --memory

A step is loss, gradients, clipping and a fused AdamW, with dropout, on both sides. transformers gets its pairs padded
to the longest, as its collators do; minibert packs them. At `full` length there is nothing to pad: every pair has 128
tokens. At `natural` lengths a pair is two sentences as they stand in the text; the ratio to beat is the padding factor,
places by tokens. `--memory` measures the peak of each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Contender, append, compare

import minibert
from minibert.heads import IGNORED
from minibert.pretraining import order
from minibert.pretraining import pairs as pairing
from minibert.pretraining.batches import Batch, BatchMaker
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.loop import Run, Settings
from minibert.pretraining.order import Plan, Position
from minibert.pretraining.pairs import PairRules
from minibert.pretraining.vocabulary import train_vocab
from minibert.training.optimizer import make_optimizer

RULES = PairRules(max_length=128, short_probability=0.0)
TEXT = Path(__file__).parents[2] / "shared" / "corpus" / "validation.txt.xz"


@contextlib.contextmanager
def open_corpus(text: Path) -> Iterator[Corpus]:
    """The text with a WordPiece vocabulary of its own; ids stay below bert-base's 30522."""
    with tempfile.TemporaryDirectory() as directory:
        vocab = train_vocab(text, Path(directory) / "vocab.txt", vocab_size=20_000, progress=False)
        yield build_corpus(text, Path(directory) / "corpus", vocab, progress=False)


def full_pairs(corpus: Corpus, count: int) -> np.ndarray:
    pairs = pairing.plan_pairs(corpus, np.arange(len(corpus.documents) - 1), RULES, np.random.default_rng(0))
    return pairs[pairing.lengths_of(pairs) == RULES.max_length][:count].copy()


def natural_pairs(corpus: Corpus, count: int) -> np.ndarray:
    """Neighbouring sentences, from places all over the corpus."""
    first = np.random.default_rng(0).choice(len(corpus.sentences) - 3, count, replace=False)
    pairs = np.zeros(count, pairing.PAIR)
    pairs["a"], pairs["b"] = corpus.sentences[first], corpus.sentences[first + 1]
    pairs["a_length"], pairs["b_length"] = pairs["b"] - pairs["a"], corpus.sentences[first + 2] - pairs["b"]
    pairing._truncate(pairs, RULES.max_length - 3, np.random.default_rng(0))
    return pairs


def batches(corpus: Corpus, lengths: str, count: int) -> tuple[Batch, Batch]:
    """The same pairs padded and packed."""
    pairs = (full_pairs if lengths == "full" else natural_pairs)(corpus, count)
    pairs["number"] = np.arange(count)
    pairs["row"], pairs["column"] = np.arange(count), 0
    padded = BatchMaker(corpus, RULES)[Plan(pairs, count, 0, 0, Position())]
    if lengths == "full":
        return padded, padded
    rows = np.concatenate(order._pack(pairs.copy(), 1, RULES.max_length, np.random.default_rng(0)))
    rows["row"] = np.cumsum(rows["column"] == 0) - 1
    packed = BatchMaker(corpus, RULES, packed=True)[Plan(rows, int(rows["row"].max()) + 1, 0, 0, Position())]
    return padded, packed


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The arguments of a model's own forward, for a padded batch."""
    labels = torch.full_like(batch.input_ids, IGNORED).flatten()
    labels[batch.masked_positions] = batch.masked_labels
    masks = {"attention_mask": (batch.pair > 0).long(), "labels": labels.view_as(batch.input_ids)}
    names = ("input_ids", "token_type_ids", "next_sentence_label")
    return {name: getattr(batch, name) for name in names} | masks


def transformers_step(batch: Batch, bf16: bool) -> Callable[[], Any]:
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig()).train()
    optimizer = make_optimizer(model, 1e-4, 0.01, (0.9, 0.999), 1e-6)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**model_inputs(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def minibert_step(batch: Batch, corpus: Corpus, directory: str, bf16: bool, **options: Any) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = minibert.BertForPreTraining(minibert.BertConfig())
    settings = Settings(bf16=bf16, packed=batch.packed, **options)
    run = Run(model, corpus, directory, rules=RULES, settings=settings, progress=False)
    run.loss.train()
    return lambda: run.train_step([batch])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lengths", nargs="+", default=["full", "natural"], choices=["full", "natural"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="add minibert compiled")
    parser.add_argument("--memory", action="store_true", help="measure peaks of memory instead")
    parser.add_argument("--only", choices=["transformers", "minibert"], help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="append to results/training.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        show_memory(sys.argv[1:])
        return
    with open_corpus(arguments.text) as corpus, tempfile.TemporaryDirectory() as directory:
        for lengths in arguments.lengths:
            padded, packed = batches(corpus, lengths, arguments.batch)
            makers = {
                "transformers": lambda padded=padded: transformers_step(padded, arguments.bf16),
                "minibert": lambda packed=packed: minibert_step(packed, corpus, directory, arguments.bf16),
            }
            if arguments.compile:
                makers["minibert compiled"] = lambda packed=packed: minibert_step(
                    packed, corpus, directory, arguments.bf16, compile=True
                )
            if arguments.only:
                makers[arguments.only]()()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                print(json.dumps({"lengths": lengths, "peak_mib": peak // 1024}))
                continue
            factor = padded.pair.numel() / padded.tokens
            shape = (
                f"{lengths}, {arguments.batch} pairs, {padded.tokens} tokens, {'bf16' if arguments.bf16 else 'fp32'}"
            )
            contenders = [Contender(name, make()) for name, make in makers.items()]
            table = compare("training", shape, contenders, "transformers", arguments.rounds, padding=round(factor, 3))
            for row in table[1:]:
                print(f"  {row['contender']}: {row['ratio'] / factor:.2f} x beyond the padding factor {factor:.2f}")
            if arguments.save:
                append(table, RESULTS / "training.csv")


def show_memory(options: list[str]) -> None:
    """Peak memory of three steps' processes, one of each library."""
    options = [option for option in options if option not in ("--memory", "--save")]
    peaks = {}
    for name in ("transformers", "minibert"):
        command = [sys.executable, __file__, "--only", name, "--lengths", "full", *options]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        peaks[name] = json.loads(lines[-1])["peak_mib"]
        print(f"{name:14} {peaks[name]:7,} MiB")
    print(f"minibert takes {peaks['minibert'] / peaks['transformers']:.2f} x of it")


if __name__ == "__main__":
    main()

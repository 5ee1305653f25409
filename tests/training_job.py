"""A small pretraining run, as a program: for tests that kill it, or start several processes of it with torchrun."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from minibert.config import BertConfig
from minibert.heads import IGNORED, BertForPreTraining
from minibert.pretraining.batches import Batch
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.loop import Run, Settings
from minibert.pretraining.pairs import PairRules
from minibert.pretraining.vocabulary import SPECIAL_TOKENS
from minibert.training.distributed import world

RULES = PairRules(max_length=32, short_probability=0.3)


def make_corpus(directory: Path, documents: int = 12, sentences: int = 6) -> Corpus:
    """Documents of four words each, always in the same cycle: what is masked and what comes next can be told."""
    words = [a + b for a in "bcdfghjklm" for b in "aeiou"]
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words, "."]) + "\n")
    text = []
    for i in range(documents):
        own = words[4 * i : 4 * i + 4]
        text.append("\n".join(" ".join([*own[j % 4 :], *own[: j % 4], "."]) for j in range(sentences)))
    (directory / "text.txt").write_text("\n\n".join(text))
    return build_corpus(
        directory / "text.txt", directory / "corpus", directory / "vocab.txt", num_workers=1, progress=False
    )


def make_model(corpus: Corpus, dropout: float = 0.1, **changes: Any) -> BertForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    fields = {"vocab_size": corpus.vocab_size, "max_position_embeddings": 32, **sizes, **rates, **changes}
    return BertForPreTraining(BertConfig(**fields))


def labels_of(batch: Batch) -> torch.Tensor:
    """(R, T): the masked labels in their places, -100 elsewhere."""
    labels = torch.full_like(batch.input_ids, IGNORED).flatten()
    labels[batch.masked_positions] = batch.masked_labels  # left-over positions are a [CLS], which has no label
    return labels.view_as(batch.input_ids)


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The arguments of `BertForPreTraining` and of its like elsewhere; of a batch with one pair a row."""
    names = ("input_ids", "token_type_ids", "next_sentence_label")
    masks = {"attention_mask": (batch.pair > 0).long(), "labels": labels_of(batch)}
    return {name: getattr(batch, name) for name in names} | masks


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus")
    parser.add_argument("output")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--send", type=int, default=signal.SIGKILL)
    parser.add_argument("--rank", type=int, help="of several processes, the one that gets the signal; default: all")
    for name in ("steps", "save-every", "accumulate", "rows"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dropout", type=float, default=0.1)
    for name in ("packed", "fsdp", "gradient-checkpointing", "double"):
        parser.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__ and value}
    settings = Settings(**{"warmup_steps": 3, "learning_rate": 1e-2, "log_every": 1, "validate_every": 5, **given})
    corpus = Corpus(arguments.corpus)
    with world() as here:
        model = make_model(corpus, arguments.dropout).to(torch.float64 if arguments.double else torch.float32)
        run = Run(model, corpus, arguments.output, rules=RULES, settings=settings, validation=corpus, world=here)
        if arguments.resume:
            run.resume()
        step = run.train_step

        def step_and_die(batches):
            result = step(batches)
            if run.step == arguments.kill_at and arguments.rank in (None, here.rank):
                os.kill(os.getpid(), arguments.send)
            return result

        run.train_step = step_and_die
        run.fit()


if __name__ == "__main__":
    main()

"""`minibert pretrain`: from text files to a model that every other command can load.

The directory of a run: data/ (vocabulary and tokenized text), checkpoint.pt, metrics.jsonl, curves.png, model/.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.terminal import INTERRUPTED, notice, show, shows_progress

if TYPE_CHECKING:  # torch takes its time: the command line must not wait for it to print its help
    from minibert.heads import BertForPreTraining
    from minibert.pretraining.corpus import Corpus
    from minibert.pretraining.loop import Run

NUMBERS: dict[str, Any] = {
    # option: (type, help); those not given keep the defaults of Settings and PairRules
    "steps": (int, "updates in all (100000)"),
    "rows": (int, "rows of a batch, over all processes (32); a row is a pair, or several with --packed"),
    "accumulate": (int, "compute a process's rows in this many parts (1)"),
    "learning-rate": (float, "peak of the schedule (1e-4)"),
    "warmup-steps": (int, "linear warm-up (10000, or a tenth of the steps if that is less)"),
    "weight-decay": (float, "of all but biases and LayerNorms (0.01)"),
    "clip-norm": (float, "largest norm of the gradient (1.0)"),
    "epsilon": (float, "AdamW's (1e-6)"),
    "workers": (int, "processes that make batches (0: the training process does)"),
    "save-every": (int, "steps between checkpoints (1000)"),
    "validate-every": (int, "steps between validations (1000)"),
    "validation-rows": (int, "rows of a validation (1024)"),
    "log-every": (int, "steps between lines of metrics.jsonl (20)"),
    "max-length": (int, "tokens of an example (128)"),
    "short-probability": (float, "share of examples of a random shorter length (0.1)"),
    "masked": (float, "share of tokens to predict (0.15)"),
    "seed": (int, "decides pairs, masks, dropout and initial weights (0)"),
}
SWITCHES = {
    "packed": "put several short pairs into one row",
    "whole-words": "mask whole words",
    "bf16": "compute in bfloat16 where that is safe (autocast)",
    "compile": "use torch.compile: slow to start, then faster",
    "gradient-checkpointing": "use less memory and more time",
    "dense": "project every position onto the vocabulary, as transformers does, to the bit; slower",
    "fsdp": "under torchrun: shard the parameters (FSDP2) instead of replicating them (DDP)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert pretrain`."""
    parser.add_argument(
        "text", nargs="+", help="text files (.txt, .gz, .xz): a sentence a line, a blank line between documents"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the run keeps everything")
    parser.add_argument("--validation", nargs="+", default=[], metavar="TEXT", help="text files to validate on")
    parser.add_argument("--prose", action="store_true", help="the text is running prose: find the sentences in it")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output, with this schedule")
    start = parser.add_argument_group("what to start from")
    start.add_argument("--init", metavar="NAME", help="continue from this model, with its vocabulary")
    start.add_argument("--vocab", metavar="FILE", help="a vocab.txt to use (default: one is trained on the text)")
    start.add_argument("--vocab-size", type=int, default=30522, help="pieces of the vocabulary to train (30522)")
    start.add_argument("--cased", action="store_true", help="keep capitals and accents")
    start.add_argument("--size", default="base", help="tiny, mini, small, medium, base (default) or large")
    start.add_argument("--layers", type=int, help="instead of the size's")
    start.add_argument("--hidden-size", type=int, help="instead of the size's; heads have 64 dimensions")
    start.add_argument("--initializer-range", type=float, default=0.02, help="spread of new weights (0.02)")
    start.add_argument(
        "--neighbours", action="store_true", help="start with heads that look at neighbouring tokens: learns sooner"
    )
    start.add_argument("--dropout", type=float, default=0.1, help="of hidden states and attention (0.1)")
    training = parser.add_argument_group("training")
    training.add_argument("--betas", type=float, nargs=2, metavar="B", help="AdamW's (0.9 0.999)")
    for name, (kind, text) in NUMBERS.items():
        training.add_argument(f"--{name}", type=kind, help=text)
    for name, text in SWITCHES.items():
        training.add_argument(f"--{name}", action="store_true", default=None, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Pretrain a model with MLM and NSP on text files, from scratch or from a checkpoint.

    Stop it with Ctrl-C or SIGTERM and go on with --resume; on several GPUs or machines start it with
    `torchrun --nproc-per-node N -m minibert pretrain ...`.
    """
    from minibert.pretraining.data import report
    from minibert.pretraining.loop import CHECKPOINT, Run
    from minibert.training.distributed import world

    output = Path(arguments.output)
    if (output / CHECKPOINT).is_file() and not arguments.resume:
        raise ValueError(f"{output} already holds a run: give --resume to go on with it, or another --output")
    rules, settings = settings_of(arguments)
    with world() as here:
        if here.is_first:
            prepare(arguments, output / "data")
        here.wait()
        corpus, validation = open_corpora(arguments, output / "data")
        if here.is_first:
            notice(arguments, f"{corpus.report}\n{report(corpus, rules, settings.rows, packed=settings.packed)}")
        model = make_model(arguments, corpus, rules.max_length, rules.seed)
        job = Run(
            model,
            corpus,
            output,
            rules=rules,
            settings=settings,
            validation=validation,
            world=here,
            progress=shows_progress(arguments),
        )
        if arguments.resume:
            job.resume()
        finished = job.fit()
        export(job, output / "model")
        if here.is_first:
            draw(arguments, output)
            result = {"finished": finished, "step": job.step, "model": str(output / "model")}
            state = "finished" if finished else "stopped"
            show(arguments, result, [f"{state} at step {job.step:,}: {output / 'model'}"])
    return 0 if finished else INTERRUPTED


def settings_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """PairRules and Settings with what was given on the command line."""
    from dataclasses import fields

    from minibert.pretraining.data import PairRules
    from minibert.pretraining.loop import Settings

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if "warmup_steps" not in given and "steps" in given:
        given["warmup_steps"] = min(10_000, given["steps"] // 10)
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    return tuple(
        cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given}) for cls in (PairRules, Settings)
    )


def prepare(arguments: argparse.Namespace, data: Path) -> None:
    """Vocabulary and tokenized text, unless they are there."""
    from minibert.pretraining.corpus import build_corpus, train_vocab
    from minibert.text.tokenizer import BertTokenizer

    vocab, lowercase = data / "vocab.txt", not arguments.cased
    data.mkdir(parents=True, exist_ok=True)
    if arguments.init:
        tokenizer = BertTokenizer.from_pretrained(arguments.init)
        tokenizer.save_pretrained(data)
        lowercase = tokenizer.do_lower_case
    elif arguments.vocab:
        shutil.copyfile(arguments.vocab, vocab)
    elif not vocab.is_file():
        train_vocab(
            arguments.text,
            vocab,
            vocab_size=arguments.vocab_size,
            lowercase=lowercase,
            progress=shows_progress(arguments),
        )
    for name, files in (("train", arguments.text), ("validation", arguments.validation)):
        if files:
            build_corpus(
                files,
                data / name,
                vocab,
                lowercase=lowercase,
                prose=arguments.prose,
                progress=shows_progress(arguments),
            )


def open_corpora(arguments: argparse.Namespace, data: Path) -> tuple[Corpus, Corpus | None]:
    from minibert.pretraining.corpus import Corpus

    return Corpus(data / "train"), Corpus(data / "validation") if arguments.validation else None


def make_model(arguments: argparse.Namespace, corpus: Corpus, max_length: int, seed: int) -> BertForPreTraining:
    """A new model, or the one to continue from."""
    import torch

    from minibert.config import BertConfig
    from minibert.heads import BertForPreTraining
    from minibert.pretraining.initial import look_at_neighbours

    if arguments.init:
        if arguments.neighbours:
            raise ValueError("--neighbours is for a start from scratch: leave it or --init out")
        return BertForPreTraining.from_pretrained(arguments.init)
    changes = {"vocab_size": corpus.vocab_size, "max_position_embeddings": max_length}
    changes["initializer_range"] = arguments.initializer_range
    changes |= {"hidden_dropout_prob": arguments.dropout, "attention_probs_dropout_prob": arguments.dropout}
    if arguments.layers:
        changes["num_hidden_layers"] = arguments.layers
    if arguments.hidden_size:
        heads = max(1, arguments.hidden_size // 64)
        changes |= {"hidden_size": arguments.hidden_size, "num_attention_heads": heads}
        changes["intermediate_size"] = 4 * arguments.hidden_size
    torch.manual_seed(seed)
    model = BertForPreTraining(BertConfig.named(arguments.size, **changes))
    if arguments.neighbours:
        look_at_neighbours(model)
    return model


def export(job: Run, directory: Path) -> None:
    """Write the model with its tokenizer, as `from_pretrained` reads them."""
    from dataclasses import replace

    from minibert.heads import BertForPreTraining
    from minibert.text.tokenizer import BertTokenizer
    from minibert.training.distributed import state_of

    state = state_of(job.model, job.optimizer)
    if not job.world.is_first:
        return
    model = BertForPreTraining(replace(job.model.config, architectures=["BertForPreTraining"]))
    model.load_state_dict({name: values["value"] for name, values in state.items()}, strict=False)
    model.save_pretrained(directory)
    tokenizer = BertTokenizer(
        job.corpus.vocab_file,
        do_lower_case=job.corpus.lowercase,
        model_max_length=model.config.max_position_embeddings,
    )
    tokenizer.save_pretrained(directory)


def draw(arguments: argparse.Namespace, output: Path) -> None:
    from minibert.training.curves import plot_curves

    try:
        plot_curves(output / "metrics.jsonl", output / "curves.png")
    except ImportError:
        notice(arguments, "no curves.png: matplotlib is not installed")

"""`minibert pretrain`: from text files to a model that every other command can load.

The directory of a run: run.json, data/ (vocabulary and tokenized text), checkpoint.pt, metrics.jsonl, curves.png and
model/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.terminal import notice, show, shows_progress

if TYPE_CHECKING:  # torch takes its time: the command line must not wait for it to print its help
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
NOT_SETTINGS = frozenset(("output", "resume", "run", "json", "quiet", "traceback"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert pretrain`. None has a default here: what is given can be told from it."""
    parser.add_argument(
        "text", nargs="*", help="text files (.txt, .gz, .xz): a sentence a line, a blank line between documents"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the run keeps everything")
    parser.add_argument("--validation", nargs="+", metavar="TEXT", help="text files to validate on")
    prose = "the text is running prose in English: find the sentences in it, by rules that know no other language"
    parser.add_argument("--prose", **_switch(prose))
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output, which knows its settings; more steps or another schedule may be given",
    )
    start = parser.add_argument_group("what to start from")
    start.add_argument("--init", metavar="NAME", help="continue from this model, with its tokenizer")
    start.add_argument("--vocab", metavar="FILE", help="a vocab.txt to use (default: one is trained on the text)")
    start.add_argument("--vocab-size", type=int, help="pieces of the vocabulary to train (30522)")
    start.add_argument(
        "--limit-alphabet",
        type=int,
        help="characters of the vocabulary to train (1000, more where a script has more)",
    )
    start.add_argument(
        "--max-unknown", type=float, help="largest share of tokens that the vocabulary may not know (0.05)"
    )
    start.add_argument("--cased", **_switch("keep capitals and accents"))
    start.add_argument("--size", help="tiny, mini, small, medium, base (default) or large")
    start.add_argument("--layers", type=int, help="instead of the size's")
    start.add_argument("--hidden-size", type=int, help="instead of the size's; heads have 64 dimensions")
    start.add_argument("--initializer-range", type=float, help="spread of new weights (0.02)")
    neighbours = "start with heads that look at neighbouring tokens: learns sooner"
    start.add_argument("--neighbours", **_switch(neighbours))
    start.add_argument("--dropout", type=float, help="of hidden states and attention (0.1)")
    training = parser.add_argument_group("training")
    training.add_argument("--betas", type=float, nargs=2, metavar="B", help="AdamW's (0.9 0.999)")
    for name, (kind, text) in NUMBERS.items():
        training.add_argument(f"--{name}", type=kind, help=text)
    for name, text in SWITCHES.items():
        training.add_argument(f"--{name}", **_switch(text))


def _switch(text: str) -> dict[str, Any]:
    return {"action": argparse.BooleanOptionalAction, "default": None, "help": text}


def run(arguments: argparse.Namespace) -> int:
    """Pretrain a model with MLM and NSP on text files, from scratch or from a checkpoint.

    Stop it with Ctrl-C or SIGTERM (exit status 130 or 143) and go on with `minibert pretrain --resume --output DIR`; on
    several GPUs or machines start it with `torchrun --nproc-per-node N -m minibert pretrain ...`.
    """
    from minibert.pretraining import prepare
    from minibert.pretraining.loop import Run
    from minibert.training.distributed import world
    from minibert.training.run import RunDirectory, exit_status

    named = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    given = {name: value for name, value in named.items() if value is not None and value != []}
    progress = shows_progress(arguments)
    with world() as here:
        directory = RunDirectory(arguments.output, writes=here.is_first)
        plan = prepare.plan(given, directory, resume=arguments.resume, processes=here.size)
        with directory.held():
            directory.record(plan.settled)
            here.first("data", lambda: prepare.make_data(plan, directory, progress))
            corpus, validation = prepare.open_corpora(plan, directory)
            if here.is_first:
                notice(arguments, "\n".join([*plan.settled.changes, prepare.described(plan, corpus)]))
            state = directory.load() if plan.settled.resumes and directory.has_checkpoint else None
            model = prepare.make_model(plan, corpus, state)
            settings = {"rules": plan.rules, "settings": plan.training, "validation": validation}
            job = Run(model, corpus, directory, **settings, world=here, progress=progress)
            if state is not None:
                job.resume(state)
            with job.stop:  # a second signal must not tear what the first one has begun
                finished = job.fit()
                finish(arguments, job, finished)
                here.wait()
    return 0 if finished else exit_status(job.stopped_by)


def finish(arguments: argparse.Namespace, job: Run, finished: bool) -> None:
    """Write the model and the curves, and say how it ended."""
    output = job.directory.path
    export(job, output / "model")
    if job.world.is_first:
        draw(arguments, output)
        result = {"finished": finished, "step": job.step, "model": str(output / "model")}
        lines = [f"{'finished' if finished else 'stopped'} at step {job.step:,}: {output / 'model'}"]
        if not finished:
            lines.append(f"go on with: minibert pretrain --resume --output {output}")
        show(arguments, result, lines)


def export(job: Run, directory: Path) -> None:
    """Write the model with its tokenizer, as `from_pretrained` reads them."""
    from dataclasses import replace

    from minibert.heads import BertForPreTraining
    from minibert.training.distributed import state_of

    state = state_of(job.model, job.optimizer)
    if not job.world.is_first:
        return
    model = BertForPreTraining(replace(job.model.config, architectures=["BertForPreTraining"]))
    model.load_state_dict({name: values["value"] for name, values in state.items()}, strict=False)
    model.save_pretrained(directory)
    tokenizer = job.corpus.tokenizer
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def draw(arguments: argparse.Namespace, output: Path) -> None:
    """Draw the curves of a run, where matplotlib is installed."""
    from minibert.training.curves import plot_curves

    try:
        plot_curves(output / "metrics.jsonl", output / "curves.png")
    except ImportError:
        notice(arguments, "no curves.png: matplotlib is not installed")

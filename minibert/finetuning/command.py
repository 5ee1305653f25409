"""`minibert finetune`: from labelled files to a model that the pipelines, and transformers, open.

The directory of a run: checkpoint.pt, metrics.jsonl, and model/, the best epoch's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.terminal import INTERRUPTED, add_model, chosen_model, notice, show, shows_progress

if TYPE_CHECKING:  # torch takes its time: the command line must not wait for it to print its help
    from minibert.finetuning.tasks import Task

NUMBERS: dict[str, tuple[type, str]] = {
    # option: (type, help); those not given keep the defaults of FineTuneSettings
    "epochs": (int, "passes over the training data (3)"),
    "batch-size": (int, "examples of an update (32)"),
    "learning-rate": (float, "peak of the schedule (5e-5); small models bear more"),
    "warmup": (float, "share of the steps in which the learning rate rises (0.1)"),
    "weight-decay": (float, "of all but biases and LayerNorms (0.01)"),
    "clip-norm": (float, "largest norm of the gradient (1.0)"),
    "seed": (int, "decides the new head, the order and dropout (0)"),
    "save-every": (int, "steps between checkpoints (500), besides those of each epoch"),
}
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert finetune`."""
    parser.add_argument("--task", required=True, choices=("classification", "tagging"))
    parser.add_argument(
        "--train",
        required=True,
        metavar="FILE",
        help="classification: .csv, .tsv or .jsonl with text, label and perhaps text_pair; tagging: "
        "CoNLL, a word and its label a line, a blank line between sentences",
    )
    parser.add_argument("--validation", required=True, metavar="FILE", help="as --train; chooses the best epoch")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the run keeps everything")
    add_model(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one, else the CPU")
    parser.add_argument("--problem-type", choices=PROBLEMS, help="of a classification (default: one label of several)")
    parser.add_argument("--max-length", type=int, help="tokens of an example (default: what the model takes)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    for name, (kind, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune a model to classify texts or to tag words, and keep the best epoch.

    Stop it with Ctrl-C or SIGTERM and go on with --resume, to the same end.
    """
    from minibert.finetuning.loop import BEST, CHECKPOINT, FineTuneSettings, FineTuning
    from minibert.finetuning.tasks import Classification, Tagging

    output = Path(arguments.output)
    if (output / CHECKPOINT).is_file() and not arguments.resume:
        raise ValueError(f"{output} already holds a run: give --resume to go on with it, or another --output")
    if arguments.task == "tagging" and arguments.problem_type:
        raise ValueError("--problem-type is for --task classification")
    names = [name.replace("-", "_") for name in NUMBERS]
    settings = FineTuneSettings(**{name: value for name in names if (value := getattr(arguments, name)) is not None})
    task = Tagging() if arguments.task == "tagging" else Classification(arguments.problem_type or PROBLEMS[0])
    arguments.model = chosen_model(arguments)
    model, tokenizer, rows = prepare(arguments, task, settings.seed)
    job = FineTuning(model, tokenizer, task, *rows, output, settings=settings, progress=shows_progress(arguments))
    if arguments.resume:
        job.resume()
    best = job.fit()
    finished = job.step == job.steps
    line = f"{'finished' if finished else 'stopped'} at step {job.step} of {job.steps}"
    result = {"finished": finished, "step": job.step, "steps": job.steps, "best": best, "model": str(output / BEST)}
    if best is None:
        show(arguments, result, [f"{line}, before the end of an epoch: go on with --resume"])
        return INTERRUPTED
    scores = ", ".join(f"{name} {value:.4f}" for name, value in best.items() if name not in ("step", "epoch", "loss"))
    show(arguments, result, [f"{line}; best epoch {best['epoch']}: {scores}", str(output / BEST)])
    return 0 if finished else INTERRUPTED


def prepare(arguments: argparse.Namespace, task: Task, seed: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """The model with a head for the labels found, its tokenizer, and both files, encoded."""
    import torch

    from minibert.config import BertConfig
    from minibert.text.tokenizer import BertTokenizer

    name, where = arguments.model, {"revision": arguments.revision}
    examples = [task.read(path) for path in (arguments.train, arguments.validation)]
    tokenizer = BertTokenizer.from_pretrained(name, **where)
    config = BertConfig.from_pretrained(name, **where)
    names = task.labels(examples[0])
    fields: dict[str, Any] = {"num_labels": 1}
    if names is not None:
        # A model that knows these labels keeps its own numbers for them
        names = list(config.label2id) if set(names) <= set(config.label2id) else names
        fields = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    limit = min(config.max_position_embeddings, tokenizer.model_max_length)
    length = arguments.max_length or limit
    if not 8 <= length <= limit:
        raise ValueError(f"--max-length {length}: must be from 8 to {limit}, what the model takes")
    ids = fields.get("label2id", {})
    rows = tuple(task.encode(each, tokenizer, ids, length) for each in examples)
    for path, encoded in zip((arguments.train, arguments.validation), rows, strict=True):
        cut = f", {encoded.cut:,} of them cut to {length} tokens" if encoded.cut else ""
        notice(arguments, f"{path}: {len(encoded.examples):,} examples{cut}")
    shown = ["numbers"] if names is None else [*names[:20], *(["..."] if len(names) > 20 else [])]
    notice(arguments, f"labels: {', '.join(shown)}")
    torch.manual_seed(seed)  # of the new head
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    fields |= {"problem_type": task.problem_type} if task.problem_type else {}
    model = task.model_class.from_pretrained(name, device=device, **fields, **where)
    return model, tokenizer, rows

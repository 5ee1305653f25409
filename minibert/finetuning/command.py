"""`minibert finetune`: from labelled files to a model that the pipelines, and transformers, open.

The directory of a run: run.json (all settings), checkpoint.pt, metrics.jsonl, and model/, the best epoch's.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert import terminal
from minibert.finetuning.options import ALIASES, LEAST_BATCH, PROBLEMS, TASKS, FineTuneSettings, Request
from minibert.finetuning.schemes import CHOICES

if TYPE_CHECKING:  # torch takes its time: the command line must not wait for it to print its help
    from minibert.finetuning.loop import FineTuning
    from minibert.finetuning.tasks import Rows, Task
    from minibert.text.tokenizer import BertTokenizer

MAX_UNKNOWN = 0.05  # share of [UNK] above which it is said: pretraining's
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
# What a resumed run may be given anew. Files may have moved: what they hold is compared, not their names
MAY_CHANGE = ("epochs", "learning_rate", "warmup", "weight_decay", "clip_norm", "save_every", "train", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert finetune`."""
    parser.add_argument("--task", type=lambda name: ALIASES.get(name, name), choices=TASKS, metavar="TASK",
                        help="classification (of texts or pairs of texts), tagging (of words), question-answering, or "
                        "sentence-pairs (vectors of texts, from pairs that belong together)")  # fmt: skip
    parser.add_argument("--train", metavar="FILE",
                        help="classification and sentence-pairs: .csv, .tsv, .jsonl or .json with the columns text, "
                        "text_pair and label; tagging: CoNLL, a word and its label a line, a blank line between "
                        "sentences; question-answering: SQuAD's .json")  # fmt: skip
    parser.add_argument("--validation", metavar="FILE", help="as --train; chooses the best epoch")
    parser.add_argument("--validation-share", type=float, metavar="SHARE",
                        help="instead of a file: this share of the training file (0.1, say)")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="where the run keeps everything")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --output, which remembers its options"
    )
    terminal.add_model(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one, else the CPU")
    files = parser.add_argument_group("how files are read")
    files.add_argument("--text-column", metavar="NAME", help="the column of texts (text); tagging: its number, from 1")
    files.add_argument("--label-column", metavar="NAME", help="the column of labels (label); tagging: its number")
    files.add_argument("--pair-column", metavar="NAME", help="the column of second texts (text_pair)")
    files.add_argument(
        "--negative-column", metavar="NAME", help="sentence-pairs: of texts that do not belong (negative)"
    )
    files.add_argument("--delimiter", metavar="CHARACTER",
                       help="between columns: a character, tab, comma or semicolon (by the file's name)")  # fmt: skip
    files.add_argument("--no-header", action="store_true", default=None,
                       help="line 1 names no columns; they are called 1, 2, ...")  # fmt: skip
    task = parser.add_argument_group("the task")
    task.add_argument("--problem-type", choices=PROBLEMS, help="of a classification (default: one label of several)")
    task.add_argument("--scheme", choices=CHOICES, metavar="SCHEME",
                      help=f"how labels of words make up entities: {', '.join(CHOICES)} (by the labels)")  # fmt: skip
    task.add_argument("--max-length", type=int, help="tokens of an example (default: what the model takes)")
    task.add_argument(
        "--doc-stride", type=int, help="question-answering: tokens that a window repeats of the one before"
    )
    training = parser.add_argument_group("training")
    for name, (kind, text) in NUMBERS.items():
        training.add_argument(f"--{name}", type=kind, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune a model: classify texts, tag words, answer questions, or embed sentences; the best epoch is kept.

    Stop it with Ctrl-C or SIGTERM and go on with --resume --output DIR, to the same end.
    """
    given = _given(arguments)
    if not arguments.resume:
        _parts(_required(given))  # says what is wrong before torch is imported
    from minibert.finetuning.loop import BEST, FineTuning
    from minibert.training.run import RunDirectory, exit_status

    directory = RunDirectory(arguments.output)
    defaults = asdict(FineTuneSettings()) | {f.name: None for f in fields(Request)}
    settled = directory.settle("finetune", given, defaults, resume=arguments.resume, may_change=MAY_CHANGE)
    request, settings = _parts(_required(settled.settings))
    for line in settled.changes:
        terminal.notice(arguments, line)
    task, prepared = prepare(arguments, request, settings)
    job = FineTuning(*prepared, directory, settings=settings, progress=terminal.shows_progress(arguments))
    with directory.held():
        if arguments.resume and directory.has_checkpoint:
            job.resume()
        directory.record(settled)
        job.fit()
    show(arguments, job, task, str(directory.path / BEST))
    return exit_status(job.stopped_by)


def show(arguments: argparse.Namespace, job: FineTuning, task: Task, model: str) -> None:
    """The result, on standard output."""
    best, finished = job.best, job.step == job.steps
    head = f"{'finished' if finished else 'stopped'} at step {job.step} of {job.steps}"
    result = {"finished": finished, "step": job.step, "steps": job.steps, "score": task.best, "best": best}
    if best is None:
        lines = [f"{head}, before the end of an epoch: go on with --resume"]
        result["model"] = None
    else:
        scores = ", ".join(
            f"{name} {value:.4f}" for name, value in best.items() if name not in ("step", "epoch", "loss")
        )
        lines = [f"{head}; best epoch {best['epoch']}: {scores}", model]
        result["model"] = model
    terminal.show(arguments, result, lines)


def prepare(
    arguments: argparse.Namespace, request: Request, settings: FineTuneSettings
) -> tuple[Task, tuple[Any, ...]]:
    """The task; and the model with a head for the labels found, its tokenizer, the task, and both data, encoded."""
    from minibert.finetuning.examples import in_two_cases
    from minibert.finetuning.start import longest, open_model
    from minibert.weights import hub

    name, where = request.model or hub.default_model(), {"revision": request.revision}
    limit = longest(name, **where)
    length = request.max_length or limit
    if not 8 <= length <= limit:
        raise ValueError(f"--max-length {length}: must be from 8 to {limit}, what the model takes")
    task = request.make_task()
    for path in request.files:
        task.check(path)
    examples = [task.read(path) for path in request.files]
    labels = task.labels(examples[0])
    sources = [str(path) for path in request.files]
    if request.validation_share is not None:
        examples = list(part(examples[0], request.validation_share, task))
        sources = [f"{sources[0]} (to learn from)", f"{sources[0]} (to validate on)"]
    start = open_model(task, name, labels, settings.seed, device=arguments.device, **where)
    rows = [task.encode(each, start.tokenizer, start.label_ids, length) for each in examples]
    for source, encoded in zip(sources, rows, strict=True):
        cut = f", {encoded.cut:,} of them cut to {length} tokens" if encoded.cut else ""
        if (share := unknown_share(encoded, start.tokenizer)) > MAX_UNKNOWN:
            cut += f"; {share:.1%} of their tokens are unknown to the model's vocabulary: is it for this language?"
        terminal.notice(arguments, f"{source}: {len(encoded.examples):,} examples{cut}")
    if labels is not None or task.problem_type is not None:
        shown = "numbers" if labels is None else ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
        terminal.notice(arguments, f"labels: {shown}")
        if similar := in_two_cases(labels or []):
            said = ", ".join(f"{one!r} and {other!r}" for one, other in similar[:5])
            terminal.notice(arguments, f"labels that differ in case alone, and count as different ones: {said}")
    for line in (task.describe(), f"head: {start.head}"):
        if line is not None:
            terminal.notice(arguments, line)
    return task, (start.model, start.tokenizer, task, *rows)


def unknown_share(rows: Rows, tokenizer: BertTokenizer) -> float:
    """The share of [UNK] among the tokens of texts."""
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    tokens = [token for row in rows.input_ids for token in row if token not in special]
    return tokens.count(tokenizer.unk_token_id) / max(1, len(tokens))


def part(examples: Sequence[Any], share: float, task: Task) -> tuple[list[Any], list[Any]]:
    """Examples to learn from and to validate on, the same ones whatever the seed and the order of the file.

    Those that have their text in common stay together. Raises ValueError where that leaves one side empty.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(hashlib.sha256(repr(task.group(example)).encode()).hexdigest(), []).append(i)
    chosen: set[int] = set()
    for _, numbers in sorted(groups.items())[:-1]:
        if chosen and len(chosen) + len(numbers) / 2 > share * len(examples):
            break
        chosen.update(numbers)
    if not chosen:
        raise ValueError(
            f"--validation-share {share}: all {len(examples)} examples have the same text, none can be parted"
        )
    return [e for i, e in enumerate(examples) if i not in chosen], [e for i, e in enumerate(examples) if i in chosen]


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, files and directories by their whole path."""
    names = [field.name for kind in (Request, FineTuneSettings) for field in fields(kind)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    for name in ("train", "validation", "model"):
        if name in given and (name != "model" or Path(given[name]).is_dir()):
            given[name] = str(Path(given[name]).absolute())
    return given


def _required(settings: dict[str, Any]) -> dict[str, Any]:
    missing = [f"--{name}" for name in ("task", "train") if settings.get(name) is None]
    if missing:
        raise ValueError(f"give {' and '.join(missing)} (or --resume, to go on with the run in --output)")
    return settings


def _parts(values: dict[str, Any]) -> tuple[Request, FineTuneSettings]:
    """Both, checked. Raises ValueError."""
    request, settings = (
        kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
        for kind in (Request, FineTuneSettings)
    )
    if settings.batch_size < (least := LEAST_BATCH.get(request.task, 1)):
        raise ValueError(f"batch_size is {settings.batch_size}, but must be at least {least} for --task {request.task}")
    return request, settings

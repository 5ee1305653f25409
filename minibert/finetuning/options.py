"""What a fine-tuning is asked for, checked before any file is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.finetuning.examples import Columns
from minibert.finetuning.files import Layout, as_delimiter, check_kind
from minibert.finetuning.schemes import CHOICES

if TYPE_CHECKING:  # torch takes its time: options are checked without it
    from minibert.finetuning.tasks import Task

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
TASKS = ("classification", "tagging", "question-answering", "sentence-pairs")
ALIASES = {"text-classification": "classification", "token-classification": "tagging", "ner": "tagging",
           "qa": "question-answering", "squad": "question-answering"}  # fmt: skip
LEAST_BATCH = {"sentence-pairs": 2}  # the others of a batch are what a text is told from
# The tasks that an option is for
_FOR = {
    "problem_type": ("classification",),
    "text_column": ("classification", "tagging", "sentence-pairs"),
    "label_column": ("classification", "tagging"),
    "pair_column": ("classification", "sentence-pairs"),
    "negative_column": ("sentence-pairs",),
    "delimiter": ("classification", "sentence-pairs"),
    "no_header": ("classification", "sentence-pairs"),
    "scheme": ("tagging",),
    "doc_stride": ("question-answering",),
}


@dataclass(frozen=True)
class FineTuneSettings:
    """How to fine-tune; the paper's choices (appendix A.3) for sizes from 16 to 32 and rates from 2e-5 to 5e-5.

    warmup: share of the steps in which the learning rate rises; then it falls to 0. save_every: steps between
    checkpoints, besides those at the end of each epoch.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, but must be at least 0 and finite")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, but must be from 0 to below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, but must be from 0 to 2**63 - 1")


@dataclass(frozen=True)
class Request:
    """The options of `minibert finetune` that say what is learnt from what. None: not given."""

    task: str
    train: str
    validation: str | None = None
    validation_share: float | None = None
    model: str | None = None
    revision: str | None = None
    problem_type: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    negative_column: str | None = None
    delimiter: str | None = None
    no_header: bool | None = None
    scheme: str | None = None
    max_length: int | None = None
    doc_stride: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot go together, FileNotFoundError for files that are not there."""
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task}: must be one of {', '.join(TASKS)}")
        for name, tasks in _FOR.items():
            if getattr(self, name) is not None and self.task not in tasks:
                raise ValueError(f"--{name.replace('_', '-')} is for --task {' or '.join(tasks)}, not {self.task}")
        if (self.validation is None) == (self.validation_share is None):
            raise ValueError("give either --validation FILE or --validation-share (0.1, say, of the training file)")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(f"--validation-share {self.validation_share}: must be above 0 and below 1")
        for name, least in (("max_length", 8), ("doc_stride", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.doc_stride is not None and self.max_length is not None and self.doc_stride >= self.max_length:
            raise ValueError(f"--doc-stride {self.doc_stride}: must be below --max-length {self.max_length}")
        if self.scheme is not None and self.scheme not in CHOICES:
            raise ValueError(f"--scheme {self.scheme}: must be one of {', '.join(CHOICES)}")
        for path in self.files:
            if not path.is_file():
                what = "a directory, not a file" if path.is_dir() else "no such file"
                raise FileNotFoundError(f"{path}: {what}")
            if self.task in _FOR["delimiter"]:
                check_kind(path, self.layout)
        if self.task == "tagging":
            _ = self.word_column, self.tag_column  # raise for what is no number
        else:
            _ = self.columns

    @property
    def files(self) -> list[Path]:
        return [Path(path) for path in (self.train, self.validation) if path is not None]

    @property
    def layout(self) -> Layout:
        return Layout(None if self.delimiter is None else as_delimiter(self.delimiter), not self.no_header)

    @property
    def columns(self) -> Columns:
        if self.no_header and (self.text_column is None or (self.label_column or self.pair_column) is None):
            raise ValueError("--no-header: say by number where things are: --text-column 1 --label-column 2")
        return Columns(self.text_column, self.label_column, self.pair_column, self.negative_column)

    @property
    def word_column(self) -> int | None:
        return _number("--text-column", self.text_column)

    @property
    def tag_column(self) -> int | None:
        return _number("--label-column", self.label_column)

    def make_task(self) -> Task:
        from minibert.finetuning.question_answering import QuestionAnswering
        from minibert.finetuning.sentence_pairs import SentencePairs
        from minibert.finetuning.tasks import Classification, Tagging

        if self.task == "tagging":
            return Tagging(self.word_column, self.tag_column, self.scheme)
        if self.task == "question-answering":
            return QuestionAnswering(self.doc_stride)
        if self.task == "sentence-pairs":
            return SentencePairs(self.columns, self.layout)
        return Classification(self.problem_type or PROBLEMS[0], self.columns, self.layout)


def _number(option: str, value: str | None) -> int | None:
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{option} {value!r}: columns of CoNLL have numbers, counted from 1") from None

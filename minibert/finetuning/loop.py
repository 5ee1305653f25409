"""Fine-tuning of a task head with its encoder (section 4): epochs, the best of them kept, resume to the bit.

As in pretraining nothing random is carried along: the order of an epoch is a function of (seed, epoch), the dropout
masks of (seed, step). A checkpoint holds the parameters, the optimizer's state, the step and the best score so far.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minibert.finetuning.options import FineTuneSettings
from minibert.finetuning.tasks import Rows, Task
from minibert.text.tokenizer import BertTokenizer
from minibert.training.distributed import load_state, state_of
from minibert.training.optimizer import learning_rate, make_optimizer
from minibert.training.run import RunDirectory, Stop, first_not_finite, seed_of

BEST = "model"
_POOL = 50  # batches within which rows are sorted by length


class FineTuning:
    """A run in a directory that holds `checkpoint.pt`, `metrics.jsonl` and `model/`, the best epoch's model.

    The model learns from `train` in place, on its device, and is validated after each epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        task: Task,
        train: Rows,
        validation: Rows,
        directory: str | os.PathLike[str] | RunDirectory,
        *,
        settings: FineTuneSettings | None = None,
        progress: bool | None = None,
    ):
        """progress: whether to show a bar; None: where standard error is a terminal."""
        self.model, self.tokenizer, self.task, self.train, self.validation = model, tokenizer, task, train, validation
        self.directory, self.progress = RunDirectory.of(directory), progress
        self.settings = s = settings or FineTuneSettings()
        self.optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, (0.9, 0.999), 1e-6)
        self.epoch_steps = -(-len(train) // s.batch_size)
        self.steps = s.epochs * self.epoch_steps
        self.step, self.stopped_by = 0, 0
        self.best: dict[str, Any] | None = None
        self._losses: list[float] = []  # of this epoch
        self._orders: dict[int, list[list[int]]] = {}

    # State

    @cached_property
    def _data(self) -> dict[str, Any]:
        """What decides on the stream of batches, on which epoch is the best, and on what lies beside its weights."""
        s = self.settings
        return {
            "tokenizer": _hash([self.tokenizer.backend_tokenizer.to_str()]),
            "labels": _hash(sorted(self.model.config.id2label.items())),
            "train": _hash([self.train.input_ids, self.train.targets]),
            "validation": _hash([self.validation.input_ids, self.validation.targets]),
            "batch_size": s.batch_size,
            "seed": s.seed,
        }

    def save(self) -> None:
        """Write the whole state, in one step."""
        state = {"step": self.step, "best": self.best, "losses": self._losses, "data": self._data}
        self.directory.save(state | {"parameters": state_of(self.model, self.optimizer)})

    def resume(self) -> None:
        """Go on from the checkpoint, to the end that the run would have had without the break.

        There may be more epochs than before; the schedule is then that of all of them, from here on.

        Raises FileNotFoundError without a checkpoint, ValueError for one of other data, settings or architecture, and
        for one of more steps than there shall be.
        """
        state = self.directory.load()
        others = {
            "tokenizer": "another tokenizer",
            "labels": "other names of labels",
            "train": "other examples or labels (to learn from)",
            "validation": "other examples or labels (to validate on)",
        }
        for name, value in self._data.items():
            if state["data"].get(name) != value:
                was = others.get(name, f"{name}={state['data'].get(name)}, not {value}")
                raise ValueError(f"{self.directory.checkpoint} was trained with {was}")
        if state["step"] > self.steps:
            raise ValueError(f"{self.directory.checkpoint} is of step {state['step']}, past the last of {self.steps}")
        load_state(self.model, self.optimizer, state["parameters"])
        self.step, self.best, self._losses = state["step"], state["best"], state["losses"]
        self.directory.cut_metrics(self.step)

    # Training

    def fit(self) -> dict[str, Any] | None:
        """Train to the last step, or until SIGTERM or SIGINT (then `stopped_by` is its number), and save.

        Returns the scores of the best epoch, with `step`; None if none was finished. Raises ValueError where a loss, a
        gradient or a weight is no finite number any more; the last good checkpoint stays.
        """
        with self.directory.held(), Stop() as stop, self._bar() as bar:
            if self.step == 0:
                self.directory.cut_metrics(0)  # of a run that never got as far as a checkpoint
            self.model.train()
            while self.step < self.steps and not stop.asked:
                self._losses.append(self.train_step())
                bar.update()
                if self.step % self.epoch_steps == 0:
                    self._finish_epoch(bar)
                elif self.step % self.settings.save_every == 0:
                    self.save()
            self.save()
            self.stopped_by = stop.asked if self.step < self.steps else 0
        return self.best

    def _bar(self) -> tqdm:
        hidden = None if self.progress is None else not self.progress
        return tqdm(total=self.steps, initial=self.step, unit="step", disable=hidden)

    def train_step(self) -> float:
        """One update; returns the loss before it."""
        s = self.settings
        epoch, number = divmod(self.step, self.epoch_steps)
        torch.manual_seed(seed_of(s.seed, self.step))
        loss = self.task.loss(self.model, self.tokenizer, self.train, self._order(epoch)[number])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)
        for name, value in (("the loss", loss), ("the gradient's norm", norm)):
            self.directory.check_finite(name, value.item(), self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, s.learning_rate, round(s.warmup * self.steps), self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def validate(self) -> dict[str, float]:
        """The task's scores on the validation rows, without dropout."""
        self.model.eval()
        scores = self.task.validate(self.model, self.tokenizer, self.validation)
        self.model.train()
        return scores

    def _finish_epoch(self, bar: tqdm) -> None:
        """Validate, write the scores down, and keep the model if it is the best so far."""
        if (name := first_not_finite(dict(self.model.named_parameters()), "weight")) is not None:
            self.directory.check_finite(name, float("nan"), self.step)
        scores = self.validate()
        epoch, loss = self.step // self.epoch_steps, float(np.mean(self._losses))
        record, self._losses = {"step": self.step, "epoch": epoch, "loss": loss, **scores}, []
        self.directory.log(record)
        bar.set_postfix({name: f"{value:.3f}" for name, value in scores.items()})
        if self.best is None or scores[self.task.best] > self.best[self.task.best]:
            self.task.save(self.model, self.tokenizer, self.directory.path / BEST)
            self.best = record
        self.save()

    def _order(self, epoch: int) -> list[list[int]]:
        """The rows of each batch: shuffled, and of like length within a batch."""
        if epoch not in self._orders:
            size, draw = self.settings.batch_size, np.random.default_rng([self.settings.seed, epoch])
            rows = draw.permutation(len(self.train)).tolist()
            pools = [rows[i : i + _POOL * size] for i in range(0, len(rows), _POOL * size)]
            ordered = [i for pool in pools for i in sorted(pool, key=lambda i: len(self.train.input_ids[i]))]
            groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
            self._orders = {epoch: [groups[i] for i in draw.permutation(len(groups))]}
        return self._orders[epoch]


def _hash(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

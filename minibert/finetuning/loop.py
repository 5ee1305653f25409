"""Fine-tuning of a task head with its encoder (section 4): epochs, the best of them kept, resume to the bit.

As in pretraining nothing random is carried along: the order of an epoch is a function of (seed, epoch), the dropout
masks of (seed, step). A checkpoint holds the parameters, the optimizer's state, the step and the best score so far.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minibert.finetuning.tasks import Rows, Task
from minibert.heads import IGNORED
from minibert.pretraining.corpus import replacing
from minibert.pretraining.loop import CHECKPOINT, METRICS, cut_metrics, seed_of, stop_signals
from minibert.text.tokenizer import BertTokenizer
from minibert.training.distributed import load_state, state_of
from minibert.training.optimizer import learning_rate, make_optimizer

BEST = "model"
_POOL = 50  # batches within which rows are sorted by length
_LEAVES_AT = 64  # validation rows in a batch


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
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, but must be from 0 to below 1")


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
        directory: str | os.PathLike[str],
        *,
        settings: FineTuneSettings | None = None,
        progress: bool | None = None,
    ):
        self.model, self.tokenizer, self.task, self.train, self.validation = model, tokenizer, task, train, validation
        self.directory, self.settings, self.progress = Path(directory), settings or FineTuneSettings(), progress
        self.directory.mkdir(parents=True, exist_ok=True)
        s = self.settings
        self.optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, (0.9, 0.999), 1e-6)
        self.epoch_steps = -(-len(train) // s.batch_size)
        self.steps = s.epochs * self.epoch_steps
        self.step, self.best, self._stop = 0, None, False
        self._losses: list[float] = []  # of this epoch
        self._orders: dict[int, list[list[int]]] = {}

    # State

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    @cached_property
    def _data(self) -> dict[str, Any]:
        """What decides on the stream of batches and on the schedule."""
        rows = json.dumps([self.train.input_ids, self.train.targets]).encode()
        s = self.settings
        return {
            "rows": hashlib.sha256(rows).hexdigest(),
            "epochs": s.epochs,
            "batch_size": s.batch_size,
            "seed": s.seed,
        }

    def save(self) -> None:
        """Write the whole state, in one step."""
        state = {"step": self.step, "best": self.best, "losses": self._losses, "data": self._data}
        with replacing(self.checkpoint) as partial:
            torch.save(state | {"parameters": state_of(self.model, self.optimizer)}, partial)

    def resume(self) -> None:
        """Go on from the checkpoint, to the end that the run would have had without the break.

        Raises FileNotFoundError without a checkpoint, ValueError for one of other data, settings or architecture.
        """
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"nothing to resume in {self.directory}: no {CHECKPOINT}")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, value in self._data.items():
            if state["data"].get(name) != value:
                was = "other examples or labels" if name == "rows" else f"{name}={state['data'].get(name)}, not {value}"
                raise ValueError(f"{self.checkpoint} was trained with {was}")
        load_state(self.model, self.optimizer, state["parameters"])
        self.step, self.best, self._losses = state["step"], state["best"], state["losses"]
        cut_metrics(self.directory / METRICS, self.step)

    # Training

    def fit(self) -> dict[str, float] | None:
        """Train to the last step, or until SIGTERM or SIGINT, and save.

        Returns the scores of the best epoch, with `step`; None if none was finished.
        """
        s, self._stop = self.settings, False
        self.model.train()
        with (
            stop_signals(self._ask_to_stop),
            tqdm(
                total=self.steps,
                initial=self.step,
                unit="step",
                disable=None if self.progress is None else not self.progress,
            ) as bar,
        ):
            while self.step < self.steps and not self._stop:
                self._losses.append(self.train_step())
                bar.update()
                if self.step % self.epoch_steps == 0:
                    self._finish_epoch(bar)
                elif self.step % s.save_every == 0:
                    self.save()
        self.save()
        return self.best

    def train_step(self) -> float:
        """One update; returns the loss before it."""
        s = self.settings
        epoch, number = divmod(self.step, self.epoch_steps)
        torch.manual_seed(seed_of(s.seed, self.step))
        inputs, targets = self._batch(self.train, self._order(epoch)[number])
        loss = self.model(**inputs, labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, s.learning_rate, round(s.warmup * self.steps), self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """The task's scores on the validation rows."""
        self.model.eval()
        rows, logits = self.validation, {}
        order = sorted(range(len(rows)), key=lambda i: len(rows.input_ids[i]))
        for start in range(0, len(order), _LEAVES_AT):
            numbers = order[start : start + _LEAVES_AT]
            inputs, _ = self._batch(rows, numbers)
            for number, values in zip(numbers, self.model(**inputs).logits.float().cpu().numpy(), strict=True):
                # Tags of a padded row: its own tokens only
                logits[number] = values[: len(rows.input_ids[number])] if values.ndim == 2 else values
        self.model.train()
        return self.task.scores([logits[i] for i in range(len(rows))], rows, self.model.config.id2label)

    def _finish_epoch(self, bar: tqdm) -> None:
        """Validate, write the scores down, and keep the model if it is the best so far."""
        scores = self.validate()
        epoch, loss = self.step // self.epoch_steps, float(np.mean(self._losses))
        record, self._losses = {"step": self.step, "epoch": epoch, "loss": loss, **scores}, []
        with open(self.directory / METRICS, "a") as file:
            file.write(json.dumps(record) + "\n")
        bar.set_postfix({name: f"{value:.3f}" for name, value in scores.items()})
        if self.best is None or scores[self.task.best] > self.best[self.task.best]:
            self.model.save_pretrained(self.directory / BEST)
            self.tokenizer.save_pretrained(self.directory / BEST)
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

    def _batch(self, rows: Rows, numbers: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs (B, T), and labels: (B,), (B, labels), or (B, T) with padding ignored."""
        columns = {name: [getattr(rows, name)[i] for i in numbers] for name in ("input_ids", "token_type_ids")}
        inputs = self.tokenizer.pad(columns, return_tensors="pt", padding_side="right").to(self.model.device)
        targets = [rows.targets[i] for i in numbers]
        if rows.words:
            longest = inputs["input_ids"].shape[1]
            targets = [[*target, *[IGNORED] * (longest - len(target))] for target in targets]
        return inputs, torch.tensor(targets, device=self.model.device)

    def _ask_to_stop(self) -> None:
        self._stop = True

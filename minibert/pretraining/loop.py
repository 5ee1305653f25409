"""The pretraining loop: steps, checkpoints that resume to the bit, validation, metrics.

Nothing random is carried along. The data are a function of their position in the stream, the dropout masks of (seed,
step, process): what a checkpoint needs are the parameters, the optimizer's state, the step and the position.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from minibert.heads import BertForPreTraining
from minibert.pretraining.corpus import Corpus, replacing
from minibert.pretraining.data import Batch, BatchMaker, PairRules, Plan, Position, plan_batches
from minibert.pretraining.loss import pair_lengths, pretraining_loss
from minibert.training import onednn
from minibert.training.distributed import World, distribute, load_state, set_sync, state_of
from minibert.training.optimizer import learning_rate, make_optimizer

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the paper's (appendix A.2), but for the size of a batch.

    rows: how many a step has, over all processes; a row is one pair, or several if `packed`. accumulate: in how many
    parts each process computes its share of them. workers: processes that make batches; 0: this one.
    validation_rows: how many rows to validate on, None for one pass over the validation corpus.
    """

    steps: int = 100_000
    rows: int = 32
    accumulate: int = 1
    packed: bool = False
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    dense: bool = False
    fsdp: bool = False
    workers: int = 0
    save_every: int = 1000
    validate_every: int = 1000
    validation_rows: int | None = 1024
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate", "save_every", "validate_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be from 0 to below steps, {self.steps}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0")


class Run:
    """A pretraining run in a directory that holds `checkpoint.pt`, the whole state, and `metrics.jsonl`.

    Raises ValueError where the rows of a step cannot be shared out evenly.
    """

    def __init__(
        self,
        model: BertForPreTraining,
        corpus: Corpus,
        directory: str | os.PathLike[str],
        *,
        rules: PairRules | None = None,
        settings: Settings | None = None,
        validation: Corpus | None = None,
        world: World | None = None,
        progress: bool | None = None,
    ) -> None:
        self.corpus, self.validation, self.directory = corpus, validation, Path(directory)
        self.rules, self.settings, self.world = rules or PairRules(), settings or Settings(), world or World()
        self.progress = progress if self.world.is_first else False
        parts = self.world.size * self.settings.accumulate
        if self.settings.rows % parts:
            raise ValueError(
                f"rows is {self.settings.rows}, but must be a multiple of {parts}: "
                f"{self.world.size} processes x {self.settings.accumulate} accumulated parts"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.model = model
        if self.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        loss = pretraining_loss(model, self.world.device, dense=self.settings.dense, fsdp=self.settings.fsdp)
        if self.settings.compile:
            loss.compile(dynamic=False)
        self.loss = distribute(loss, self.world, fsdp=self.settings.fsdp)
        self._arithmetic = self._choose_arithmetic()
        s = self.settings
        self.optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, s.betas, s.epsilon)
        self.step, self.position, self._stop = 0, Position(), False
        self._flops = 0.0  # of this process since the last line of metrics; counted on GPUs

    # --- state ----------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    def _data(self) -> dict[str, Any]:
        """What decides on the stream of batches."""
        return {"corpus": self.corpus.fingerprint, "rows": self.settings.rows, "packed": self.settings.packed} | asdict(
            self.rules
        )

    def save(self) -> None:
        """Write the whole state, in one step."""
        state = {
            "step": self.step,
            "position": asdict(self.position),
            "data": self._data(),
            "parameters": state_of(self.model, self.optimizer),
        }
        if self.world.is_first:
            with replacing(self.checkpoint) as partial:
                torch.save(state, partial)
        self.world.wait()

    def resume(self) -> None:
        """Go on from the checkpoint. The schedule may change, the data may not.

        Raises FileNotFoundError without a checkpoint, ValueError for one of other data or another architecture.
        """
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"nothing to resume in {self.directory}: no {CHECKPOINT}")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, value in self._data().items():
            if state["data"][name] != value:
                raise ValueError(f"{self.checkpoint} was trained with {name}={state['data'][name]!r}, not {value!r}")
        load_state(self.model, self.optimizer, state["parameters"])
        self.step, self.position = state["step"], Position(**state["position"])
        if self.world.is_first:
            cut_metrics(self.directory / METRICS, self.step)

    # --- training -------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to the last step, or until SIGTERM or SIGINT, and save. Returns whether the last step was reached."""
        s = self.settings
        steps = self._steps(self.corpus, self.rules, self.position)
        totals, began = torch.zeros(7, dtype=torch.float64), time.perf_counter()
        self._stop = False
        self.model.train()
        with (
            stop_signals(self._ask_to_stop),
            tqdm(
                total=s.steps,
                initial=self.step,
                unit="step",
                disable=None if self.progress is None else not self.progress,
            ) as bar,
        ):
            while self.step < s.steps:
                batches, after = next(steps)
                totals += self.train_step(batches)
                self.position = after
                bar.update()
                if self.step % s.log_every == 0 or self.step == s.steps:
                    totals, began = self._log_training(totals, time.perf_counter() - began, bar), time.perf_counter()
                if self.validation is not None and (self.step % s.validate_every == 0 or self.step == s.steps):
                    self._log({f"validation_{name}": value for name, value in self.validate().items()})
                    began = time.perf_counter()
                if self._stop:
                    break
                if self.step % s.save_every == 0:
                    self.save()
        self.save()
        return self.step == s.steps

    def train_step(self, batches: list[Batch]) -> Tensor:
        """One update from this process's parts of a batch.

        Returns (7,) float64, sums over these parts: the four of `PretrainingLoss`, tokens to predict, pairs, tokens.
        """
        s, device = self.settings, self.world.device
        counts = torch.tensor(
            [sum(b.masked for b in batches), sum(len(b.cls_positions) for b in batches), float(self._stop)],
            device=device,
        )
        own = counts[:2].to("cpu", copy=True)
        masked, pairs, stop = self.world.sum(counts).unbind()
        self._stop = bool(stop)  # all processes stop at the same step
        torch.manual_seed(seed_of(self.rules.seed, self.step, self.world.rank))
        sums = torch.zeros(4, device=device)
        with self._arithmetic:
            for batch in batches:
                set_sync(self.loss, batch is batches[-1])
                part = self._forward(batch)
                # Gradients are averaged over the processes: times their number, it is the sum that the mean asks for
                (self.world.size * (part[0] / masked.clamp(min=1) + part[2] / pairs)).backward()
                sums += part.detach()
        if device.type == "cuda":
            self._flops += sum(self._count_flops(batch) for batch in batches)
        self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, s.learning_rate, s.warmup_steps, s.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.cat([sums.cpu(), own, torch.tensor([float(sum(b.tokens for b in batches))])]).double()

    def _choose_arithmetic(self) -> AbstractContextManager[Any]:
        """oneDNN's products on a CPU, where the order of operations is ours to choose."""
        s = self.settings
        if s.dense or self.world.device.type != "cpu" or not onednn.available():
            return nullcontext()
        if s.bf16:
            return onednn.attention_by_products(self.model)
        return nullcontext() if s.compile else onednn.linear_layers(self.model)

    def _count_flops(self, batch: Batch) -> float:
        from minibert.fast.flops import training_flops

        return training_flops(self.model.config, pair_lengths(batch.pair), batch.masked, len(batch.cls_positions))

    def _forward(self, batch: Batch) -> Tensor:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return self.loss(**vars(batch.to(self.world.device)))

    def _steps(self, corpus: Corpus, rules: PairRules, start: Position) -> Iterator[tuple[list[Batch], Position]]:
        """This process's parts of each batch, and the position after it."""
        s, planned = self.settings, deque()
        maker = BatchMaker(corpus, rules, packed=s.packed, pad_to=max(64, rules.max_length // 4) if s.compile else 1)

        def parts() -> Iterator[Plan]:
            for plan in plan_batches(corpus, rules, s.rows, packed=s.packed, start=start):
                planned.append(plan.after)
                for i in range(s.accumulate):
                    yield plan.part(i * self.world.size + self.world.rank, self.world.size * s.accumulate)

        made = iter(DataLoader(maker, sampler=parts(), batch_size=None, collate_fn=_as_is, num_workers=s.workers))
        while True:
            yield [next(made) for _ in range(s.accumulate)], planned.popleft()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and accuracies on the first rows of the validation corpus: the same pairs and masks every time."""
        s = self.settings
        was_training = self.model.training
        self.model.eval()
        rules = replace(self.rules, seed=0)
        totals, rows = torch.zeros(7, dtype=torch.float64), 0
        for batches, after in self._steps(self.validation, rules, Position()):
            for batch in batches:
                counts = torch.tensor([batch.masked, len(batch.cls_positions), batch.tokens])
                totals += torch.cat([self._forward(batch).cpu(), counts]).double()
            rows += s.rows
            if after.epoch > 0 or (s.validation_rows is not None and rows >= s.validation_rows):
                break
        self.model.train(was_training)
        result = _means(self.world.sum(totals.to(self.world.device)).tolist())
        return result | {"perplexity": math.exp(min(result["mlm_loss"], 700.0))}

    # --- metrics --------------------------------------------------------------------------------------------------

    def _log_training(self, totals: Tensor, seconds: float, bar: tqdm) -> Tensor:
        """Write down what happened since the last time; returns fresh totals."""
        sums = self.world.sum(totals.to(self.world.device)).tolist()
        s, rate = self.settings, sums[-1] / seconds
        lr = learning_rate(self.step - 1, s.learning_rate, s.warmup_steps, s.steps)
        record = _means(sums) | {"lr": lr, "grad_norm": float(_whole(self.grad_norm)), "tokens_per_second": rate}
        if self._flops:
            from minibert.fast.flops import matmul_peak

            peak = matmul_peak(self.world.device, torch.bfloat16 if s.bf16 else torch.float32)
            record["mfu"], self._flops = self._flops / seconds / peak, 0.0
        bar.set_postfix(loss=f"{record['loss']:.3f}", tokens_per_s=f"{rate:,.0f}")
        self._log(record)
        return torch.zeros_like(totals)

    def _log(self, record: dict[str, float]) -> None:
        if self.world.is_first:
            with open(self.directory / METRICS, "a") as file:
                file.write(json.dumps({"step": self.step} | record) + "\n")

    def _ask_to_stop(self) -> None:
        self._stop = True


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop`, which asks to stop after the step, instead of ending the process."""
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cut_metrics(metrics: Path, step: int) -> None:
    """Take back the lines of a metrics.jsonl that were written after `step`."""
    if metrics.is_file():
        kept = [line for line in metrics.read_text().splitlines(True) if json.loads(line)["step"] <= step]
        with replacing(metrics) as partial:
            partial.write_text("".join(kept))


def seed_of(*words: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def _as_is(batch: Batch) -> Batch:
    return batch


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _means(sums: list[float]) -> dict[str, float]:
    mlm_loss, words, nsp_loss, nexts, masked, pairs, _ = sums
    mlm_loss, nsp_loss = mlm_loss / max(1.0, masked), nsp_loss / pairs
    return {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "nsp_loss": nsp_loss,
        "mlm_accuracy": words / max(1.0, masked),
        "nsp_accuracy": nexts / pairs,
    }

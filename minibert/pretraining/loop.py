"""The pretraining loop: steps, checkpoints that resume to the bit, validation, metrics.

Nothing random is carried along. The data are a function of their position in the stream, the dropout masks of (seed,
step, process): what a checkpoint needs are the parameters, the optimizer's state, the step and the position.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from minibert.heads import BertForPreTraining
from minibert.pretraining.batches import Batch, BatchMaker
from minibert.pretraining.corpus import Corpus
from minibert.pretraining.loss import pair_lengths, pretraining_loss
from minibert.pretraining.order import Plan, Position, plan_batches
from minibert.pretraining.pairs import PairRules
from minibert.training import onednn
from minibert.training.distributed import World, distribute, load_state, set_sync, shard_again, state_of, whole
from minibert.training.optimizer import learning_rate, make_optimizer
from minibert.training.run import RunDirectory, Stop, seed_of

# The least value of each whole number among the settings
_WHOLE = {"steps": 1, "rows": 1, "accumulate": 1, "save_every": 1, "validate_every": 1, "log_every": 1,
          "warmup_steps": 0, "workers": 0}  # fmt: skip


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
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}, but must be a whole number, at least {least}")
        if self.validation_rows is not None and (type(self.validation_rows) is not int or self.validation_rows < 1):
            raise ValueError(f"validation_rows is {self.validation_rows!r}, but must be at least 1, or None for all")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but must be from 0 to below steps, {self.steps}")
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:  # also false for NaN
                raise ValueError(f"{name} is {value}, but must be above 0, and finite")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, but must be 0 or above, and finite")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, but must be two numbers from 0 to below 1")

    def check_rows(self, processes: int) -> None:
        """Raise ValueError where the rows of a step cannot be shared out evenly."""
        parts = processes * self.accumulate
        if self.rows % parts:
            raise ValueError(
                f"rows is {self.rows}, but must be a multiple of {parts}: "
                f"{processes} processes x {self.accumulate} accumulated parts"
            )


class Run:
    """A pretraining run in a directory (`minibert.training.run`), with `checkpoint.pt`, the whole state, and metrics.

    The model learns in place, and must be in float32: bfloat16 has no room for small steps.

    Raises ValueError where the rows of a step cannot be shared out evenly, or corpus and model do not fit.
    """

    def __init__(
        self,
        model: BertForPreTraining,
        corpus: Corpus,
        directory: str | os.PathLike[str] | RunDirectory,
        *,
        rules: PairRules | None = None,
        settings: Settings | None = None,
        validation: Corpus | None = None,
        world: World | None = None,
        progress: bool | None = None,
    ) -> None:
        self.corpus, self.validation = corpus, validation
        self.rules, self.settings, self.world = rules or PairRules(), settings or Settings(), world or World()
        self.directory = RunDirectory.of(directory, writes=self.world.is_first)
        self.progress = progress if self.world.is_first else False
        s = self.settings
        s.check_rows(self.world.size)
        check_model(model, corpus, self.rules)
        self.model = model
        if s.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        loss = pretraining_loss(self._fastest(model), self.world.device, dense=s.dense, fsdp=s.fsdp)
        if s.compile:
            loss.compile(dynamic=False)
        self.loss = distribute(loss, self.world, fsdp=s.fsdp)
        self.optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, s.betas, s.epsilon)
        self.step, self.position = 0, Position()
        self.stop = Stop()  # what signals ask of this process
        self.stopped_by = 0  # the number of the signal that stopped all of them
        self._flops = 0.0  # of this process since the last line of metrics; counted on GPUs

    # --- state ----------------------------------------------------------------------------------------------------

    def _data(self) -> dict[str, Any]:
        """What decides on the stream of batches."""
        return {"corpus": self.corpus.fingerprint, "rows": self.settings.rows, "packed": self.settings.packed} | asdict(
            self.rules
        )

    def save(self) -> None:
        """Write the whole state, in one step. Raises ValueError where it is not finite; the last one stays then."""
        self.directory.save(
            {
                "step": self.step,
                "position": asdict(self.position),
                "data": self._data(),
                "config": self.model.config.to_dict(),
                "parameters": state_of(self.model, self.optimizer),
            }
        )
        self.world.wait()

    def resume(self, state: dict[str, Any] | None = None) -> None:
        """Go on from the checkpoint, or from its `state` if it has been read. The schedule may change, not the data.

        Raises FileNotFoundError without a checkpoint, ValueError for one of other data or another architecture, or
        beyond the last step.
        """
        state = self.directory.load() if state is None else state
        for name, value in self._data().items():
            if state["data"][name] != value:
                raise ValueError(
                    f"{self.directory.checkpoint} was trained with {name}={state['data'][name]!r}, not {value!r}"
                )
        if state["step"] > self.settings.steps:
            raise ValueError(f"steps is {self.settings.steps}, but {state['step']} are done already")
        load_state(self.model, self.optimizer, state["parameters"])
        self.step, self.position = state["step"], Position(**state["position"])

    # --- training -------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train to the last step, or until SIGTERM or SIGINT, and save. Returns whether the last step was reached.

        Raises ValueError when the loss or the gradient is not finite any more, or another process holds the directory.
        """
        s = self.settings
        steps = self._steps(self.corpus, self.rules, self.position)
        totals, began = torch.zeros(7, dtype=torch.float64), time.perf_counter()
        self.stopped_by = 0
        self.loss.train()
        off = None if self.progress is None else not self.progress  # None: tqdm looks if it is on a terminal
        with (
            self.directory.held(),
            self.stop,
            tqdm(total=s.steps, initial=self.step, unit="step", disable=off) as bar,
        ):
            self.directory.cut_metrics(self.step)
            while self.step < s.steps and not self.stopped_by:
                batches, after = next(steps)
                totals += self.train_step(batches)
                self.position = after
                bar.update()
                if self.step % s.log_every == 0 or self.step == s.steps:
                    totals, began = self._log_training(totals, time.perf_counter() - began, bar), time.perf_counter()
                if self.validation is not None and (self.step % s.validate_every == 0 or self.step == s.steps):
                    self._log({f"validation_{name}": value for name, value in self.validate().items()})
                    began = time.perf_counter()
                if self.step % s.save_every == 0 and self.step < s.steps and not self.stopped_by:
                    self.save()
            self.save()
        return self.step == s.steps

    def train_step(self, batches: list[Batch]) -> Tensor:
        """One update from this process's parts of a batch.

        Returns (7,) float64, sums over these parts: the four of `PretrainingLoss`, tokens to predict, pairs, tokens.
        """
        s, device = self.settings, self.world.device
        asked = float(self.stop.asked != 0)
        counts = torch.tensor([sum(b.masked for b in batches), sum(b.pairs for b in batches), asked], device=device)
        own = counts[:2].to("cpu", copy=True)
        masked, pairs, stop = self.world.sum(counts).unbind()
        if stop:  # somebody was asked, and all processes know it at the same step
            self.stopped_by = self.stop.asked or signal.SIGTERM
        torch.manual_seed(seed_of(self.rules.seed, self.step, self.world.rank))
        sums = torch.zeros(4, device=device)
        for batch in batches:
            set_sync(self.loss, batch is batches[-1])
            part = self._forward(batch)
            # Gradients are averaged over the processes: times their number, it is the sum that the mean asks for
            (self.world.size * (part[0] / masked.clamp(min=1) + part[2] / pairs)).backward()
            sums = sums + part.detach()
        if device.type == "cuda":
            self._flops += sum(self._count_flops(batch) for batch in batches)
        self.grad_norm = float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)))
        self.directory.check_finite("the gradient's norm", self.grad_norm, self.step)
        rate = learning_rate(self.step, s.learning_rate, s.warmup_steps, s.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return torch.cat([sums.cpu(), own, torch.tensor([float(sum(b.tokens for b in batches))])]).double()

    def _fastest(self, model: BertForPreTraining) -> BertForPreTraining:
        """The model with what is faster on a CPU, where the order of operations is ours to choose."""
        s = self.settings
        if s.dense or self.world.device.type != "cpu":
            return model
        if s.bf16:
            return onednn.twin(model, onednn.ATTENTION_BY_PRODUCTS)
        return onednn.twin(model, onednn.LINEAR_LAYERS) if onednn.is_faster() and not s.compile else model

    def _count_flops(self, batch: Batch) -> float:
        from minibert.fast.flops import training_flops

        return training_flops(self.model.config, pair_lengths(batch.pair), batch.masked, len(batch.cls_positions))

    def _forward(self, batch: Batch) -> Tensor:
        batch = batch.to(self.world.device)
        if self.settings.compile:  # or each number of pairs would be compiled anew
            names = ("masked_positions", "masked_labels")
            for name in (*names, "cls_positions", "next_sentence_label") if batch.packed else names:
                torch._dynamo.maybe_mark_dynamic(getattr(batch, name), 0)
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return self.loss(**vars(batch))

    def _steps(
        self, corpus: Corpus, rules: PairRules, start: Position, *, once: bool = False
    ) -> Iterator[tuple[list[Batch], Position]]:
        """This process's parts of each batch, and the position after it; `once`: of one epoch, each pair once."""
        s, planned = self.settings, deque()
        pad_to = max(64, rules.max_length // 4) if s.compile else 1
        maker = BatchMaker(corpus, rules, packed=s.packed, pad_to=pad_to, once=once)
        epochs = start.epoch + 1 if once else None

        def parts() -> Iterator[Plan]:
            for plan in plan_batches(corpus, rules, s.rows, packed=s.packed, start=start, epochs=epochs):
                planned.append(plan.after)
                for i in range(s.accumulate):
                    yield plan.part(i * self.world.size + self.world.rank, self.world.size * s.accumulate)

        made = iter(
            DataLoader(
                maker,
                sampler=parts(),
                batch_size=None,
                num_workers=s.workers,
                worker_init_fn=_leave_signals_to_the_parent,
            )
        )
        for first in made:
            yield [first, *(next(made) for _ in range(s.accumulate - 1))], planned.popleft()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and accuracies on the first rows of the validation corpus: the same pairs and masks every time.

        Pairs that only fill up a batch do not count. Raises ValueError if the loss is not finite.
        """
        s = self.settings
        was_training = self.loss.training
        self.loss.eval()
        rules = replace(self.rules, seed=0)
        totals, rows = torch.zeros(7, dtype=torch.float64), 0
        for batches, _ in self._steps(self.validation, rules, Position(), once=True):
            for batch in batches:
                counts = torch.tensor([batch.masked, batch.pairs, batch.tokens])
                totals += torch.cat([self._forward(batch).cpu(), counts]).double()
            rows += s.rows
            if s.validation_rows is not None and rows >= s.validation_rows:
                break
        self.loss.train(was_training)
        shard_again(self.loss)
        result = _means(self.world.sum(totals.to(self.world.device)).tolist())
        self.directory.check_finite("the validation loss", result["loss"], self.step)
        return result | {"perplexity": math.exp(min(result["mlm_loss"], 700.0))}

    # --- metrics --------------------------------------------------------------------------------------------------

    def _log_training(self, totals: Tensor, seconds: float, bar: tqdm) -> Tensor:
        """Write down what happened since the last time; returns fresh totals."""
        sums = self.world.sum(totals.to(self.world.device)).tolist()
        s, rate = self.settings, sums[-1] / seconds
        lr = self.optimizer.param_groups[0]["lr"]  # of the step before
        record = _means(sums) | {"lr": lr, "grad_norm": self.grad_norm, "tokens_per_second": rate}
        if self._flops:
            from minibert.fast.flops import matmul_peak

            peak = matmul_peak(self.world.device, torch.bfloat16 if s.bf16 else torch.float32)
            record["mfu"], self._flops = self._flops / seconds / peak, 0.0
        bar.set_postfix(loss=f"{record['loss']:.3f}", tokens_per_s=f"{rate:,.0f}")
        self._log(record)
        return torch.zeros_like(totals)

    def _log(self, record: dict[str, float]) -> None:
        self.directory.log({"step": self.step} | record)


def check_model(model: BertForPreTraining, corpus: Corpus, rules: PairRules) -> None:
    """Raise ValueError where a model cannot learn from a corpus: too short, too few words, not in float32."""
    config = model.config
    if rules.max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length is {rules.max_length}, but the model has {config.max_position_embeddings} positions"
        )
    if corpus.vocab_size > config.vocab_size:
        raise ValueError(f"the corpus has ids up to {corpus.vocab_size - 1}, the model {config.vocab_size} words")
    if kinds := {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.float64}:
        raise ValueError(f"the model is in {kinds.pop()}, in which small steps are lost: load it in torch.float32")


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group; who makes batches must outlive the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _means(sums: list[float]) -> dict[str, float]:
    mlm_loss, words, nsp_loss, nexts, masked, pairs, _ = sums
    mlm_loss, nsp_loss = mlm_loss / max(1.0, masked), nsp_loss / max(1.0, pairs)
    return {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "nsp_loss": nsp_loss,
        "mlm_accuracy": words / max(1.0, masked),
        "nsp_accuracy": nexts / max(1.0, pairs),
    }

"""The pretraining loop: loss, optimizer, schedule, checkpoints that resume to the bit, validation, metrics."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minibert.heads import BertForPreTraining
from minibert.training.corpus import Corpus, replacing
from minibert.training.data import IGNORED, Batch, BatchMaker, PairRules, Position, plan_batches

NO_DECAY = ("bias", "LayerNorm.weight", "LayerNorm.bias")


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are those of the paper (appendix A.2), but for the batch size."""

    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    bf16: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 1000
    validate_every: int = 1000
    validation_batches: int = 40
    log_every: int = 20


class PretrainingLoss(nn.Module):
    """The joint loss, with the vocabulary projection computed only where a word is to be predicted.

    Google's original gathers the chosen positions in the same way. The loss is that of `BertForPreTraining`; the (B, T, V)
    logits, most of them without a label, are never made.
    """

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        next_sentence_label: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
    ) -> dict[str, Tensor]:
        """Sums over the batch: mlm_loss and mlm_correct over the masked tokens, nsp_loss and nsp_correct over pairs."""
        encoded = self.model.bert(input_ids, attention_mask, token_type_ids)
        rows = encoded.last_hidden_state.flatten(0, 1)[masked_positions]  # (B, T, D) -> (P, D)
        words = self.model.cls.predictions(rows).float()  # (P, V)
        nexts = self.model.cls.seq_relationship(encoded.pooler_output).float()  # (B, 2)
        return {
            "mlm_loss": F.cross_entropy(words, masked_labels, ignore_index=IGNORED, reduction="sum"),
            "nsp_loss": F.cross_entropy(nexts, next_sentence_label, reduction="sum"),
            "mlm_correct": (words.argmax(-1) == masked_labels).sum(),
            "nsp_correct": (nexts.argmax(-1) == next_sentence_label).sum(),
        }


def learning_rate(step: int, settings: Settings) -> float:
    """Linear from 0 to the peak over the warm-up, then linear down to 0 at the last step; `step` counts from 0."""
    warm = (step + 1) / max(1, settings.warmup_steps)
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * max(0.0, min(warm, left))


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW (with bias correction) that does not decay biases and LayerNorms."""
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[not name.endswith(NO_DECAY)].append(parameter)
    groups = [
        {"params": decayed[True], "weight_decay": settings.weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


class Run:
    """A pretraining run in a directory: metrics.jsonl, checkpoint.pt (the whole state)."""

    def __init__(
        self,
        model: BertForPreTraining,
        train: Corpus,
        validation: Corpus | None,
        rules: PairRules,
        settings: Settings,
        directory: Path,
    ) -> None:
        self.model, self.train, self.validation = model, train, validation
        self.rules, self.settings, self.directory = rules, settings, Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.loss = PretrainingLoss(model)
        self.compiled = torch.compile(self.loss, dynamic=False) if settings.compile else self.loss
        self.optimizer = make_optimizer(model, settings)
        self.step, self.position = 0, Position()
        self._stop = False

    # state

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": asdict(self.position),
            "random": torch.get_rng_state(),
            "corpus": self.train.fingerprint,
        }
        with replacing(self.checkpoint) as partial:
            torch.save(state, partial)

    def resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if state["corpus"] != self.train.fingerprint:
            raise ValueError(f"{self.checkpoint} was trained on another corpus than {self.train.directory}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.position = state["step"], Position(**state["position"])
        torch.set_rng_state(state["random"])

    # training

    def _on_signal(self, *_: Any) -> None:
        self._stop = True

    def fit(self) -> None:
        """Train to the last step, or until SIGTERM; both save a checkpoint."""
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        maker = BatchMaker(self.train, self.rules)
        bar = tqdm(total=self.settings.steps, initial=self.step, unit="step", mininterval=5)
        sums, began, tokens = {}, time.perf_counter(), 0
        self.model.train()
        plans = plan_batches(self.train, self.rules, self.settings.batch_size, self.position)
        while self.step < self.settings.steps and not self._stop:
            plan = next(plans)
            batch = maker(plan)
            add(sums, self.train_step(batch))
            tokens += batch.tokens
            self.position = plan.after
            bar.update()
            if self.step % self.settings.log_every == 0:
                now = time.perf_counter()
                rates = means(sums) | {"tokens_per_second": tokens / (now - began)}
                bar.set_postfix(loss=f"{rates['loss']:.3f}", tokens_s=f"{rates['tokens_per_second']:.0f}")
                self.log({"step": self.step, "lr": learning_rate(self.step - 1, self.settings), **rates})
                sums, began, tokens = {}, now, 0
            if self.step % self.settings.save_every == 0:
                self.save()
            if self.validation is not None and self.step % self.settings.validate_every == 0:
                self.log({"step": self.step, "validation": self.validate()})
                began = time.perf_counter()
        self.save()
        bar.close()
        signal.signal(signal.SIGTERM, previous)

    def train_step(self, batch: Batch) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        sums = self._forward(batch)
        sums |= {"masked": (batch.masked_labels != IGNORED).sum(), "pairs": torch.tensor(len(batch.input_ids))}
        loss = sums["mlm_loss"] / sums["masked"] + sums["nsp_loss"] / sums["pairs"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: float(value.detach()) for name, value in sums.items()} | {"grad_norm": float(norm), "steps": 1}

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bf16):
            return self.compiled(**vars(batch))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Means over the first pairs of the validation corpus, the same pairs and masks every time."""
        self.model.eval()
        rules = replace(self.rules, seed=0)
        maker, sums = BatchMaker(self.validation, rules), {}
        plans = plan_batches(self.validation, rules, self.settings.batch_size)
        for _ in range(self.settings.validation_batches):
            batch = maker(next(plans))
            part = {name: float(value) for name, value in self._forward(batch).items()}
            add(sums, part | {"masked": int((batch.masked_labels != IGNORED).sum()), "pairs": len(batch.input_ids)})
        self.model.train()
        rates = means(sums)
        return rates | {"perplexity": math.exp(rates["mlm_loss"])}

    def log(self, record: dict[str, Any]) -> None:
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def means(sums: dict[str, float]) -> dict[str, float]:
    result = {
        "mlm_loss": sums["mlm_loss"] / sums["masked"],
        "nsp_loss": sums["nsp_loss"] / sums["pairs"],
        "mlm_accuracy": sums["mlm_correct"] / sums["masked"],
        "nsp_accuracy": sums["nsp_correct"] / sums["pairs"],
    }
    if "steps" in sums:
        result["grad_norm"] = sums["grad_norm"] / sums["steps"]
    return {"loss": result["mlm_loss"] + result["nsp_loss"], **result}

"""The records that models return: `out.logits`, `out["logits"]` and `out[0]` are the same tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

Record = TypeVar("Record", bound=type)


@dataclass
class ModelOutput:
    """A record that is also an ordered mapping of those of its fields that are not None.

    As in transformers, an index counts only the fields that are there: `out[0]` is the loss if there is one.
    """

    unlisted: ClassVar[tuple[str, ...]] = ()  # fields reached as attributes only

    def keys(self) -> list[str]:
        names = [field.name for field in fields(self)]
        return [name for name in names if name not in self.unlisted and getattr(self, name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key!r}: this {type(self).__name__} has {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self.keys())


def record(cls: Record) -> Record:
    """A dataclass that torch can look into: torch.export, FSDP and torch.compile find the tensors inside."""
    # Identity comparison: comparing tensors field by field has no single truth value
    cls = dataclass(eq=False)(cls)
    pytree.register_dataclass(cls)
    return cls


@record
class BaseModelOutput(ModelOutput):
    """What the encoder returns: (B, T, D), (B, D), N+1 times (B, T, D), N times (B, H, T, T)."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@record
class PreTrainingOutput(ModelOutput):
    """Both pretraining heads: `loss` is the sum of the parts whose labels were given; logits (B, T, V) and (B, 2)."""

    unlisted: ClassVar[tuple[str, ...]] = ("mlm_loss", "nsp_loss")

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None


@record
class LogitsOutput(ModelOutput):
    """Every head with one tensor of logits: (B, T, V), (B, T, labels), (B, labels) or (B, choices)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@record
class QuestionAnsweringOutput(ModelOutput):
    """Scores of each token to start and to end the answer: (B, T) each."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


__all__ = ["BaseModelOutput", "LogitsOutput", "ModelOutput", "PreTrainingOutput", "QuestionAnsweringOutput"]

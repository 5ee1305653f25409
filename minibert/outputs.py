"""The records that models return: `out.logits`, `out["logits"]` and `out[0]` are the same tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, dataclass_transform

from torch import Tensor
from torch.utils import _pytree as pytree

Record = TypeVar("Record", bound=type)


class ModelOutput(dict[str, Any]):
    """A record that is also a dictionary of those of its fields that are not None, in the order of the fields.

    As in transformers, an index counts only the fields that are there: `out[0]` is the loss if there is one.
    `out["logits"] = x` and `out.logits = x` do the same; None, or `del out["logits"]`, takes a field out. A record can
    be made of another mapping or of pairs, which is how DataParallel and accelerate rebuild what they took apart.
    Records are compared by identity: two tensors have no single truth value.
    """

    unlisted: ClassVar[tuple[str, ...]] = ()  # fields reached as attributes only
    __dataclass_fields__: ClassVar[dict[str, Any]]  # of every class below, by `record`

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__

    def __post_init__(self) -> None:
        name = fields(self)[0].name
        first = getattr(self, name)
        if isinstance(first, (Mapping, Iterator, list, tuple)):
            setattr(self, name, None)
            self.update(dict(first))

    def __setattr__(self, name: str, value: Any) -> None:
        is_late = name in self.__dict__ and name not in self
        object.__setattr__(self, name, value)
        if name in self.unlisted or not (name in self.__dataclass_fields__ or name in self):
            return
        if value is not None:
            dict.__setitem__(self, name, value)
            if is_late:  # to its place
                rest = dict(self)
                dict.clear(self)
                dict.update(self, {field: rest.pop(field) for field in self.__dataclass_fields__ if field in rest})
                dict.update(self, rest)
        elif name in self:
            dict.__delitem__(self, name)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"{key!r}: set a field of {type(self).__name__} by its name")
        if key not in self and key not in self.__dataclass_fields__:
            dict.__setitem__(self, key, value)
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        self[key]  # raises KeyError
        setattr(self, key, None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r}: this {type(self).__name__} has {', '.join(self)}")
        return dict.__getitem__(self, key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.items())})"

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    # dict's own would change what is stored behind the attributes' back
    update = MutableMapping.update
    pop = MutableMapping.pop  # type: ignore[assignment]
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    setdefault = MutableMapping.setdefault

    def __ior__(self, other: Any) -> ModelOutput:  # type: ignore[override,misc]
        self.update(other)
        return self

    def copy(self) -> ModelOutput:
        return copy.copy(self)


@dataclass_transform(eq_default=False)
def record(cls: Record) -> Record:
    """A dataclass that torch can look into: torch.export, FSDP and torch.compile find the tensors inside."""
    dataclass(eq=False, repr=False)(cls)  # changes the class itself
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

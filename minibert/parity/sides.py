"""The two sides of a comparison: what computes, or what was computed, and which outputs are counterparts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity.inputs import Case
from minibert.parity.metrics import Outputs, named


@dataclass
class Side:
    """One implementation: any callable that takes the arguments of a case, or its results by the case's number."""

    name: str
    run: Callable[..., Any] | dict[int, Outputs]
    dtype: torch.dtype = torch.float32
    invariance: dict[str, Any] | None = None  # of `checks`: measured once, however often the side is compared

    @property
    def module(self) -> nn.Module | None:
        return self.run if isinstance(self.run, nn.Module) else None

    @torch.no_grad()
    def outputs(self, case: Case, number: int = 0) -> Outputs:
        """See `named`."""
        if isinstance(self.run, dict):
            if number not in self.run:
                raise ValueError(f"{self.name} has no results for inputs[{number}]")
            return named(self.run[number])
        device = next((p.device for p in self.module.parameters()), None) if self.module is not None else None
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that [PAD] is asked without a mask, say
            return named(self.run(**{name: x if device is None else x.to(device) for name, x in case.inputs.items()}))


def numbered(tensors: Mapping[str, Tensor]) -> dict[int, Outputs]:
    """Tensors named 0.logits, 1.logits, ... by their number; those without are of number 0."""
    found: dict[int, Outputs] = {}
    for key, tensor in tensors.items():
        number, dot, name = key.partition(".")
        is_numbered = bool(dot) and number.isdigit()
        found.setdefault(int(number) if is_numbered else 0, {})[name if is_numbered else key] = tensor
    return found


def coarsest(dtypes: Any) -> torch.dtype:
    """The floating-point type with the fewest digits."""
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def as_side(thing: Any, argument: str) -> Side:
    """Raises TypeError for what is neither callable nor a mapping of tensors."""
    name = type(thing).__name__
    if isinstance(thing, Mapping):
        if not thing or not all(isinstance(value, Tensor) for value in thing.values()):
            raise TypeError(f"{argument} must map names to tensors, and not be empty")
        return Side(name, numbered(thing), coarsest(value.dtype for value in thing.values()))
    if not callable(thing):
        raise TypeError(f"{argument} must be a model, a callable or a mapping of tensors, got {name}")
    tensors = thing.parameters() if isinstance(thing, nn.Module) else ()
    dtype = next((p.dtype for p in tensors if p.is_floating_point()), getattr(thing, "dtype", None))
    return Side(name, thing, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def matched(*results: Outputs) -> list[tuple[str, list[Tensor]]]:
    """What all sides have by name, or in order where one side has no names. Raises ValueError if none match."""
    if common := [name for name in results[1] if all(name in each for each in results)]:
        return [(name, [each[name] for each in results]) for name in common]
    if not any("0" in each for each in results):
        raise ValueError(f"the two sides have no output in common: {', '.join(results[0])} and {', '.join(results[1])}")
    names = next((each for each in results if "0" not in each), results[0])
    return [(name, list(found)) for name, *found in zip(names, *(each.values() for each in results), strict=False)]

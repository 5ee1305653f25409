"""Parameters with several names: one stays one, whatever is loaded, moved or saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def aliases(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several -> the first name, as `state_dict` lists them."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            found[name] = owner
    return found


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place that has this name."""
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, parameter)


class KeepsTies(nn.Module):
    """A module in which what was one parameter stays one. Nothing else is tied."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsTies:
        # .to(), .half(), .to_empty() ... may put a new parameter in each place
        tied = aliases(self)
        super()._apply(fn, recurse)
        for alias, owner in tied.items():
            set_parameter(self, alias, self.get_parameter(owner))
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Raises ValueError if two names of one parameter come with different numbers."""
        tied = aliases(self)
        for alias, owner in tied.items():
            one, other = state_dict.get(owner), state_dict.get(alias)
            if one is not None and other is not None and one is not other and not torch.equal(one, other):
                raise ValueError(f"{alias} and {owner} are one parameter here, but the state dict has two of them")
        result = super().load_state_dict(state_dict, strict, assign)
        for alias, owner in tied.items():  # assign=True puts a new parameter in each place
            source = alias if owner not in state_dict and alias in state_dict else owner
            for name in (alias, owner):
                set_parameter(self, name, self.get_parameter(source))
        return result

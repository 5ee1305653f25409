"""What follows the encoder in a sentence-transformers model: pooling, then dense layers and normalisation.

Their files and their numbers are those of sentence-transformers 6.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibert.weights import checkpoint, hub


def _at(x_BTD: Tensor, column_B: Tensor) -> Tensor:
    return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), column_B]  # (B, D)


def _mean(x_BTD: Tensor, weight_BT: Tensor, power: float = 1.0) -> Tensor:
    weight = weight_BT.to(x_BTD.dtype)[:, :, None]  # (B, T, 1)
    return (x_BTD * weight).sum(1) / weight.sum(1).clamp(min=1e-9) ** power


def _weighted_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    return _mean(x_BTD, mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device))


# Each takes token states (B, T, D) and which tokens count (B, T), and gives (B, D). Several are joined in this order.
MODES = {
    "cls": lambda x, mask: _at(x, mask.int().argmax(1)),
    "max": lambda x, mask: x.masked_fill(~mask.bool()[:, :, None], -torch.inf).amax(1),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda x, mask: _mean(x, mask, power=0.5),
    "weightedmean": _weighted_mean,  # later tokens weigh more: Muennighoff 2022, "SGPT", section 3.1
    "lasttoken": lambda x, mask: _at(x, mask.shape[1] - 1 - mask.flip(1).int().argmax(1)),
}
_OLD_KEYS = {  # of configs before sentence-transformers 6
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# The activations that a Dense module may have, by the last part of their name in torch.nn
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "LeakyReLU", "ELU", "Mish", "Softplus")


class Pooling(nn.Module):
    """Token states (B, T, D) to one vector a text, (B, D), or (B, n * D) for n modes joined.

    modes: one name or several of `MODES`. include_prompt: whether the tokens of a prompt count.
    """

    def __init__(self, modes: str | Sequence[str] = "mean", include_prompt: bool = True):
        super().__init__()
        modes = (modes,) if isinstance(modes, str) else tuple(modes)
        for mode in modes or (None,):
            if mode not in MODES:
                raise ValueError(f"pooling mode {mode!r}: must be one of {', '.join(MODES)}")
        self.modes, self.include_prompt = modes, include_prompt

    @classmethod
    def from_config(cls, config: Mapping[str, Any], hidden_size: int) -> Pooling:
        """Read 1_Pooling/config.json, in its present form or that before sentence-transformers 6."""
        size = config.get("embedding_dimension", config.get("word_embedding_dimension", hidden_size))
        if size != hidden_size:
            raise ValueError(f"pooling is for states of {size} numbers, the encoder gives {hidden_size}")
        modes = config.get("pooling_mode") or [mode for key, mode in _OLD_KEYS.items() if config.get(key)] or "mean"
        return cls(modes, config.get("include_prompt", True))

    def write_files(self, folder: Path, hidden_size: int) -> None:
        """What `from_config` reads, in the form that sentence-transformers has read since its beginnings."""
        known = [mode for mode in _OLD_KEYS.values() if mode in self.modes]
        config: dict[str, Any] = {"word_embedding_dimension": hidden_size, "include_prompt": self.include_prompt}
        if list(self.modes) == known:
            config |= {key: mode in self.modes for key, mode in _OLD_KEYS.items()}
        else:  # an order that the old form cannot say
            config |= {"pooling_mode": list(self.modes)}
        _write_config(folder, config)

    @property
    def first_token_only(self) -> bool:
        """Whether nothing but the first token's state is looked at."""
        return self.modes == ("cls",) and self.include_prompt

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None, prompt_length: int = 0) -> Tensor:
        """mask: 1 for tokens, 0 for padding, which is on the right; None: no padding. prompt_length counts [CLS]."""
        leaves_prompt = prompt_length > 0 and not self.include_prompt
        exact = x_BTD.float() if x_BTD.dtype in (torch.float16, torch.bfloat16) else x_BTD  # whose sums would drift
        if mask_BT is None and not leaves_prompt and self.modes == ("mean",):  # the same bits as below, in two steps
            return (exact.sum(1) / exact.shape[1]).to(x_BTD.dtype)
        if mask_BT is None:
            mask_BT = torch.ones(x_BTD.shape[:2], dtype=torch.long, device=x_BTD.device)
        if leaves_prompt:
            mask_BT = mask_BT.clone()
            mask_BT[:, :prompt_length] = 0
        return torch.cat([MODES[mode](exact, mask_BT) for mode in self.modes], -1).to(x_BTD.dtype)

    def extra_repr(self) -> str:
        return ", ".join(self.modes) + ("" if self.include_prompt else ", without the prompt")


class Dense(nn.Module):
    """activation(linear(x)), plus x (or a projection of it) if it is residual: (B, in) -> (B, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: nn.Module, use_residual: bool):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    @classmethod
    def from_files(cls, folder: hub.Source, config: Mapping[str, Any]) -> Dense:
        """Read a Dense module's weights. ValueError for an unknown activation or weights that do not fit."""
        name = str(config.get("activation_function") or "torch.nn.modules.linear.Identity")
        kind = name.rpartition(".")[2]
        if not name.startswith("torch.nn.") or kind not in ACTIVATIONS:
            raise ValueError(f"Dense has the activation {name}: known are torch.nn's {', '.join(ACTIVATIONS)}")
        dense = cls(
            config["in_features"],
            config["out_features"],
            config.get("bias", True),
            getattr(nn, kind)(),
            config.get("use_residual", False),
        )
        stored = checkpoint.open_weights(folder)
        tensors = dict(zip(stored, checkpoint.read(list(stored.values())), strict=True))
        try:
            dense.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the weights of {folder.name} do not fit its config: {error}") from None
        return dense

    def write_files(self, folder: Path, hidden_size: int) -> None:
        """What `from_files` reads. Raises TypeError for an activation that its class alone does not say."""
        kind = type(self.activation)
        named = kind.__name__ in ACTIVATIONS and kind is getattr(nn, kind.__name__)
        said = " ".join(repr(self.activation).replace(", inplace=True", "").replace("inplace=True", "").split())
        if not named or said != repr(kind()):
            raise TypeError(
                f"Dense with the activation {said} cannot be saved: a file names one of torch.nn's "
                f"{', '.join(ACTIVATIONS)}, as it is without arguments"
            )
        config = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
            **({"use_residual": True} if self.use_residual else {}),
        }
        _write_config(folder, config)
        checkpoint.write_file(folder / "model.safetensors", self.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.linear(x))
        if self.use_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        return y


class Normalize(nn.Module):
    """To length 1."""

    def write_files(self, folder: Path, hidden_size: int) -> None:
        """There is nothing to say of it."""
        _write_config(folder, {})

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x)


def normalized(x: Tensor) -> Tensor:
    """F.normalize(x, dim=-1), to the bit, in half as many steps: those take longer than the numbers of one vector."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

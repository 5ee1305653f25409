"""BertConfig: the sizes and choices that define one BERT. Read this first, then model.py, then heads.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minibert.activations import ACTIVATIONS
from minibert.compat.config import HubConfig, takes_hub_fields

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# The largest size a config may ask for: far above any BERT ever trained, far below what hangs a machine.
_LARGEST = {
    "vocab_size": 10_000_000,
    "hidden_size": 65_536,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 4_096,
    "intermediate_size": 1_000_000,
    "max_position_embeddings": 1_000_000,
    "type_vocab_size": 100_000,
}

# Google's released sizes (Devlin et al. 2019, section 3; Turc et al. 2019, table 1): layers, hidden size.
_SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}


@takes_hub_fields
@dataclass
class BertConfig(HubConfig):
    """What defines a BERT; names and defaults are those of transformers, the defaults are bert-base-uncased.

    The constructor and every model call `check`; a field that is set later is checked at once. A head and its encoder
    share one config. The letters are those of model.py. Loading, saving and what else a `config.json` may hold are
    `HubConfig`'s.

    Raises ValueError naming the field, what came and what is allowed.
    """

    vocab_size: int = 30522  # V
    hidden_size: int = 768  # D
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    intermediate_size: int = 3072  # F
    hidden_act: str = "gelu"  # a name in activations.py
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512  # the largest T
    type_vocab_size: int = 2  # segments
    initializer_range: float = 0.02  # standard deviation of new weights
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    # Three spellings of one thing, which always agree: give any of them
    num_labels: int = None  # type: ignore[assignment]
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    problem_type: str | None = None  # of PROBLEM_TYPES; None: the labels decide at each loss call
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    architectures: list[str] | None = None

    def check_field(self, name: str, value: Any) -> None:
        """Raise ValueError unless the field may have this value."""
        is_share = name.endswith(("dropout", "dropout_prob"))
        # Types are compared exactly: True is an int to isinstance
        if name in _LARGEST:
            if type(value) is not int or not 1 <= value <= _LARGEST[name]:
                raise ValueError(f"{name}={value!r}: must be a whole number from 1 to {_LARGEST[name]}")
        elif is_share or name in ("initializer_range", "layer_norm_eps"):
            high = 1.0 if is_share else 1e3
            is_number = type(value) in (int, float) and 0.0 <= value <= high  # also false for NaN
            if not is_number and not (name == "classifier_dropout" and value is None):
                raise ValueError(f"{name}={value!r}: must be a number from 0.0 to {high}")
        elif name == "hidden_act" and value not in ACTIVATIONS:
            raise ValueError(f"hidden_act={value!r}: must be one of {', '.join(ACTIVATIONS)}")
        elif name == "pad_token_id" and value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"pad_token_id={value!r}: must be None or a whole number from 0")
        elif name == "problem_type" and value not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type={value!r}: must be None or one of {', '.join(PROBLEM_TYPES)}")
        elif name in ("output_attentions", "output_hidden_states", "return_dict") and type(value) is not bool:
            raise ValueError(f"{name}={value!r}: must be True or False")

    def check(self) -> None:
        """Raise ValueError unless each field may have its value and all of them go together."""
        for name, value in vars(self).items():
            self.check_field(name, value)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id!r}: must be None or from 0 to vocab_size - 1 = {self.vocab_size - 1}"
            )

    @classmethod
    def named(cls, size: str, **changes: Any) -> BertConfig:
        """A config of one of Google's sizes: tiny, mini, small, medium, base or large; `changes` are further fields."""
        if size not in _SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(_SIZES)}")
        layers, hidden = _SIZES[size]
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64}
        return cls(**{**sizes, "intermediate_size": 4 * hidden, **changes})

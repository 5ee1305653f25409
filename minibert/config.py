"""BertConfig: the sizes and choices that define one BERT, checked when it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from minibert.activations import ACTIVATIONS

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# The largest size a config may ask for: far above any BERT ever trained, far below what hangs a machine.
_LARGEST = {"vocab_size": 10_000_000, "hidden_size": 65_536, "num_hidden_layers": 1_000, "num_attention_heads": 4_096,
            "intermediate_size": 1_000_000, "max_position_embeddings": 1_000_000, "type_vocab_size": 100_000,
            "num_labels": 10_000_000}  # fmt: skip

# Fields of a Hub config.json that would change what the model computes: anything but these values is refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert", None), "position_embedding_type": ("absolute", None), "is_decoder": (False, None),
    "is_encoder_decoder": (False, None), "add_cross_attention": (False, None), "tie_word_embeddings": (True, None),
    "pruned_heads": ({}, None), "auto_map": ({}, None), "quantization_config": ({}, None),
}  # fmt: skip

# Fields that say nothing about what the encoder computes: text generation, bookkeeping, older exports, training set-up.
_IRRELEVANT = frozenset(
    """_attn_implementation_autoset _commit_hash _name_or_path _num_labels adapters attn_implementation bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    directionality diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    eos_token_ids exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing language length_penalty max_length min_length name_or_path no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_past output_scores pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix remove_invalid_values
    repetition_penalty return_dict_in_generate sentence_transformers sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache xla_device""".split()
)

# Google's released sizes (Devlin et al. 2019, section 3; Turc et al. 2019, table 1): layers, hidden size.
_SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768),
          "large": (24, 1024)}  # fmt: skip


@dataclass(frozen=True)
class BertConfig:
    """What defines a BERT; names and defaults are those of transformers, the defaults are bert-base-uncased.

    `num_labels`, `id2label` and `label2id` always agree: give any of them. `problem_type` None lets the labels decide
    at each loss call. A config never changes; `dataclasses.replace(config, ...)` makes another.

    Raises ValueError (a TypeError for an unknown field) naming the field, what came and what is allowed.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    architectures: list[str] | None = None

    def __post_init__(self) -> None:
        self._agree_on_labels()
        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            # The type is compared exactly: True is an int to isinstance
            if type(value) is not int or not 1 <= value <= largest:
                raise ValueError(f"{name}={value!r}: must be a whole number from 1 to {largest}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: must be one of {', '.join(ACTIVATIONS)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            self._check_number(name, 0.0, 1.0, optional=name == "classifier_dropout")
        for name in ("initializer_range", "layer_norm_eps"):
            self._check_number(name, 0.0, 1e3)
        pad = self.pad_token_id
        if pad is not None and (type(pad) is not int or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id={pad!r}: must be None or from 0 to vocab_size - 1 = {self.vocab_size - 1}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type={self.problem_type!r}: must be None or one of {', '.join(PROBLEM_TYPES)}")
        for name in ("output_attentions", "output_hidden_states", "return_dict"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")

    def _check_number(self, name: str, low: float, high: float, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if type(value) not in (int, float) or not low <= value <= high:  # also false for NaN
            raise ValueError(f"{name}={value!r}: must be a number from {low} to {high}")

    def _agree_on_labels(self) -> None:
        """Make num_labels, id2label and label2id agree; default names (LABEL_0 ...) give way to real ones."""
        count, names, ids = self.num_labels, self.id2label, self.label2id
        if names is None and ids is not None:
            names = {index: name for name, index in ids.items()}
        if names is not None:
            names = {int(index): str(name) for index, name in names.items()}
            if set(names) != set(range(len(names))):
                raise ValueError(f"id2label has the ids {sorted(names)}: must be 0 to {len(names) - 1} without gaps")
        is_default = names is not None and all(name == f"LABEL_{index}" for index, name in names.items())
        if names is None or (is_default and count is not None and count != len(names)):
            count = 2 if count is None else count
            if type(count) is not int or not 1 <= count <= _LARGEST["num_labels"]:
                raise ValueError(f"num_labels={count!r}: must be a whole number from 1 to {_LARGEST['num_labels']}")
            names = {index: f"LABEL_{index}" for index in range(count)}
        if count is not None and count != len(names):
            raise ValueError(f"num_labels={count} but id2label names {len(names)} labels: {list(names.values())}")
        for name, index in (ids or {}).items():
            if not name.startswith("LABEL_") and names.get(int(index)) != name:
                raise ValueError(f"label2id[{name!r}]={index} but id2label[{index}]={names.get(int(index))!r}")
        object.__setattr__(self, "num_labels", len(names))
        object.__setattr__(self, "id2label", dict(sorted(names.items())))
        object.__setattr__(self, "label2id", {name: index for index, name in sorted(names.items())})

    @classmethod
    def named(cls, size: str, **changes: Any) -> BertConfig:
        """A config of one of Google's sizes: tiny, mini, small, medium, base or large; `changes` are further fields."""
        if size not in _SIZES:
            raise ValueError(f"size={size!r}: must be one of {', '.join(_SIZES)}")
        layers, hidden = _SIZES[size]
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64}
        return cls(**{**sizes, "intermediate_size": 4 * hidden, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any], **changes: Any) -> BertConfig:
        """Read the dictionary of a Hub `config.json`. Each field is used, known to be irrelevant, or refused by name.

        A new `num_labels` among `changes` replaces the file's label names.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a BERT config must be a JSON object with named fields, got {type(values).__name__}")
        if "num_labels" in changes and "id2label" not in changes:
            values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
        values = {**values, **changes}
        for name, allowed in _ONLY.items():
            if name in values and values[name] not in allowed:
                raise ValueError(f"{name}={values[name]!r} is not supported: only {allowed[0]!r}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known - _ONLY.keys() - _IRRELEVANT)
        if unknown:
            given = ", ".join(f"{name}={values[name]!r}" for name in unknown)
            raise ValueError(f"unknown config fields, which may change what the model computes: {given}")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_pretrained(cls, name_or_path: str | PathLike[str], **where_and_changes: Any) -> BertConfig:
        """Read the config of a directory, a bundled model or a Hub repository.

        Takes `revision`, `cache_dir`, `local_files_only` and `token` as the models do; the rest are changed fields.
        """
        from minibert.weights import hub

        where_names = ("revision", "cache_dir", "local_files_only", "token")
        where = {name: where_and_changes.pop(name) for name in where_names if name in where_and_changes}
        path = hub.fetch(name_or_path, "config.json", **where)
        if path is None:
            raise ValueError(f"{name_or_path} has no config.json, which says what model its weights are for")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # invalid JSON and invalid UTF-8 both
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        try:
            return cls.from_dict(values, **where_and_changes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` holds them; transformers opens it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["id2label"] = {str(index): name for index, name in self.id2label.items()}
        del values["num_labels"]  # id2label says it
        # A missing pad_token_id means 0, so that None must be written
        kept = {name: value for name, value in values.items() if value is not None or name == "pad_token_id"}
        return {"model_type": "bert", **kept}

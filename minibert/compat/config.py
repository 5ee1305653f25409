"""HubConfig: what the Hub's `config.json` and transformers' scripts expect of a config, around a dataclass's fields."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minibert.compat import loading
from minibert.weights import hub
from minibert.weights.files import replacing

logger = logging.getLogger("minibert")

C = TypeVar("C", bound=type)
T = TypeVar("T", bound="HubConfig")

# Fields that would change what the model computes: anything but these values is refused. The first is what it reads as.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert", None),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "pruned_heads": ({}, None),
    "auto_map": ({}, None),
    "embedding_size": (None,),
    "quantization_config": (None, {}),
}

# Fields that say nothing about what the encoder computes: text generation, bookkeeping, older exports, training set-up.
_IRRELEVANT = frozenset(
    """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    _num_labels adapters attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id directionality diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id eos_token_ids exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing language length_penalty max_length min_length
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_past output_scores
    pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type prefix
    remove_invalid_values repetition_penalty return_dict_in_generate sentence_transformers sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache xla_device""".split()
)
# What transformers says where nothing was set; None for the others
_DEFAULTS = {
    "use_cache": True,
    "chunk_size_feed_forward": 0,
    "gradient_checkpointing": False,
    "return_dict_in_generate": False,
    "tie_encoder_decoder": False,
    "torchscript": False,
    "_attn_implementation": "sdpa",
    "_name_or_path": "",
    "name_or_path": "",
}
# Whether there is such a field is itself a question that other libraries ask
_ASKED_FOR = ("quantization_config", "auto_map", "embedding_size")
_LABELS = ("num_labels", "id2label", "label2id")
_LAST = "architectures"  # of BertConfig's fields, in the order in which its constructor sets them
_WHERE = ("revision", "cache_dir", "local_files_only", "token", "subfolder")
_ATTENTION = ("_attn_implementation", "attn_implementation")  # two spellings
_MOST_LABELS = 10_000_000
# What a file says of how it was made, untrue once it is written anew
_STALE = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "_commit_hash", "_attn_implementation")


def takes_hub_fields(cls: C) -> C:
    """Let the constructor of a dataclass on HubConfig take whatever a `config.json` may hold, as transformers' does."""
    construct = cls.__init__  # type: ignore[misc]
    own = {field.name for field in fields(cls)}  # type: ignore[arg-type]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        construct(self, *args, **{name: value for name, value in values.items() if name in own})
        self._set_others({name: value for name, value in values.items() if name not in own})

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


class HubConfig:
    """The base of BertConfig: assignments are checked, labels agree, unknown fields are kept and named in a notice.

    A subclass is a dataclass with `check_field(name, value)` and `check()`. Fields of a Hub `config.json` that would
    change what is computed are refused by name; those known to be irrelevant are kept.
    """

    check_field: Callable[[str, Any], None]
    check: Callable[[], None]

    model_type: ClassVar[str] = "bert"
    attribute_map: ClassVar[dict[str, str]] = {}
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_model_tp_plan: ClassVar[None] = None
    base_model_pp_plan: ClassVar[None] = None

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether this is a field that BERT's configs have, of use here or not."""
        return name in _ONLY or name in _IRRELEVANT or any(field.name == name for field in fields(cls))  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        labels = [self.__dict__.pop(name) for name in _LABELS]
        self.check()
        self._set_labels(_agreed(*labels))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ATTENTION:
            loading.check_attention(value)
            self.__dict__["_attn_implementation"] = value
        elif name in _ONLY:
            if value not in _ONLY[name]:
                raise ValueError(f"{name}={value!r} is not supported: only {_ONLY[name][0]!r}")
            if name in _ASKED_FOR:
                self.__dict__[name] = value
        elif _LAST not in self.__dict__:  # in the constructor, at the end of which all of them are checked
            self.__dict__[name] = value
        elif name in _LABELS:
            if name != "num_labels" or value != self.num_labels:
                self._set_labels(_agreed(**{name: value}))
        else:
            self.check_field(name, value)
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:  # asked only for what was never set
        if name in _ONLY and name not in _ASKED_FOR:
            return copy.copy(_ONLY[name][0])
        if name in _ATTENTION:
            return self.__dict__.get("_attn_implementation") or _DEFAULTS["_attn_implementation"]
        if name in _IRRELEVANT:
            return _DEFAULTS.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def _set_labels(self, names: dict[int, str]) -> None:
        self.__dict__["num_labels"] = len(names)
        self.__dict__["id2label"] = names
        self.__dict__["label2id"] = {name: index for index, name in names.items()}

    def _set_others(self, values: dict[str, Any]) -> None:
        """Set fields that are none of the dataclass, with one line of notice about those that nobody knows."""
        for name, value in values.items():
            setattr(self, name, value)
        if unknown := sorted(name for name in values if not self.knows(name)):
            given = ", ".join(f"{name}={values[name]!r}" for name in unknown)
            logger.warning("%s: kept, but of no use here, as no BERT has these fields: %s", type(self).__name__, given)

    @classmethod
    def from_dict(cls: type[T], values: dict[str, Any], **changes: Any) -> T:
        """Make a config of the dictionary of a Hub `config.json`; `changes` are further fields, which win.

        A new `num_labels` among `changes` replaces the file's label names. Raises ValueError for what is not a
        dictionary, or for a field whose value is not supported.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a BERT config must be a JSON object with named fields, got {type(values).__name__}")
        if "num_labels" in changes and "id2label" not in changes:
            values = {name: value for name, value in values.items() if name not in ("id2label", "label2id")}
        return cls(**{**values, **changes})

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | os.PathLike[str] | hub.Source,
        *,
        return_unused_kwargs: bool = False,
        **where_and_changes: Any,
    ) -> T | tuple[T, dict[str, Any]]:
        """Read the config of a directory, a bundled model or a Hub repository.

        Takes `revision`, `cache_dir`, `local_files_only`, `token` and `subfolder` as the models do, and what
        transformers takes (see `minibert.compat.loading`); the rest are changed fields. With `return_unused_kwargs`,
        those that no config has come back beside it. Raises ValueError for a file that is missing, damaged or says what
        is not supported.
        """
        where = {name: where_and_changes.pop(name) for name in _WHERE if name in where_and_changes}
        loading.take_ignored(where_and_changes)
        loading.take_location(where_and_changes, where)
        unused = {}
        if return_unused_kwargs:
            unused = {name: where_and_changes.pop(name) for name in [*where_and_changes] if not cls.knows(name)}
        config = cls._read(pretrained_model_name_or_path, where, where_and_changes)
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields that a checkpoint's `config.json` stands for, and those of `options` that are no field."""
        config, unused = cls.from_pretrained(pretrained_model_name_or_path, return_unused_kwargs=True, **options)
        return config.to_dict(), unused

    @classmethod
    def from_json_file(cls: type[T], json_file: str | os.PathLike[str]) -> T:
        """Read a config of a file of any name. Raises as `from_pretrained` does."""
        return cls._of_file(Path(json_file), {})

    @classmethod
    def _read(cls: type[T], name_or_path: Any, where: dict[str, Any], changes: dict[str, Any]) -> T:
        source = hub.as_source(name_or_path, **where)
        path = source.file("config.json")
        if path is None:
            raise ValueError(
                f"{source.name} has no config.json, which says what model its weights are for{source.hint()}"
            )
        return cls._of_file(path, changes)

    @classmethod
    def _of_file(cls: type[T], path: Path, changes: dict[str, Any]) -> T:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # invalid JSON and invalid UTF-8 both
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        try:
            if isinstance(values, dict):  # how attention was computed there says nothing about here
                values = {name: value for name, value in values.items() if name not in _ATTENTION}
            return cls.from_dict(values, **changes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` holds them; transformers opens it."""
        values = {"model_type": "bert", **{name: value for name, value in self.__dict__.items() if name not in _STALE}}
        values["id2label"] = {str(index): name for index, name in self.id2label.items()}  # type: ignore[attr-defined]
        del values["num_labels"]  # id2label says it
        # A missing pad_token_id means 0, so that None must be written
        return {name: value for name, value in values.items() if value is not None or name == "pad_token_id"}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from a new config's, and the type."""
        default = type(self)().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name == "model_type" or name not in default or value != default[name]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The fields as JSON: those that differ from a new config's, or all."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields to a file of any name, whole or not at all. Raises OSError where that cannot be."""
        with replacing(json_file_path) as path:
            path.write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> None:
        """Write config.json, which both libraries open. Raises OSError where that cannot be."""
        if push_to_hub:
            raise ValueError("push_to_hub=True: save to a directory, then upload it with huggingface_hub.upload_folder")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / "config.json", use_diff=False)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Set several fields, all of them or, if one is refused, none. Raises ValueError naming the field."""
        changed = copy.copy(self)
        changed._set_others(config_dict)
        self.__dict__.update(changed.__dict__)

    def update_from_string(self, update_str: str) -> None:
        """Set several fields from "num_hidden_layers=4,hidden_act=relu", each read as its present value's type.

        All of them or, if one is refused, none. Raises ValueError for a field that is not there or cannot be read so.
        """
        changes: dict[str, Any] = {}
        for part in update_str.split(","):
            name, equals, text = (piece.strip() for piece in part.partition("="))
            if not equals or not hasattr(self, name):
                raise ValueError(f"{part!r}: must be FIELD=VALUE, with a field that the config has")
            kind = type(getattr(self, name))
            if kind is not str:
                try:
                    value = json.loads(text.lower())  # a number, true or false
                except ValueError:
                    value = None
                if type(value) is not kind and not (kind is float and type(value) is int):
                    raise ValueError(f"{name}={text!r}: must be {'true or false' if kind is bool else kind.__name__}")
            changes[name] = text if kind is str else kind(value)
        self.update(changes)

    def get_text_config(self, **ignored: Any) -> HubConfig:
        """The config of the part that reads text: this one."""
        return self

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict  # type: ignore[attr-defined]


def _agreed(
    num_labels: int | None = None, id2label: dict[Any, str] | None = None, label2id: dict[str, Any] | None = None
) -> dict[int, str]:
    """The names of the labels by id, from whichever is given; default names (LABEL_0 ...) give way to real ones."""
    names = id2label
    if names is None and label2id is not None:
        names = {index: name for name, index in label2id.items()}
    if names is not None:
        names = {int(index): str(name) for index, name in names.items()}
        if set(names) != set(range(len(names))):
            raise ValueError(f"id2label has the ids {sorted(names)}: must be 0 to {len(names) - 1} without gaps")
    is_default = names is not None and all(name == f"LABEL_{index}" for index, name in names.items())
    if names is None or (is_default and num_labels is not None and num_labels != len(names)):
        count = 2 if num_labels is None else num_labels
        if type(count) is not int or not 1 <= count <= _MOST_LABELS:
            raise ValueError(f"num_labels={count!r}: must be a whole number from 1 to {_MOST_LABELS}")
        names = {index: f"LABEL_{index}" for index in range(count)}
    if num_labels is not None and num_labels != len(names):
        raise ValueError(f"num_labels={num_labels} but id2label names {len(names)} labels: {list(names.values())}")
    for name, index in (label2id or {}).items():
        if not name.startswith("LABEL_") and names.get(int(index)) != name:
            raise ValueError(f"label2id[{name!r}]={index} but id2label[{index}]={names.get(int(index))!r}")
    return dict(sorted(names.items()))

"""The files of a sentence-transformers repository: which modules it has, and what each is set to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from minibert import checks
from minibert.embedding.modules import Dense, Normalize, Pooling
from minibert.weights import checkpoint, hub

if TYPE_CHECKING:
    from minibert.embedding.base import Encoder

_PACKAGE = "sentence_transformers.models"
_AFTER = {"Dense", "Normalize", "Dropout"}  # may follow the pooling, in any order and number


class Folder(hub.Source):
    """A folder of a model, as a source of its own."""

    def __init__(self, whole: hub.Source, path: str):
        self.whole, self.path = whole, path.strip("/")
        self.name = f"{whole.name}/{self.path}"
        self.subfolder, self.variant, self.formats = "", None, whole.formats

    def file(self, filename: str) -> Any:
        return self.whole.file(f"{self.path}/{filename}")

    @property
    def directory(self) -> Any:
        return None if self.whole.directory is None else self.whole.directory / self.path

    def settle(self) -> bool:
        return self.whole.settle()

    def check_unchanged(self) -> None:
        self.whole.check_unchanged()


@dataclass(frozen=True)
class Module:
    """A line of modules.json: the class, and the folder of its files."""

    kind: str
    folder: hub.Source

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder, "config.json")


@dataclass(frozen=True)
class Repository:
    """encoder: where the BERT and its tokenizer lie. settings: of sentence_bert_config.json (the length limit, casing).
    defaults: of config_sentence_transformers.json (prompts, similarity). pooling: None for a bare encoder.
    """

    encoder: hub.Source
    settings: dict[str, Any]
    defaults: dict[str, Any]
    pooling: Module | None
    after: list[Module]

    def make_pooling(self, hidden_size: int) -> Pooling:
        return Pooling() if self.pooling is None else Pooling.from_config(self.pooling.config, hidden_size)

    def make_after(self) -> list[nn.Module]:
        """The modules behind the pooling that do something."""
        made: list[nn.Module] = []
        for module in self.after:
            config = module.config
            for key in ("module_input_name", "module_output_name"):
                if (name := config.get(key) or "sentence_embedding") != "sentence_embedding":
                    raise ValueError(f"{module.folder.name}: {key}={name!r} is not supported")
            if module.kind == "Dense":
                made.append(Dense.from_files(module.folder, config))
            elif module.kind == "Normalize":
                made.append(Normalize())
        return made


def open_repository(source: hub.Source) -> Repository:
    """Read what a model is made of; a model without modules.json is a bare encoder.

    Raises ValueError for damaged files, and for a module or a kind of model that minibert does not have, by name.
    """
    defaults = read_json(source, "config_sentence_transformers.json")
    if (kind := defaults.get("model_type") or "SentenceTransformer") != "SentenceTransformer":
        raise ValueError(f"{source.name} is a {kind}: SentenceEncoder takes models that give one vector a text")
    modules = _modules(source)
    if not modules:
        return Repository(source, {}, defaults, None, [])
    kinds = [module.kind for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= _AFTER:
        raise ValueError(
            f"{source.name} has the modules {', '.join(kinds)}: supported are Transformer, Pooling, and then any of "
            f"{', '.join(sorted(_AFTER))}"
        )
    encoder = modules[0].folder
    settings = read_json(encoder, "sentence_bert_config.json")
    if (task := settings.get("transformer_task") or "feature-extraction") != "feature-extraction":
        raise ValueError(f"{encoder.name}: transformer_task={task!r} gives no embeddings")
    return Repository(encoder, settings, defaults, modules[1], modules[2:])


def _modules(source: hub.Source) -> list[Module]:
    """modules.json in order; [] where there is none."""
    entries = read_json(source, "modules.json", list)
    try:
        entries = sorted(entries, key=lambda entry: entry["idx"])
        found = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ValueError(f"modules.json of {source.name} is no list of modules: {error!r}") from None
    modules = []
    for kind, path in found:
        package, _, name = kind.rpartition(".")
        if package.split(".")[0] != "sentence_transformers":  # a class of the repository's own: never run
            name = kind
        name = "Transformer" if name == "BERT" else name  # as it was called in 2019
        modules.append(Module(name, Folder(source, path) if path.strip("/.") else source))
    return modules


def write_repository(encoder: Encoder, directory: str | os.PathLike[str]) -> None:
    """Write all that `open_repository` reads, whole or not at all.

    Raises TypeError for a module that has no such files, or a Dense whose activation they cannot name; nothing has
    changed then.
    """
    modules = [encoder.pooling, *encoder.after]
    for module in modules:
        if type(module) not in (Pooling, Dense, Normalize):
            raise TypeError(f"{type(module).__name__} cannot be saved: only Pooling, Dense and Normalize have files")
    with hub.replacing(directory, stale=checkpoint.is_shard) as staging:
        encoder.plain.save_pretrained(staging)
        encoder.tokenizer.save_pretrained(staging)
        listed = [{"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}.Transformer"}]
        for number, module in enumerate(modules, 1):
            kind = type(module).__name__
            path = f"{number}_{kind}"
            (staging / path).mkdir()
            module.write_files(staging / path, encoder.plain.config.hidden_size)
            listed.append({"idx": number, "name": str(number), "path": path, "type": f"{_PACKAGE}.{kind}"})
        defaults = {
            "model_type": "SentenceTransformer",
            "prompts": encoder.prompts,
            "default_prompt_name": encoder.default_prompt_name,
            "similarity_fn_name": encoder.similarity_fn_name,
            "truncate_dim": encoder.truncate_dim,
        }
        settings = {"max_seq_length": encoder.max_seq_length, "do_lower_case": False}  # the tokenizer's files say it
        for name, content in (
            ("modules.json", listed),
            ("config_sentence_transformers.json", defaults),
            ("sentence_bert_config.json", settings),
        ):
            (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(source: hub.Source, filename: str, kind: type = dict) -> Any:
    """The object or list in a file; an empty one if there is no such file."""
    path = source.file(filename)
    return kind() if path is None else checks.read_json(path, kind)

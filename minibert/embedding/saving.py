"""A SentenceEncoder as files that it opens itself, and sentence-transformers too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from minibert.embedding.encoder import SentenceEncoder
from minibert.embedding.modules import _OLD_KEYS, Normalize
from minibert.model import BertModel
from minibert.weights import files

_PACKAGE = "sentence_transformers.models"  # the names of 2019, which all its versions know


def save_sentence_encoder(encoder: SentenceEncoder, directory: str | os.PathLike[str]) -> None:
    """Write the encoder's modules, settings, tokenizer and, last, its weights.

    Raises ValueError for modules that cannot be written (all but Normalize), TypeError for a model that went through
    `optimize`, whose weights are packed.
    """
    if not isinstance(encoder.model, BertModel):
        raise TypeError(f"only a plain BertModel can be saved, this encoder runs on {type(encoder.model).__name__}")
    if unknown := [type(module).__name__ for module in encoder.after if not isinstance(module, Normalize)]:
        raise ValueError(f"modules that cannot be written: {', '.join(unknown)}")
    directory = Path(directory)
    kinds = ["Transformer", "Pooling", *("Normalize" for _ in encoder.after)]
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"{_PACKAGE}.{kind}"}
        for i, (kind, folder) in enumerate(zip(kinds, folders, strict=True))
    ]
    settings = {"max_seq_length": encoder.max_seq_length, "do_lower_case": False}
    defaults = {
        "model_type": "SentenceTransformer",
        "prompts": encoder.prompts,
        "default_prompt_name": encoder.default_prompt_name,
        "similarity_fn_name": encoder.similarity_fn_name,
    }
    if encoder.truncate_dim is not None:
        defaults["truncate_dim"] = encoder.truncate_dim
    _write(directory / "modules.json", modules)
    _write(directory / "sentence_bert_config.json", settings)
    _write(directory / "config_sentence_transformers.json", defaults)
    _write(directory / folders[1] / "config.json", _pooling_config(encoder))
    for folder in folders[2:]:
        _write(directory / folder / "config.json", {})
    encoder.tokenizer.save_pretrained(directory)
    encoder.model.save_pretrained(directory)


def _pooling_config(encoder: SentenceEncoder) -> dict[str, Any]:
    """In the form that all versions read, where several modes are joined in a fixed order."""
    size, pooling = encoder.model.config.hidden_size, encoder.pooling
    if pooling.modes != tuple(mode for mode in _OLD_KEYS.values() if mode in pooling.modes):
        config: dict[str, Any] = {"embedding_dimension": size, "pooling_mode": list(pooling.modes)}
    else:
        config = {"word_embedding_dimension": size}
        config |= {key: mode in pooling.modes for key, mode in _OLD_KEYS.items()}
    return config | {"include_prompt": pooling.include_prompt}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

"""The tokenizer's files: vocab.txt and tokenizer.json into a WordPiece backend, and the settings beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

NAMED_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CASING = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
SETTINGS = (*NAMED_TOKENS, *CASING, "model_max_length", "padding_side", "truncation_side", "model_input_names",
            "clean_up_tokenization_spaces", "extra_special_tokens", "added_tokens_decoder")  # fmt: skip
# Tokenizer classes that read a vocab.txt as BERT does, so that their files may be opened as BERT's
SAME_KIND = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "PreTrainedTokenizer", "TokenizersBackend")

Fetch = Callable[[str], Path | None]  # a file's name -> where it is, None if there is none


def new_backend(vocab: str | os.PathLike[str] | Mapping[str, int] | None, unk_token: str) -> Tokenizer:
    """A tokenizer that splits text as google-research/bert's tokenization.py does."""
    if isinstance(vocab, (str, os.PathLike)):
        vocab = read_vocab(vocab)
    if not isinstance(vocab, Mapping) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise TypeError(
            "vocab must be the path of a vocab.txt or a dict from token to id; from_pretrained reads the rest"
        )
    if unk_token not in vocab:
        raise ValueError(f"the vocabulary of {len(vocab)} tokens lacks unk_token={unk_token!r}, which it must have")
    backend = Tokenizer(WordPiece(dict(vocab), unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def set_normalizer(backend: Tokenizer, do_lower_case: bool, strip_accents: bool | None, chinese: bool) -> None:
    """Set the casing; a backend that normalizes in a way of its own (read from tokenizer.json) stays as it is."""
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=backend.normalizer.clean_text,
            handle_chinese_chars=chinese,
            strip_accents=strip_accents,
            lowercase=do_lower_case,
        )


def read_vocab(path: str | os.PathLike[str]) -> dict[str, int]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"vocab: there is no file {os.fspath(path)!r}")
    vocab = WordPiece.read_file(os.fspath(path))
    if not vocab:
        raise ValueError(f"vocab: {os.fspath(path)!r} is empty")
    return vocab


def vocab_lines(backend: Tokenizer) -> str:
    """The text of a vocab.txt. An id without a token (a duplicate line in the original) becomes a blank line."""
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=False).items()}
    return "".join(f"{tokens.get(index, '')}\n" for index in range(max(tokens) + 1))


def load(fetch: Fetch, explicit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that make a BertTokenizer of a model's files; None if there is no vocabulary among them."""
    config = _read_json(fetch("tokenizer_config.json"))
    if "added_tokens_decoder" not in config:  # where it is there, it has what the map would say
        config |= _read_json(fetch("special_tokens_map.json"))
    if config.get("model_max_length") is None:
        config["model_max_length"] = config.get("max_len")  # its name in files of 2019
    if config["model_max_length"] is None:
        config["model_max_length"] = _read_json(fetch("config.json")).get("max_position_embeddings")
    if path := fetch("tokenizer.json"):
        found = _from_json(path, config, explicit)
    elif path := fetch("vocab.txt"):
        found = _from_vocab(path, config, fetch)
    else:
        return None
    return found | _settings(config) | explicit


def _from_json(path: Path, config: dict[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(backend.model, WordPiece):
        raise ValueError(f"{path} holds a {type(backend.model).__name__} model; BERT's is WordPiece")
    config.pop("added_tokens_decoder", None)  # tokenizer.json has them itself
    found = {"tokenizer_object": backend, "unk_token": backend.model.unk_token}
    normalizer = backend.normalizer
    if isinstance(normalizer, normalizers.BertNormalizer):
        return found | {
            "do_lower_case": normalizer.lowercase,
            "strip_accents": normalizer.strip_accents,
            "tokenize_chinese_chars": normalizer.handle_chinese_chars,
        }
    if given := [name for name in CASING if name in explicit]:
        raise ValueError(f"{', '.join(given)}: {path} normalizes text in a way of its own, which cannot be changed")
    for name in CASING:
        config.pop(name, None)
    return found | {"do_lower_case": normalizer is not None and normalizer.normalize_str("A") == "a"}


def _from_vocab(path: Path, config: dict[str, Any], fetch: Fetch) -> dict[str, Any]:
    kind = str(config.get("tokenizer_class") or SAME_KIND[0])
    if kind.removesuffix("Fast") not in SAME_KIND:
        raise ValueError(f"tokenizer_class={kind}: its vocab.txt is not read as BERT's, so its ids would be wrong")
    vocab = read_vocab(path)
    added = {
        int(index): AddedToken(**token) for index, token in (config.pop("added_tokens_decoder", None) or {}).items()
    }
    if not added:
        special = {str(_token(config[name])) for name in NAMED_TOKENS if config.get(name)}
        added = {
            index: AddedToken(token, normalized=token not in special, special=token in special)
            for token, index in _read_json(fetch("added_tokens.json")).items()
        }
    return {"vocab": vocab, "added_tokens_decoder": added, "do_lower_case": not _is_cased(vocab)}


def _is_cased(vocab: Mapping[str, int]) -> bool:
    """Whether at least one token in a hundred has a capital letter from A to Z, [CLS] and the like aside."""
    capitals = sum(not token.startswith("[") and any("A" <= char <= "Z" for char in token) for token in vocab)
    return 100 * capitals >= len(vocab)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer_config.json says of the arguments of BertTokenizer; null counts as not said."""
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    for name in NAMED_TOKENS:
        if name in settings:
            settings[name] = _token(settings[name])
    extra = settings.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = extra.values() if isinstance(extra, Mapping) else extra  # transformers 4 wrote them with names
    return settings | {"extra_special_tokens": [_token(token) for token in extra]}


def _token(value: str | Mapping[str, Any]) -> str | AddedToken:
    """A special token as the files write it: a string, or a dict of an AddedToken's fields."""
    if isinstance(value, str):
        return value
    fields = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=True, **fields)


def _read_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# What decode's clean-up joins, in the order in which transformers does it
_JOINS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
          (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_up(text: str) -> str:
    for spaced, joined in _JOINS:
        text = text.replace(spaced, joined)
    return text

"""The tokenizer's files: tokenizer.json or vocab.txt into a backend, and the settings that lie beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import WordPiece

from minibert.checks import read_json
from minibert.text.vocabulary import SPECIAL_TOKENS
from minibert.text.wordpiece import new_backend, read_vocab

CASING = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
SETTINGS = (*SPECIAL_TOKENS, *CASING, "model_max_length", "padding_side", "truncation_side", "model_input_names",
            "clean_up_tokenization_spaces", "split_special_tokens", "extra_special_tokens",
            "added_tokens_decoder")  # fmt: skip
TOKENS = (*SPECIAL_TOKENS, "extra_special_tokens", "added_tokens_decoder")  # of the settings, those that are tokens
# Tokenizer classes that read a vocab.txt as BERT does, so that their files may be opened as BERT's
SAME_KIND = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "PreTrainedTokenizer", "TokenizersBackend")

# Arguments of transformers that change no id: how its files are fetched, what its classes do with them, what it prints.
# A value in the tuple is the only one that is taken, since another would ask for something that is not done here.
IGNORED: dict[str, tuple[Any, ...] | None] = {
    "use_fast": None, "from_slow": (False, None), "trust_remote_code": None, "verbose": None, "legacy": None,
    "legacy_format": None, "add_prefix_space": None, "force_download": (False, None), "resume_download": None,
    "proxies": (None,), "mirror": None, "tokenizer_type": None, "tokenizer_class": None, "processor_class": None,
    "do_basic_tokenize": (True, None), "never_split": (None, [], ()), "push_to_hub": (False,), "backend": None,
    "filename_prefix": (None,), "use_source_tokenizer": None, "chat_template": (None,),
    "special_tokens_map_file": None, "clean_text": (True,), "wordpieces_prefix": ("##",), "keep_accents": None,
    "use_auth_token": (None, False), "config": None, "variant": None, "gguf_file": (None,), "src_lang": None,
    "local_dir_use_symlinks": None, "_from_auto": None, "_commit_hash": None, "errors": None,
}  # fmt: skip

Fetch = Callable[[str], Path | None]  # a file's name -> where it is, None if there is none


def load(fetch: Fetch, explicit: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that make a BertTokenizer of a model's files; None if there is no vocabulary among them."""
    config = _json(fetch("tokenizer_config.json"))
    if "added_tokens_decoder" not in config:  # where it is there, it has what the map would say
        config |= _json(fetch("special_tokens_map.json"))
    if config.get("model_max_length") is None:
        config["model_max_length"] = config.get("max_len")  # its name in files of 2019
    if config["model_max_length"] is None:
        config["model_max_length"] = _json(fetch("config.json")).get("max_position_embeddings")
    if path := fetch("tokenizer.json"):
        found = _from_json(path, config, explicit)
    elif path := fetch("vocab.txt"):
        found = _from_vocab(path, config, fetch)
    else:
        return None
    return found | _settings(config) | explicit


def check_ignored(where: str, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for an argument that is not in IGNORED, ValueError for a value that would change something."""
    for name, value in arguments.items():
        if name not in IGNORED:
            raise TypeError(f"{where} has no argument {name!r}")
        allowed = IGNORED[name]
        if allowed is not None and value not in allowed:
            raise ValueError(f"{name}={value!r} is not supported by {where}: leave it out")


def _from_json(path: Path, config: dict[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    backend = read_backend(path)
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


def backend_from(
    vocab: Any, vocab_file: Any, tokenizer_file: Any, tokenizer_object: Tokenizer | None, unk_token: str
) -> Tokenizer:
    """The backend that the constructor's arguments ask for, which cuts and pads nothing by itself."""
    if sum(given is not None for given in (vocab, vocab_file, tokenizer_file, tokenizer_object)) > 1:
        raise ValueError("give one of vocab, vocab_file, tokenizer_file and tokenizer_object, not several")
    backend = tokenizer_object
    if tokenizer_file is not None:
        backend = read_backend(Path(tokenizer_file))
    if backend is None:
        backend = new_backend(vocab_file if vocab is None else vocab, unk_token)
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_backend(path: Path) -> Tokenizer:
    """The backend in a tokenizer.json. ValueError for what is none, or none of BERT's kind."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(backend.model, WordPiece):
        raise ValueError(f"{path} holds a {type(backend.model).__name__} model; BERT's is WordPiece")
    return backend


def _from_vocab(path: Path, config: dict[str, Any], fetch: Fetch) -> dict[str, Any]:
    kind = str(config.get("tokenizer_class") or SAME_KIND[0])
    if kind.removesuffix("Fast") not in SAME_KIND:
        raise ValueError(f"tokenizer_class={kind}: its vocab.txt is not read as BERT's, so its ids would be wrong")
    vocab = read_vocab(path)
    added = {
        int(index): AddedToken(**token) for index, token in (config.pop("added_tokens_decoder", None) or {}).items()
    }
    if not added:
        special = {str(_token(config[name])) for name in SPECIAL_TOKENS if config.get(name)}
        added = {
            index: AddedToken(token, normalized=token not in special, special=token in special)
            for token, index in _json(fetch("added_tokens.json")).items()
        }
    return {"vocab": vocab, "added_tokens_decoder": added, "do_lower_case": not _is_cased(vocab)}


def _is_cased(vocab: Mapping[str, int]) -> bool:
    """Whether at least one token in a hundred has a capital letter from A to Z, [CLS] and the like aside."""
    capitals = sum(not token.startswith("[") and any("A" <= char <= "Z" for char in token) for token in vocab)
    return 100 * capitals >= len(vocab)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer_config.json says of the arguments of BertTokenizer; null counts as not said."""
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    for name in SPECIAL_TOKENS:
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


def _json(path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_json(path)

"""The tokens of a tokenizer: its vocabulary, the special ones by name, and what is added to it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from tokenizers import AddedToken, Tokenizer, processors, trainers
from tokenizers.models import WordPiece

from minibert.checks import check_choice, check_count, shown
from minibert.text import wordpiece
from minibert.text.wordpiece import PLACEHOLDER, sharing

# All that transformers names; BERT has the last five
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
AnyToken = str | AddedToken


class SpecialToken:
    """An attribute: a special token as a str, None where the tokenizer has none.

    Setting it to a token that the vocabulary lacks adds that token at the end, as the constructor does.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialToken: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> str | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> SpecialToken | str | None:
        return self if tokenizer is None else _name(tokenizer._special_tokens_map[self.name])

    def __set__(self, tokenizer: Vocabulary, value: AnyToken | None) -> None:
        tokenizer._set_special({self.name: value})


class SpecialTokenId:
    """An attribute: the id of a special token, None where the tokenizer has none; setting it names another token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialTokenId: ...
    @overload
    def __get__(self, tokenizer: Vocabulary, owner: type) -> int | None: ...
    def __get__(self, tokenizer: Vocabulary | None, owner: type) -> SpecialTokenId | int | None:
        if tokenizer is None:
            return self
        token = _name(tokenizer._special_tokens_map[self.name])
        return None if token is None else tokenizer._tokenizer.token_to_id(token)

    def __set__(self, tokenizer: Vocabulary, value: int | None) -> None:
        tokenizer._set_special({self.name: None if value is None else tokenizer._token_of(self.name, value)})


class Vocabulary:
    """The part of `BertTokenizer` that knows tokens and their ids."""

    bos_token, bos_token_id = SpecialToken(), SpecialTokenId()
    eos_token, eos_token_id = SpecialToken(), SpecialTokenId()
    unk_token, unk_token_id = SpecialToken(), SpecialTokenId()
    sep_token, sep_token_id = SpecialToken(), SpecialTokenId()
    pad_token, pad_token_id = SpecialToken(), SpecialTokenId()
    cls_token, cls_token_id = SpecialToken(), SpecialTokenId()
    mask_token, mask_token_id = SpecialToken(), SpecialTokenId()
    SPECIAL_TOKENS_ATTRIBUTES = SPECIAL_TOKENS

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, AnyToken | None],
        extra: Iterable[AnyToken],
        by_id: Mapping[int, AddedToken],
    ):
        """by_id: tokens beyond the vocabulary, each at the id that it must have."""
        self._tokenizer = wordpiece.close_gaps(backend)
        extra = list(extra)
        self._special_tokens_map: dict[str, AnyToken | None] = {name: special.get(name) for name in SPECIAL_TOKENS}
        self._extra = [str(token) for token in extra]
        self._add_known(by_id, [token for token in (*special.values(), *extra) if token is not None])
        self._set_template()

    def _add_known(self, by_id: Mapping[int, AddedToken], special: list[AnyToken]) -> None:
        names = {str(token) for token in special}
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in [*(by_id[index] for index in sorted(by_id)), *special]:
            if str(token) not in known:
                token = AddedToken(token, special=True) if isinstance(token, str) else token
                token.special |= str(token) in names
                self._tokenizer.add_tokens([token])
                known.add(str(token))
        for index, token in by_id.items():
            if (got := self._tokenizer.token_to_id(str(token))) != index:
                raise ValueError(f"added token {str(token)!r} must have id {index}, but ids in order give it {got}")

    # Special tokens

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own. (`additional_special_tokens` is their older name.)"""
        return list(self._extra)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Iterable[AnyToken] | None) -> None:
        self._set_special({}, [] if tokens is None else list(tokens))

    additional_special_tokens = extra_special_tokens

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self._extra)

    @extra_special_tokens_ids.setter
    def extra_special_tokens_ids(self, ids: Iterable[int] | None) -> None:
        self._set_special({}, [self._token_of("extra_special_tokens", index) for index in ids or ()])

    additional_special_tokens_ids = extra_special_tokens_ids

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: str(token) for name, token in self._special_tokens_map.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set special tokens by name ("mask_token", ...; "extra_special_tokens" takes a list), adding what is new.

        Returns how many were added, as `add_tokens` does. replace_extra_special_tokens=False keeps the extra ones that
        the tokenizer has.
        """
        given = dict(special_tokens_dict)
        extra = given.pop("additional_special_tokens", None)
        extra = given.pop("extra_special_tokens", extra)
        for name in given:
            check_choice("special_tokens_dict", name, (*SPECIAL_TOKENS, "extra_special_tokens"))
        if extra is not None and not isinstance(extra, (list, tuple)):
            raise ValueError(f"extra_special_tokens must be a list of tokens, got {shown(extra)}")
        if extra is not None and not replace_extra_special_tokens:
            extra = [*self._extra, *(token for token in extra if str(token) not in self._extra)]
        tokens = [_checked(name, token) for name, token in given.items() if token is not None]
        tokens += [_checked("extra_special_tokens", token) for token in extra or ()]
        count = self.add_tokens(tokens, special_tokens=True)
        self._set_special(given, extra)
        return count

    def _set_special(self, named: Mapping[str, AnyToken | None], extra: list[AnyToken] | None = None) -> None:
        tokens = [_checked(name, token) for name, token in named.items() if token is not None]
        tokens += [_checked("extra_special_tokens", token) for token in extra or ()]
        new = [token for token in tokens if self._tokenizer.token_to_id(str(token)) is None]
        if new:
            self.add_tokens(new, special_tokens=True)
        self._special_tokens_map |= named
        if extra is not None:
            self._extra = [str(token) for token in extra]
        if {"cls_token", "sep_token"} & named.keys():
            self._tokenizer = sharing(self._tokenizer)  # batches of before keep the one that made them
            self._set_template()

    def _set_template(self) -> None:
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP] with type 1 from B on (Devlin et al. 2019, section 3)."""
        cls, sep = self.cls_token, self.sep_token
        first = [f"{cls}:0"] * (cls is not None) + ["$A:0"] + [f"{sep}:0"] * (sep is not None)
        second = ["$B:1"] + [f"{sep}:1"] * (sep is not None)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=first,
            pair=first + second,
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in (cls, sep) if token is not None],
        )

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._tokenizer.num_special_tokens_to_add(pair)

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = True
    ) -> list[int]:
        """1 for each of the ids that is a special token, else 0.

        With already_has_special_tokens=False the ids are those of one text, or of two, without special tokens, and the
        mask is that of the row with them: 1 for [CLS] and each [SEP]. (transformers has no such answer.)
        """
        if not already_has_special_tokens:
            ends = [1] * (self.sep_token is not None)
            mask = [*[1] * (self.cls_token is not None), *[0] * len(token_ids_0), *ends]
            return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), *ends]
        if token_ids_1 is not None:
            raise ValueError("token_ids_1 must be None where the ids have their special tokens: they are one row")
        special = set(self.all_special_ids)
        return [int(index in special) for index in as_lists(token_ids_0)]

    # All tokens

    @property
    def backend_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without those added to it; `len(tokenizer)` counts both."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """One more than the largest id: what `resize_token_embeddings` needs."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        return {token: index for token, index in tokens.items() if not token.startswith(PLACEHOLDER)}

    vocab = property(get_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are found in a text before it is split, special ones among them, by id."""
        return self._tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens and ids of `added_tokens_decoder`, in the order of ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    added_tokens_encoder = property(get_added_vocab)

    def add_tokens(self, new_tokens: AnyToken | Sequence[AnyToken], special_tokens: bool = False) -> int:
        """Add tokens at the end of the vocabulary (`resize_token_embeddings(len(tokenizer))` comes next).

        Returns how many are now found in texts that were not before: as in transformers, a token that the vocabulary
        has counts too, but keeps its id.
        """
        tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        tokens = [_checked("new_tokens", token) for token in tokens]
        backend = sharing(self._tokenizer)  # batches of before keep the tokenizer that made them
        count = (backend.add_special_tokens if special_tokens else backend.add_tokens)(tokens)
        self._tokenizer = backend
        return count

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several; None for an id beyond the vocabulary."""
        ids = as_lists(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        try:
            if isinstance(ids, int):
                return self._token(ids)
            return [self._token(index) for index in ids if index not in skipped]
        except (TypeError, OverflowError) as error:
            raise wrong_ids("ids", [ids], error) from None

    def _token(self, index: int) -> str | None:
        token = self._tokenizer.id_to_token(index)
        return None if token is not None and token.startswith(PLACEHOLDER) else token

    def _token_of(self, name: str, index: Any) -> str:
        token = self.convert_ids_to_tokens(check_count(f"{name}_id", index, 0))
        if token is None:
            raise ValueError(f"{name}_id={index}: the vocabulary has no token of this id")
        return token

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """The id of a token, or the ids of several; the unknown token's id for what is not in the vocabulary."""
        if isinstance(tokens, str):
            index = self._tokenizer.token_to_id(tokens)
            if index is None:
                index = self._tokenizer.token_to_id(self.unk_token or self._tokenizer.model.unk_token)
            return index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._tokenizer.decoder.decode(tokens)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write vocab.txt alone, which has no added tokens; `save_pretrained` writes everything. Returns its path."""
        if not Path(save_directory).is_dir():
            raise ValueError(f"save_directory must be a directory, {os.fspath(save_directory)} is none")
        path = Path(save_directory) / (f"{filename_prefix}-vocab.txt" if filename_prefix else "vocab.txt")
        path.write_text(wordpiece.vocab_lines(self._tokenizer), encoding="utf-8", newline="\n")
        return (str(path),)

    def _trained(
        self,
        texts: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None,
        new: Sequence[AnyToken],
        renamed: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> Tokenizer:
        """A backend that splits text as this one does, with a vocabulary learnt from texts; special tokens first."""
        old = self._tokenizer
        unk = renamed.get(old.model.unk_token, old.model.unk_token)
        backend = Tokenizer(WordPiece({}, unk_token=unk))
        backend.normalizer, backend.pre_tokenizer, backend.decoder = old.normalizer, old.pre_tokenizer, old.decoder
        special = [token for _, token in sorted(self.added_tokens_decoder.items()) if token.special]
        for token in special:
            token.content = renamed.get(token.content, token.content)
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *new], **options)
        backend.train_from_iterator(texts, trainer=trainer, length=length)
        return backend


def _name(token: AnyToken | None) -> str | None:
    return None if token is None else str(token)


def _checked(name: str, token: Any) -> AnyToken:
    if not isinstance(token, (str, AddedToken)):
        raise ValueError(f"{name} must be a str or an AddedToken, got {shown(token)}")
    return token


def wrong_ids(name: str, rows: Any, error: Exception) -> ValueError:
    """The error for ids that the backend refused."""
    numbers = (index for row in rows if isinstance(row, list) for index in row)
    wrong = next((index for index in numbers if not isinstance(index, int) or index < 0), rows)
    return ValueError(f"{name} must be whole numbers from 0 up, got {wrong!r:.60} ({error})")


def as_lists(values: Any) -> Any:
    """Tensors and arrays, also within a list, as lists of int; anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, (list, tuple)) and values and not isinstance(values[0], int):
        return [as_lists(value) for value in values]
    return list(values) if isinstance(values, tuple) else values

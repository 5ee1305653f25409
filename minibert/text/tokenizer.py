"""Text to token ids and back: BERT's WordPiece, on the `tokenizers` library."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from minibert.text import wordpiece
from minibert.text.encoding import BatchEncoding, Padding, Request, as_batch, backend_lock
from minibert.text.wordpiece import NAMED_TOKENS
from minibert.weights import hub

NO_LIMIT = int(1e30)  # what transformers writes as model_max_length when nothing is known
PADDING = {False: None, True: "longest", "longest": "longest", "max_length": "max_length", "do_not_pad": None}
TRUNCATION = {False: None, True: "longest_first", "do_not_truncate": None} | {
    name: name for name in ("longest_first", "only_first", "only_second")
}
SIDES = {"right": "right", "left": "left"}
TENSORS = {None: None, "pt": "pt", "np": "np"}
Text = str | Sequence[str]  # a sequence of words where is_split_into_words=True


class BertTokenizer:
    """Splits text into WordPiece tokens and numbers them, as transformers' BertTokenizer does, id for id.

    vocab is a vocab.txt (one token a line, its id the line's number from 0) or a dict from token to id; vocab_file is
    another name for it. strip_accents=None means "as do_lower_case", as in the original BERT. model_max_length is the
    length that `truncation=True` cuts to. A special token that the vocabulary lacks is added at its end.

    >>> tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
    >>> batch = tokenizer(["One text.", "Another."], padding=True, return_tensors="pt")
    >>> model(**batch)

    Calls may come from several threads.
    """

    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self,
        vocab: str | os.PathLike[str] | Mapping[str, int] | None = None,
        do_lower_case: bool = True,
        unk_token: str | AddedToken = "[UNK]",
        sep_token: str | AddedToken = "[SEP]",
        pad_token: str | AddedToken = "[PAD]",
        cls_token: str | AddedToken = "[CLS]",
        mask_token: str | AddedToken = "[MASK]",
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        *,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_object: Tokenizer | None = None,
        extra_special_tokens: Iterable[str | AddedToken] = (),
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        name_or_path: str = "",
    ):
        """tokenizer_object (a WordPiece `tokenizers.Tokenizer`, taken over) stands in for a vocabulary.

        added_tokens_decoder holds tokens beyond the vocabulary by id. clean_up_tokenization_spaces makes `decode` join
        "don ' t". Raises ValueError for an impossible vocabulary, side or token, FileNotFoundError for a missing file.
        """
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        self.unk_token, self.sep_token, self.pad_token = str(unk_token), str(sep_token), str(pad_token)
        self.cls_token, self.mask_token = str(cls_token), str(mask_token)
        self.extra_special_tokens = [str(token) for token in extra_special_tokens]
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side = _choice("padding_side", padding_side, SIDES)
        self.truncation_side = _choice("truncation_side", truncation_side, SIDES)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.name_or_path = name_or_path

        if sum(given is not None for given in (vocab, vocab_file, tokenizer_object)) > 1:
            raise ValueError("give one of vocab, vocab_file and tokenizer_object, not several")
        if tokenizer_object is None:
            tokenizer_object = wordpiece.new_backend(vocab_file if vocab is None else vocab, self.unk_token)
        self._tokenizer = tokenizer_object
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        wordpiece.set_normalizer(self._tokenizer, do_lower_case, strip_accents, tokenize_chinese_chars)
        special = [unk_token, sep_token, pad_token, cls_token, mask_token, *extra_special_tokens]
        self._add_known(added_tokens_decoder or {}, special)
        self._set_template()

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | hub.Source,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **settings: Any,
    ) -> BertTokenizer:
        """Read tokenizer.json, else vocab.txt, with the settings in tokenizer_config.json and special_tokens_map.json.

        `settings` are arguments of the class and win over the files. Casing is decided by the first that speaks of it:
        do_lower_case= given here; tokenizer_config.json; tokenizer.json; the vocabulary itself, which is cased if at
        least one token in a hundred has a capital letter from A to Z (bert-base-cased: every third, bert-base-uncased:
        none). transformers stops at tokenizer_config.json and lowercases whatever is left. model_max_length falls back
        to config.json's max_position_embeddings. Raises FileNotFoundError if there is no vocabulary.
        """
        source = hub.as_source(
            name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        arguments = wordpiece.load(source.file, settings)
        if arguments is None:
            raise FileNotFoundError(f"{source.name!r} has neither tokenizer.json nor vocab.txt")
        return cls(**{"name_or_path": source.name} | arguments)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write vocab.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json; return their paths.

        Each file appears whole: it is written beside its place and then moved there, after all have been written.
        """
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"save_directory must be a directory, {directory} is a file")
        directory.mkdir(parents=True, exist_ok=True)
        names = {name: getattr(self, name) for name in NAMED_TOKENS}
        extra = {"additional_special_tokens": self.extra_special_tokens} if self.extra_special_tokens else {}
        config = names | extra | {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.do_lower_case,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "strip_accents": self.strip_accents,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_input_names": self.model_input_names,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
        }  # fmt: skip
        with backend_lock:
            self._tokenizer.no_truncation()
            backend = self._tokenizer.to_str(pretty=True)
        contents = {
            "vocab.txt": wordpiece.vocab_lines(self._tokenizer),
            "tokenizer.json": backend,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "special_tokens_map.json": json.dumps(names | extra, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in contents.items():
            (directory / f".{name}.tmp").write_text(content, encoding="utf-8", newline="\n")
        for name in contents:
            (directory / f".{name}.tmp").replace(directory / name)
        return tuple(str(directory / name) for name in contents)

    # Text to ids

    def __call__(
        self,
        text: Text | Sequence[Text] | Sequence[tuple[Text, Text]],
        text_pair: Text | Sequence[Text] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Tokenize a text, a pair of texts, or a list of either (a pair in a list is a tuple, or comes by text_pair).

        padding: False, True or "longest" (of the batch), "max_length". truncation: False, True or "longest_first",
        "only_first", "only_second"; None cuts if max_length is given without padding. max_length, in tokens with the
        special ones, defaults to model_max_length; where that is unknown too, truncation=True cuts nothing.
        return_overflowing_tokens keeps what was cut off as further rows, each repeating `stride` tokens of the row
        before; overflow_to_sample_mapping then says which text a row is of.

        Returns input_ids, token_type_ids and attention_mask (and what else was asked for): for one text lists (T,),
        for several lists (B, T_i), with return_tensors "pt" or "np" int64 tensors or arrays (B, T).

        Raises TypeError for input that is no text, ValueError for text that is not Unicode (a lone surrogate), an
        unknown choice, a max_length too small for the special tokens or rows of different lengths as a tensor.
        """
        batch, is_batched = as_batch(text, text_pair, is_split_into_words)
        pad, cut = self._limits(padding, truncation, max_length, pad_to_multiple_of, padding_side)
        if cut is not None and return_overflowing_tokens:
            cut["stride"] = _count("stride", stride, 0)
        request = Request(
            self._tokenizer, batch, add_special_tokens, is_split_into_words, cut, return_overflowing_tokens
        )
        asked = {
            "input_ids": True,
            "token_type_ids": self._wants("token_type_ids", return_token_type_ids),
            "attention_mask": self._wants("attention_mask", return_attention_mask),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
            "length": return_length,
        }
        names = [name for name in asked if asked[name]]
        rows = request.batch_encoding(names, pad, _choice("return_tensors", return_tensors, TENSORS))
        if not is_batched and return_tensors is None and not return_overflowing_tokens:
            rows.update({name: row[0] if isinstance(row[0], list) else row for name, row in rows.items()})
        return rows

    def _wants(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _limits(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> tuple[Padding, dict[str, Any] | None]:
        """How to pad, and the backend's truncation arguments (None: do not cut), checked."""
        if max_length is not None:
            _count("max_length", max_length, 1)
        if multiple is not None:
            _count("pad_to_multiple_of", multiple, 1)
        if truncation is None:
            truncation = max_length is not None and padding is False
        padding = _choice("padding", padding, PADDING)
        truncation = _choice("truncation", truncation, TRUNCATION)
        if padding == "longest" and max_length is not None and truncation is None:
            warnings.warn(
                "max_length does nothing where padding=True and truncation is off; to pad up to it, pass "
                "padding='max_length'",
                stacklevel=3,
            )
        if max_length is None and self.model_max_length < NO_LIMIT:
            max_length = self.model_max_length
        if padding == "max_length" and max_length is None:
            raise ValueError("padding='max_length' needs max_length: this tokenizer has no model_max_length")
        cuts = truncation is not None and max_length is not None
        if cuts and padding and multiple and max_length % multiple:
            raise ValueError(f"max_length={max_length} must be a multiple of pad_to_multiple_of={multiple}")
        left = _choice("padding_side", self.padding_side if side is None else side, SIDES) == "left"
        pad = Padding(padding, max_length, multiple, left, self.pad_token, self.pad_token_id)
        cut = {"max_length": max_length, "strategy": truncation, "direction": self.truncation_side}
        return pad, cut if cuts else None

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The input_ids alone; options as for a call."""
        return self(text, text_pair, add_special_tokens, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens as strings; options as for a call."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens, **options))

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad what was tokenized before: one encoding, a list of them (as a DataLoader collates), or a dict of lists.

        Other keys than the tokenizer's own stay as they are. Raises ValueError where input_ids are missing.
        """
        _choice("return_tensors", return_tensors, TENSORS)
        if not isinstance(encoded_inputs, Mapping):
            examples = list(encoded_inputs)
            encoded_inputs = {key: [example[key] for example in examples] for key in (examples[0] if examples else ())}
        if "input_ids" not in encoded_inputs:
            raise ValueError(f"encoded_inputs must have input_ids, got {', '.join(encoded_inputs) or 'nothing'}")
        columns = {key: _as_lists(value) for key, value in encoded_inputs.items()}
        single = not columns["input_ids"] or isinstance(columns["input_ids"][0], int)
        if single:
            columns = {key: [value] for key, value in columns.items()}
        if self._wants("attention_mask", return_attention_mask):
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        pad, _ = self._limits(padding, False, max_length, pad_to_multiple_of, padding_side)
        data = pad.columns(columns, pad.length(columns["input_ids"]), return_tensors)
        return BatchEncoding({key: value[0] for key, value in data.items()} if single else data)

    # Ids to text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str | list[str]:
        """Text of ids (an int, a list, an array or a tensor); a list of texts for several rows of ids.

        Ids beyond the vocabulary are left out. Raises ValueError for negative ids, such as the label -100.
        """
        token_ids = _as_lists(token_ids)
        rows = token_ids if isinstance(token_ids, list) else [token_ids]
        is_batched = bool(rows) and isinstance(rows[0], list)
        rows = rows if is_batched else [rows]
        try:
            texts = self._tokenizer.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise _wrong_ids("token_ids", rows, error) from None
        if self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            texts = [wordpiece.clean_up(text) for text in texts]
        return texts if is_batched else texts[0]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else texts

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of several; None for an id beyond the vocabulary."""
        ids = _as_lists(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        try:
            if isinstance(ids, int):
                return self._tokenizer.id_to_token(ids)
            return [self._tokenizer.id_to_token(index) for index in ids if index not in skipped]
        except (TypeError, OverflowError) as error:
            raise _wrong_ids("ids", [ids], error) from None

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """The id of a token, or the ids of several; the unknown token's id for what is not in the vocabulary."""
        if isinstance(tokens, str):
            index = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._tokenizer.decoder.decode(tokens)

    # The vocabulary

    @property
    def backend_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, without those added to it; `len(tokenizer)` counts both."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)

    @property
    def unk_token_id(self) -> int:
        return self._tokenizer.token_to_id(self.unk_token)

    @property
    def sep_token_id(self) -> int:
        return self._tokenizer.token_to_id(self.sep_token)

    @property
    def pad_token_id(self) -> int:
        return self._tokenizer.token_to_id(self.pad_token)

    @property
    def cls_token_id(self) -> int:
        return self._tokenizer.token_to_id(self.cls_token)

    @property
    def mask_token_id(self) -> int:
        return self._tokenizer.token_to_id(self.mask_token)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in NAMED_TOKENS}

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._tokenizer.num_special_tokens_to_add(pair)

    def get_special_tokens_mask(self, token_ids: Any) -> list[int]:
        """1 for each of `token_ids` that is a special token, else 0."""
        special = set(self.all_special_ids)
        return [int(index in special) for index in _as_lists(token_ids)]

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens at the end of the vocabulary and return how many are new (resize_token_embeddings comes next)."""
        new_tokens = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        backend = copy.deepcopy(self._tokenizer)  # batches of before keep the tokenizer that made them
        add = backend.add_special_tokens if special_tokens else backend.add_tokens
        count = add(new_tokens)
        self._tokenizer = backend
        return count

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Set special tokens by name ("mask_token", ...; "extra_special_tokens" takes a list), adding what is new."""
        special_tokens_dict = dict(special_tokens_dict)
        extra = special_tokens_dict.pop("additional_special_tokens", None)
        extra = special_tokens_dict.pop("extra_special_tokens", extra)
        for name in special_tokens_dict:
            _choice("special_tokens_dict", name, dict.fromkeys((*NAMED_TOKENS, "extra_special_tokens")))
        count = self.add_tokens([*special_tokens_dict.values(), *(extra or ())], special_tokens=True)
        for name, token in special_tokens_dict.items():
            setattr(self, name, str(token))
        if extra is not None:
            self.extra_special_tokens = [str(token) for token in extra]
        self._set_template()
        return count

    def _add_known(self, by_id: Mapping[int, AddedToken], special: list[str | AddedToken]) -> None:
        """Register the tokens that a tokenizer starts with beyond its vocabulary, each at the id that it must have."""
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

    def _set_template(self) -> None:
        """[CLS] A [SEP], or [CLS] A [SEP] B [SEP] with type 1 from B on (Devlin et al. 2019, section 3)."""
        cls, sep = self.cls_token, self.sep_token
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, self.cls_token_id), (sep, self.sep_token_id)],
        )

    def __repr__(self) -> str:
        return (
            f"BertTokenizer(vocab_size={self.vocab_size}, do_lower_case={self.do_lower_case}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )


BertTokenizerFast = BertTokenizer


def _choice(name: str, value: Any, allowed: Mapping[Any, Any]) -> Any:
    """What `allowed` maps the argument's value to; ValueError if it does not list it."""
    for key, meaning in allowed.items():
        if isinstance(value, type(key)) and key == value:  # by type too, since 1 == True
            return meaning
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")
    return value


def _wrong_ids(name: str, rows: Any, error: Exception) -> ValueError:
    numbers = (index for row in rows if isinstance(row, list) for index in row)
    wrong = next((index for index in numbers if not isinstance(index, int) or index < 0), rows)
    return ValueError(f"{name} must be whole numbers from 0 up, got {wrong!r:.60} ({error})")


def _as_lists(values: Any) -> Any:
    """Tensors and arrays, also within a list, as lists of int; anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, (list, tuple)) and values and not isinstance(values[0], int):
        return [_as_lists(value) for value in values]
    return list(values) if isinstance(values, tuple) else values

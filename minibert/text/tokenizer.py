"""Text to token ids and back: BERT's WordPiece, on the `tokenizers` library."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece

from minibert.checks import check_choice, check_count
from minibert.text import files, wordpiece
from minibert.text.encoding import BatchEncoding
from minibert.text.padding import Padding
from minibert.text.request import Request, as_batch
from minibert.text.vocabulary import Vocabulary, as_lists, wrong_ids
from minibert.weights import hub
from minibert.weights.files import write

# Of the constructor's variables, those that are no settings to make a like tokenizer from
NO_SETTING = ("self", "ignored", "__class__", "vocab", "vocab_file", "tokenizer_file", "tokenizer_object")
# Of a call's variables, those that are no options
TEXTS = frozenset(
    ("self", "text", "text_pair", "text_target", "text_pair_target", "max_target_length", "tokenizer_kwargs")
)
NO_LIMIT = int(1e30)  # what transformers writes as model_max_length when nothing is known
PADDING = {False: None, True: "longest", "longest": "longest", "max_length": "max_length", "do_not_pad": None}
TRUNCATION = {False: None, True: "longest_first", "do_not_truncate": None} | {
    name: name for name in ("longest_first", "only_first", "only_second")
}
SIDES = ("right", "left")
TENSORS = (None, "pt", "np")
COLUMNS = {  # of the result, in order, beside input_ids -> the option that asks for it
    "token_type_ids": "return_token_type_ids",
    "attention_mask": "return_attention_mask",
    "special_tokens_mask": "return_special_tokens_mask",
    "offset_mapping": "return_offsets_mapping",
    "length": "return_length",
}
Text = str | Sequence[str]  # a sequence of words where is_split_into_words=True


class BertTokenizer(Vocabulary):
    """Splits text into WordPiece tokens and numbers them, as transformers' BertTokenizer does, id for id.

    vocab is a vocab.txt (one token a line, its id the line's number from 0) or a dict from token to id; vocab_file is
    another name for it. strip_accents=None means "as do_lower_case", as in the original BERT. model_max_length is the
    length that `truncation=True` cuts to. A special token that the vocabulary lacks is added at its end.

    >>> tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
    >>> batch = tokenizer(["One text.", "Another."], padding=True, return_tensors="pt")
    >>> model(**batch)

    Calls may come from several threads, and from processes forked at any time. Setting a special token or its id
    (`tokenizer.mask_token = "<mask>"`) to one that the vocabulary lacks adds it. Chat templates are left out, since
    BERT has no chats, and no warning says that a text is too long: the model refuses it.
    """

    is_fast = True
    pad_token_type_id = 0
    init_inputs = ()
    backend, model = "tokenizers", WordPiece
    vocab_files_names = {"vocab_file": "vocab.txt", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012

    def __init__(
        self,
        vocab: str | os.PathLike[str] | Mapping[str, int] | None = None,
        do_lower_case: bool = True,
        unk_token: str | AddedToken = "[UNK]",
        sep_token: str | AddedToken | None = "[SEP]",
        pad_token: str | AddedToken | None = "[PAD]",
        cls_token: str | AddedToken | None = "[CLS]",
        mask_token: str | AddedToken | None = "[MASK]",
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        *,
        vocab_file: str | os.PathLike[str] | None = None,
        tokenizer_file: str | os.PathLike[str] | None = None,
        tokenizer_object: Tokenizer | None = None,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        extra_special_tokens: Iterable[str | AddedToken] | None = None,
        additional_special_tokens: Iterable[str | AddedToken] | None = None,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        name_or_path: str = "",
        **ignored: Any,
    ):
        """tokenizer_object (a WordPiece `tokenizers.Tokenizer`, taken over), or a tokenizer.json as tokenizer_file,
        stands in for a vocabulary.

        added_tokens_decoder holds tokens beyond the vocabulary by id. clean_up_tokenization_spaces makes `decode` join
        "don ' t". split_special_tokens treats [MASK] in a text as text. Arguments of transformers that change nothing
        here (`files.IGNORED`) are taken too.

        Raises ValueError for an impossible vocabulary, side or token, FileNotFoundError for a missing file.
        """
        self.init_kwargs = {name: value for name, value in locals().items() if name not in NO_SETTING}
        files.check_ignored(type(self).__name__, ignored)
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        self.model_max_length = NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side = check_choice("padding_side", padding_side, SIDES)
        self.truncation_side = check_choice("truncation_side", truncation_side, SIDES)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self.name_or_path = name_or_path

        backend = files.backend_from(vocab, vocab_file, tokenizer_file, tokenizer_object, str(unk_token))
        wordpiece.set_normalizer(backend, do_lower_case, strip_accents, tokenize_chinese_chars)
        named = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "sep_token": sep_token,
                 "pad_token": pad_token, "cls_token": cls_token, "mask_token": mask_token}  # fmt: skip
        extra = extra_special_tokens if additional_special_tokens is None else additional_special_tokens
        super().__init__(backend, named, extra or (), added_tokens_decoder or {})

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | hub.Source,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
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
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            subfolder=subfolder,
        )
        arguments = files.load(source.file, settings)
        if arguments is None:
            raise FileNotFoundError(f"{source.name!r} has neither tokenizer.json nor vocab.txt")
        return cls(**{"name_or_path": source.name} | arguments)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **ignored: Any) -> tuple[str, ...]:
        """Write vocab.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json; return their paths.

        transformers' `legacy_format` is taken and changes nothing. Each file appears whole.
        """
        files.check_ignored("save_pretrained", ignored)
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"save_directory must be a directory, {directory} is a file")
        directory.mkdir(parents=True, exist_ok=True)
        names = self.special_tokens_map
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
            "split_special_tokens": self.split_special_tokens,
        }  # fmt: skip
        contents = {
            "vocab.txt": wordpiece.vocab_lines(self._tokenizer),
            "tokenizer.json": self._tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "special_tokens_map.json": json.dumps(names | extra, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in contents.items():
            write(directory / name, content)
        return tuple(str(directory / name) for name in contents)

    # Text to ids

    def __call__(
        self,
        text: Text | Sequence[Text] | Sequence[tuple[Text, Text]] | None = None,
        text_pair: Text | Sequence[Text] | None = None,
        text_target: Any = None,
        text_pair_target: Any = None,
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
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        max_target_length: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchEncoding:
        """Tokenize a text, a pair of texts, or a list of either (a pair in a list is a tuple, or comes by text_pair).

        padding: False, True or "longest" (of the batch), "max_length". truncation: False, True or "longest_first",
        "only_first", "only_second"; None cuts if max_length is given without padding. max_length, in tokens with the
        special ones, defaults to model_max_length; where that is unknown too, truncation=True cuts nothing.
        return_overflowing_tokens keeps what was cut off as further rows, each repeating `stride` tokens of the row
        before; overflow_to_sample_mapping then says which text a row is of. split_special_tokens: of this call, instead
        of the tokenizer's. text_target, tokenized alike but for its max_length, max_target_length, comes out as labels,
        or as the result where there is no text. tokenizer_kwargs hold further of these options. verbose, of
        transformers, changes nothing.

        Returns input_ids, token_type_ids and attention_mask (and what else was asked for): for one text lists (T,),
        for several lists (B, T_i), with return_tensors "pt" or "np" int64 tensors or arrays (B, T).

        Raises TypeError for input that is no text, ValueError for text that is not Unicode (a lone surrogate), an
        unknown choice, a max_length too small for the special tokens or rows of different lengths as a tensor.
        """
        options = {name: value for name, value in locals().items() if name not in TEXTS} | dict(tokenizer_kwargs or {})
        if text_target is None:
            return self._encode(text, text_pair, **options)
        of_target = {} if max_target_length is None else {"max_length": max_target_length}
        target = self._encode(text_target, text_pair_target, **options | of_target)
        if text is None:
            return target
        batch = self._encode(text, text_pair, **options)
        batch["labels"] = target["input_ids"]
        return batch

    def _encode(
        self,
        text: Any,
        text_pair: Any,
        *,
        add_special_tokens: bool,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
        is_split_into_words: bool,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        return_tensors: str | None,
        return_overflowing_tokens: bool,
        split_special_tokens: bool | None,
        verbose: bool,
        **asked: bool | None,
    ) -> BatchEncoding:
        batch, is_batched = as_batch(text, text_pair, is_split_into_words)
        pad, cut = self._limits(padding, truncation, max_length, pad_to_multiple_of, padding_side)
        if cut is not None and return_overflowing_tokens:
            cut["stride"] = check_count("stride", stride, 0)
        split_special = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        request = Request(
            self._tokenizer, batch, add_special_tokens, is_split_into_words, split_special, cut,
            return_overflowing_tokens,
        )  # fmt: skip
        tensors = check_choice("return_tensors", return_tensors, TENSORS)
        names = [name for name, option in COLUMNS.items() if self._wants(name, asked.pop(option))]
        for name in asked:
            raise TypeError(f"the tokenizer has no option {name!r}")
        rows = request.batch_encoding(["input_ids", *names], pad, tensors)
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
            check_count("max_length", max_length, 1)
        if multiple is not None:
            check_count("pad_to_multiple_of", multiple, 1)
        if truncation is None:
            truncation = max_length is not None and padding is False
        padding = PADDING[check_choice("padding", padding, PADDING)]
        truncation = TRUNCATION[check_choice("truncation", truncation, TRUNCATION)]
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
        left = check_choice("padding_side", self.padding_side if side is None else side, SIDES) == "left"
        if padding and self.pad_token is None:
            raise ValueError(f"padding={padding!r}: this tokenizer has no pad_token, set one to pad with")
        pad = Padding(padding, max_length, multiple, left, self.pad_token or "", self.pad_token_id or 0)
        cut = {"max_length": max_length, "strategy": truncation, "direction": self.truncation_side}
        return pad, cut if cuts else None

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The input_ids alone; options as for a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

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
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad what was tokenized before: one encoding, a list of them (as a DataLoader collates), or a dict of lists.

        Other keys than the tokenizer's own stay as they are. Of tensors come tensors and of arrays arrays, unless
        return_tensors says otherwise. Raises ValueError where input_ids are missing.
        """
        check_choice("return_tensors", return_tensors, TENSORS)
        if not isinstance(encoded_inputs, Mapping):
            examples = list(encoded_inputs)
            encoded_inputs = {key: [example[key] for example in examples] for key in (examples[0] if examples else ())}
        if "input_ids" not in encoded_inputs:
            raise ValueError(f"encoded_inputs must have input_ids, got {', '.join(encoded_inputs) or 'nothing'}")
        tensors = _kind(encoded_inputs["input_ids"]) if return_tensors is None else return_tensors
        columns = {key: as_lists(value) for key, value in encoded_inputs.items()}
        single = not columns["input_ids"] or isinstance(columns["input_ids"][0], int)
        if single:
            columns = {key: [value] for key, value in columns.items()}
        if self._wants("attention_mask", return_attention_mask):
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        pad, _ = self._limits(padding, False, max_length, pad_to_multiple_of, padding_side)
        data = pad.columns(columns, pad.length(columns["input_ids"]), tensors)
        return BatchEncoding({key: value[0] for key, value in data.items()} if single else data)

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens one text may have, without the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=False)

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens two texts may have together, without the special ones."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    # Ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **ignored: Any,
    ) -> str | list[str]:
        """Text of ids (an int, a list, an array or a tensor, or a batch's dict); a list of texts for several rows.

        Ids beyond the vocabulary are left out. Raises ValueError for negative ids, such as the label -100.
        """
        files.check_ignored("decode", ignored)
        token_ids = as_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        rows = token_ids if isinstance(token_ids, list) else [token_ids]
        is_batched = bool(rows) and isinstance(rows[0], list)
        rows = rows if is_batched else [rows]
        try:
            texts = self._tokenizer.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise wrong_ids("token_ids", rows, error) from None
        texts = [wordpiece.without_placeholders(text) for text in texts]
        if self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            texts = [wordpiece.clean_up(text) for text in texts]
        return texts if is_batched else texts[0]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        texts = self.decode(sequences, skip_special_tokens, **options)
        return [texts] if isinstance(texts, str) else texts

    # A like tokenizer

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[list[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **options: Any,
    ) -> BertTokenizer:
        """A tokenizer that splits text as this one does, with `vocab_size` pieces learnt from other texts.

        text_iterator gives texts or lists of texts, `length` of them (for the progress bar). The special tokens come
        first, under the names that special_tokens_map gives them, and new_special_tokens after them. options go to
        `tokenizers.trainers.WordPieceTrainer`.
        """
        new, renamed = list(new_special_tokens or ()), dict(special_tokens_map or {})
        backend = self._trained(text_iterator, vocab_size, length, new, renamed, options)
        named = {name: renamed.get(token, token) for name, token in self.special_tokens_map.items()}
        extra = [*(renamed.get(token, token) for token in self.extra_special_tokens), *new]
        settings = {name: getattr(self, name) for name in files.SETTINGS if name not in files.TOKENS}
        return type(self)(tokenizer_object=backend, **settings, **named, extra_special_tokens=extra)

    def __repr__(self) -> str:
        return (
            f"BertTokenizer(vocab_size={self.vocab_size}, do_lower_case={self.do_lower_case}, "
            f"model_max_length={self.model_max_length}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )


BertTokenizerFast = BertTokenizer


def _kind(values: Any) -> str | None:
    """Which of "pt" and "np" the values are, tensors or arrays, alone or in a list; None for neither."""
    while isinstance(values, (list, tuple)) and values:
        values = values[0]
    if isinstance(values, np.ndarray):
        return "np"
    return "pt" if hasattr(values, "detach") else None

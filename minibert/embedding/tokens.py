"""Texts and pairs to ids, none longer than the encoder takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minibert.embedding.texts import Text
from minibert.text.request import Request
from minibert.text.tokenizer import BertTokenizer


@dataclass(frozen=True)
class Tokens:
    """ids of each text; types: which of a pair's texts each token is of. cut: how many texts were longer."""

    ids: list[list[int]]
    types: list[list[int]]
    cut: int


def tokenize(tokenizer: BertTokenizer, texts: Sequence[Text], prompt: str, limit: int) -> Tokens:
    """At most `limit` tokens of each text, behind the prompt. Of a pair, the prompt is put before its first text."""
    ids: list[list[int]] = [[]] * len(texts)
    types: list[list[int]] = [[]] * len(texts)
    single = [i for i, text in enumerate(texts) if isinstance(text, str)]
    pairs = [i for i, text in enumerate(texts) if not isinstance(text, str)]
    rows, cut = _singles(tokenizer, [prompt + text for text in texts if isinstance(text, str)], limit)
    for i, row in zip(single, rows, strict=True):
        ids[i], types[i] = row, [0] * len(row)
    if pairs:
        joined = [(prompt + text[0], text[1]) for text in texts if not isinstance(text, str)]
        rows, kinds, longer = _pairs(tokenizer, joined, limit)
        for i, row, kind in zip(pairs, rows, kinds, strict=True):
            ids[i], types[i] = row, kind
        cut += longer
    return Tokens(ids, types, cut)


def prompt_tokens(tokenizer: BertTokenizer, prompt: str) -> int:
    """How many of a text's tokens are before it if it follows a prompt, [CLS] included."""
    return len(tokenizer(prompt)["input_ids"]) - 1  # without [SEP]


def _pairs(
    tokenizer: BertTokenizer, pairs: list[tuple[str, str]], limit: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Ids, types, and how many were cut: tokens are taken from the longer text first, as the tokenizer does."""
    firsts, seconds = [list(texts) for texts in zip(*pairs, strict=True)]
    whole = tokenizer(firsts, seconds, return_attention_mask=False)["input_ids"]
    kept = tokenizer(firsts, seconds, truncation=True, max_length=limit, return_attention_mask=False)
    return kept["input_ids"], kept["token_type_ids"], sum(len(row) > limit for row in whole)


def _singles(tokenizer: BertTokenizer, texts: list[str], limit: int) -> tuple[list[list[int]], int]:
    """Ids of each text, at most `limit`, and how many texts were longer.

    Of a very long text only a beginning is tokenized, if it holds enough. A word that is cut in two changes no more
    than its own tokens, and a word of many tokens is one [UNK].
    """
    enough = limit + tokenizer.backend_tokenizer.model.max_input_chars_per_word + 28
    from_right = tokenizer.truncation_side == "left"
    characters = max(map(len, texts), default=0) if from_right else 8 * enough
    rows = _ids(tokenizer, [text[:characters] for text in texts])
    while again := [i for i, text in enumerate(texts) if len(rows[i]) < enough and len(text) > characters]:
        characters *= 4
        for i, row in zip(again, _ids(tokenizer, [texts[i][:characters] for i in again]), strict=True):
            rows[i] = row
    cut = [i for i, row in enumerate(rows) if len(row) > limit]
    for i in cut:
        row = rows[i]
        rows[i] = [row[0], *row[-limit + 1 :]] if from_right else [*row[: limit - 1], row[-1]]
    return rows, len(cut)


def _ids(tokenizer: BertTokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    if type(tokenizer).__call__ is not BertTokenizer.__call__:
        return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    # The same, without the rest of a call, which takes longer than to tokenize a short text
    request = Request(
        tokenizer.backend_tokenizer, texts, add_special_tokens=True, is_split_into_words=False,
        split_special_tokens=tokenizer.split_special_tokens, cut=None, overflow=False,
    )  # fmt: skip
    return [encoding.ids for encoding in request.encode(offsets=False)[0]]

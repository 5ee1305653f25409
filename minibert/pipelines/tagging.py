"""A label for each token, and tokens joined to words and entities (section 5.3).

Strategies and word grouping are those of transformers 5.23's token-classification pipeline, quirks included: what it
takes for the continuation of a word is a token whose text is not as long as what it stands for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from minibert.checks import check_choice, check_count, check_text, shown
from minibert.heads import BertForTokenClassification
from minibert.pipelines.base import Pipeline, rows_of, windows
from minibert.pipelines.items import place
from minibert.text.tokenizer import BertTokenizer

STRATEGIES = ("none", "simple", "first", "average", "max")

Entity = dict[str, Any]


@dataclass
class Token:
    """scores: (labels,) probabilities. index: its number in the row given to the model. continues: see above."""

    word: str
    scores: np.ndarray
    start: int
    end: int
    index: int
    continues: bool


class TokenClassificationPipeline(Pipeline):
    """The entities in each text.

    >>> tag = pipeline("ner", "directory-or-name", aggregation_strategy="simple")
    >>> tag("Sarah lives in London.")
    [{'entity_group': 'PER', 'score': 0.99, 'word': 'sarah', 'start': 0, 'end': 5}, ...]
    """

    task = "token-classification"
    model_class = BertForTokenClassification
    takes_tokenizer_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        stride: int | None = None,
        **options: Any,
    ):
        super().__init__(model, tokenizer, **options)
        self.defaults = (aggregation_strategy, tuple(ignore_labels), stride)
        self._check_options(*self.defaults)

    def __call__(
        self,
        inputs: Any,
        aggregation_strategy: str | None = None,
        ignore_labels: Sequence[str] | None = None,
        stride: int | None = None,
        *,
        is_split_into_words: bool = False,
        delimiter: str = " ",
        offset_mapping: Sequence[Any] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> Any:
        """For one text a list of dicts in reading order; for several texts a list of such lists.

        aggregation_strategy "none": one dict a token: entity (its label), score, index, word, start, end. "simple":
        neighbours of one kind joined, B- beginning a new entity: entity_group, score (the mean), word, start, end.
        "first", "average", "max": the same, but each word has one label, that of its first token, of the mean of its
        tokens' scores, or of its surest token. start and end are characters of the text. Labels in ignore_labels are
        left out.

        A text longer than the model takes is cut with a warning; with stride it is tagged in windows that overlap by so
        many tokens, and of entities that overlap the longer one stays. With is_split_into_words an input is a list of
        words, and start and end count in the words joined by `delimiter`; as in transformers, several inputs and one
        both give a list of lists. offset_mapping gives the start and end of each token, special tokens included, in
        place of the tokenizer's, for one text or as a list for several: for texts that were changed before.

        Raises TypeError for input of another kind, ValueError for an unknown strategy or an impossible stride.
        """
        self._refuse_in_call(unknown)
        given = (aggregation_strategy, None if ignore_labels is None else tuple(ignore_labels), stride)
        options = [default if value is None else value for value, default in zip(given, self.defaults, strict=True)]
        self._check_options(*options)
        if is_split_into_words and isinstance(inputs, (list, tuple)) and all(isinstance(word, str) for word in inputs):
            inputs = [inputs] if inputs else []
        joint = delimiter if is_split_into_words else None
        given_offsets = None if offset_mapping is None else _listed(offset_mapping, inputs)
        return self._answer(inputs, options=options, joint=joint, given_offsets=given_offsets, batch_size=batch_size)

    def _check_options(self, strategy: str, ignored: Iterable[str], stride: int | None) -> None:
        check_choice("aggregation_strategy", strategy, STRATEGIES)
        if stride is not None:
            check_count("stride", stride, 0, self.longest - 3)  # a window has [CLS], [SEP] and something new
            if strategy == "none":
                raise ValueError("stride needs an aggregation_strategy other than 'none', which joins the windows")

    def _check(self, item: Any, name: str) -> str | list[str]:
        if isinstance(item, (list, tuple)):
            return [check_text(word, f"{name}[{i}]") for i, word in enumerate(item)]
        return check_text(item, name)

    def _results(
        self,
        items: list,
        first: int | None,
        *,
        options: list,
        joint: str | None,
        given_offsets: list[list[tuple[int, int]]] | None,
        batch_size: int | None,
    ) -> list[list[Entity]]:
        for i, item in enumerate(items):
            if isinstance(item, str) != (joint is None):
                wanted = "a str" if joint is None else "a list of words, as is_split_into_words=True says"
                raise TypeError(f"{place(i, first)} must be {wanted}; got {shown(item)}")
        strategy, ignored, stride = options
        split = joint is not None
        encoded = self.tokenizer(
            items, add_special_tokens=False, truncation=False, return_offsets_mapping=True, is_split_into_words=split
        )
        parts = [self._windows(len(ids), stride, place(i, first)) for i, ids in enumerate(encoded["input_ids"])]
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = [[cls, *ids[start:end], sep]
                for ids, spans in zip(encoded["input_ids"], parts, strict=True) for start, end in spans]  # fmt: skip
        logits = iter(
            self._run(
                {"input_ids": rows},
                lambda runner, batch, spans: rows_of(runner(**batch).logits, spans),
                batch_size,
            )
        )
        results = []
        for i, (item, spans) in enumerate(zip(items, parts, strict=True)):
            offsets = encoded["offset_mapping"][i]
            if joint is not None:
                item, offsets = _joined(item, offsets, encoded.word_ids(i), joint)
            if given_offsets is not None:
                offsets = _of_tokens(given_offsets[i], len(offsets), place(i, first))
            found = []
            for start, end in spans:
                scores = _softmax(next(logits)[1:-1])
                tokens = self._tokens(item, encoded["input_ids"][i][start:end], offsets[start:end], scores)
                entities = self._aggregate(tokens, strategy)
                found += [
                    entity for entity in entities if (entity.get("entity") or entity["entity_group"]) not in ignored
                ]
            results.append(_longest_of_overlapping(found) if len(spans) > 1 else found)
        return results

    def _windows(self, length: int, stride: int | None, name: str) -> list[tuple[int, int]]:
        room = self.longest - 2
        if length > room and stride is None:
            warnings.warn(
                f"{name} has {length + 2} tokens and is cut to {self.longest}: pass stride= to tag all of it",
                stacklevel=5,
            )
        spans = windows(length, room, stride or 0)
        return spans if stride is not None else spans[:1]

    def _tokens(self, text: str, ids: list[int], offsets: list[tuple[int, int]], scores: np.ndarray) -> list[Token]:
        tokens = []
        for i, (word, index, (start, end)) in enumerate(
            zip(self.tokenizer.convert_ids_to_tokens(ids), ids, offsets, strict=True)
        ):
            unknown, stands_for = index == self.tokenizer.unk_token_id, text[start:end]
            continues = not unknown and len(word) != len(stands_for)
            tokens.append(Token(stands_for if unknown else word, scores[i], start, end, i + 1, continues))
        return tokens

    def _aggregate(self, tokens: list[Token], strategy: str) -> list[Entity]:
        if strategy in ("none", "simple"):
            entities = [self._entity(token.scores, token.word, token, token) for token in tokens]
            if strategy == "simple":
                return self._grouped(entities)
            return [
                {"entity": entity["entity"], "score": entity["score"], "index": token.index, "word": token.word,
                 "start": token.start, "end": token.end}
                for entity, token in zip(entities, tokens, strict=True)
            ]  # fmt: skip
        words: list[list[Token]] = []
        for token in tokens:
            if words and token.continues:
                words[-1].append(token)
            else:
                words.append([token])
        return self._grouped([self._word(word, strategy) for word in words])

    def _word(self, tokens: list[Token], strategy: str) -> Entity:
        if strategy == "average":
            scores = np.nanmean(np.stack([token.scores for token in tokens]), axis=0)
        else:
            chosen = tokens[0] if strategy == "first" else max(tokens, key=lambda token: token.scores.max())
            scores = chosen.scores
        return self._entity(scores, self._text(token.word for token in tokens), tokens[0], tokens[-1])

    def _entity(self, scores: np.ndarray, word: str, first: Token, last: Token) -> Entity:
        label = int(scores.argmax())
        name = self.model.config.id2label[label]
        return {"entity": name, "score": float(scores[label]), "word": word, "start": first.start, "end": last.end}

    def _grouped(self, entities: list[Entity]) -> list[Entity]:
        """Neighbours with the same tag become one, unless the second begins with B-."""
        groups: list[list[Entity]] = []
        for entity in entities:
            prefix, tag = _tag(entity["entity"])
            if groups and prefix != "B" and tag == _tag(groups[-1][-1]["entity"])[1]:
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": float(np.nanmean([entity["score"] for entity in group])),
                "word": self._text(entity["word"] for entity in group),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]

    def _text(self, words: Iterable[str]) -> str:
        return self.tokenizer.convert_tokens_to_string(list(words))


def _tag(label: str) -> tuple[str, str]:
    """("B" or "I", the rest); a label without these prefixes goes on like I-."""
    return (label[0], label[2:]) if label.startswith(("B-", "I-")) else ("I", label)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _joined(
    words: list[str], offsets: list[tuple[int, int]], word_ids: list[int | None], delimiter: str
) -> tuple[str, list[tuple[int, int]]]:
    """Words as one text, and the tokens' offsets in it instead of in their words."""
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + len(delimiter)
    moves = [0 if word is None else starts[word] for word in word_ids]
    return delimiter.join(words), [(start + m, end + m) for (start, end), m in zip(offsets, moves, strict=True)]


def _listed(offset_mapping: Sequence[Any], inputs: Any) -> list[list[tuple[int, int]]]:
    """The offsets of each input, as a list of lists."""
    if not isinstance(inputs, (str, list, tuple)):
        raise TypeError(f"offset_mapping is for one text or a list of them, not for {shown(inputs)}")
    count = 1 if isinstance(inputs, str) else len(inputs)
    is_single = bool(offset_mapping) and all(isinstance(n, int) for n in offset_mapping[0])
    mappings = [list(offset_mapping)] if is_single else [list(each) for each in offset_mapping]
    if len(mappings) != count:
        raise ValueError(f"offset_mapping is of {len(mappings)} texts, but there are {count}")
    return mappings


def _of_tokens(offsets: list[tuple[int, int]], count: int, name: str) -> list[tuple[int, int]]:
    if len(offsets) != count + 2:
        raise ValueError(f"offset_mapping of {name} has {len(offsets)} pairs, but there are {count + 2} tokens")
    return [(int(start), int(end)) for start, end in offsets[1:-1]]


def _longest_of_overlapping(entities: list[Entity]) -> list[Entity]:
    """Of entities from several windows that overlap, the longest; of those of one length, the surest."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: entity["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
            continue
        sizes = [(each["end"] - each["start"], each["score"]) for each in (entity, kept[-1])]
        if sizes[0] > sizes[1]:
            kept[-1] = entity
    return kept

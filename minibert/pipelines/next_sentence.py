"""Whether one text follows another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minibert.checks import shown
from minibert.heads import BertForNextSentencePrediction, NextSentence
from minibert.pipelines.base import Pipeline
from minibert.pipelines.items import Pair, as_pair, check_pair
from minibert.text.tokenizer import BatchEncoding


class NextSentencePipeline(Pipeline):
    """Does the second text follow the first?

    >>> next_sentence = pipeline("next-sentence-prediction", "bert-base-uncased")
    >>> next_sentence("He opened the door.", "Nobody was there.")
    {'label': 'IS_NEXT', 'score': 0.99, 'probabilities': {'IS_NEXT': 0.99, 'NOT_NEXT': 0.01}}
    """

    task = "next-sentence-prediction"
    model_class = BertForNextSentencePrediction
    item = "a pair (text, text_pair)"

    def __call__(
        self,
        inputs: Any,
        text_pair: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """For one pair a dict: label (of NextSentence), its score, and the probabilities of both labels by name.

        A pair is two arguments, a tuple (text, text_pair), or a dict with these keys; several are a list of them, or
        two lists, and give a list. Raises TypeError for input that is no pair, ValueError for one of too many tokens.
        """
        self._refuse_in_call(unknown)
        if text_pair is not None:
            inputs = _zipped(inputs, text_pair)
        return self._answer(inputs, batch_size=batch_size, tokenizer_kwargs=tokenizer_kwargs)

    def _check(self, item: Any, name: str) -> Pair:
        return check_pair(item, name)

    def _is_one(self, inputs: Any) -> bool:
        return as_pair(inputs) is not None and not isinstance(inputs, list)  # ["a", "b"] could also be two texts

    def _results(
        self,
        pairs: list[Pair],
        first: int | None,
        *,
        batch_size: int | None,
        tokenizer_kwargs: Mapping[str, Any] | None,
    ) -> list[dict[str, Any]]:
        return self._run(self._encode(pairs, first, tokenizer_kwargs), self._judge, batch_size)

    def _judge(self, runner: nn.Module, batch: BatchEncoding, _: list[slice]) -> list[dict[str, Any]]:
        rows = runner(**batch).logits.float().softmax(-1).tolist()  # (B, 2)
        results = []
        for row in rows:
            probabilities = {label.name: row[label] for label in NextSentence}
            label = max(probabilities, key=probabilities.__getitem__)
            results.append({"label": label, "score": probabilities[label], "probabilities": probabilities})
        return results


def _zipped(texts: Any, text_pairs: Any) -> Pair | list[Pair]:
    """Two texts as a pair, or two lists of texts as a list of pairs."""
    if isinstance(texts, str) and isinstance(text_pairs, str):
        return texts, text_pairs
    for name, value in (("inputs", texts), ("text_pair", text_pairs)):
        if not isinstance(value, (str, list, tuple)):
            raise TypeError(f"{name} must be a str or a list of str, got {shown(value)}")
    if isinstance(texts, str) or isinstance(text_pairs, str) or len(texts) != len(text_pairs):
        counts = [1 if isinstance(value, str) else len(value) for value in (texts, text_pairs)]
        raise ValueError(f"inputs has {counts[0]} texts and text_pair {counts[1]}: give both alone or as lists")
    return list(zip(texts, text_pairs, strict=True))

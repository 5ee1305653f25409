"""The tasks of pretraining: the likeliest words at each [MASK], and whether one text follows another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minibert.heads import BertForMaskedLM, BertForNextSentencePrediction, NextSentence
from minibert.pipelines.base import Pipeline
from minibert.pipelines.inputs import Pair, as_pair, check_count, check_pair, check_text, place, shown
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

PROPOSAL = ("score", "token", "token_str", "sequence")  # the fields of an answer to fill-mask


class FillMaskPipeline(Pipeline):
    """The likeliest words at each [MASK].

    >>> fill_mask = pipeline("fill-mask", "bert-base-uncased")
    >>> fill_mask("Paris is the [MASK] of France.", top_k=2)
    [{'score': 0.99, 'token': 3007, 'token_str': 'capital', 'sequence': 'paris is the capital of france.'}, ...]
    """

    task = "fill-mask"
    model_class = BertForMaskedLM

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        **options: Any,
    ):
        super().__init__(model, tokenizer, **options)
        self.top_k, self.targets = self._check_top_k(top_k), targets

    def __call__(
        self,
        inputs: str | Sequence[str],
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> list:
        """For one text a list of dicts, best first: score (its probability), token (id), token_str, sequence.

        Where a text has several masks, a list of such lists, one a mask; each is filled as if the others stayed, so
        scores are not joint. For several texts a list of what each alone would give, but for a list of one text just
        that, as in transformers. targets limits the answers to these words; their scores stay shares of the whole
        vocabulary. A target that is not one token stands for its first one, with a warning.

        Raises TypeError for input that is no text, ValueError for a text without [MASK] or with too many tokens, for
        top_k outside of the vocabulary and for no targets.
        """
        k = self.top_k if top_k is None else self._check_top_k(top_k)
        targets = self.targets if targets is None else targets
        target_ids = None if targets is None else self._target_ids(targets)
        results = self._answer(
            inputs, batch_size=batch_size, tokenizer_kwargs=tokenizer_kwargs, top_k=k, target_ids=target_ids
        )
        return results[0] if isinstance(inputs, (list, tuple)) and len(inputs) == 1 else results

    def _results(
        self,
        texts: list[str],
        first: int | None,
        *,
        top_k: int,
        target_ids: list[int] | None,
        batch_size: int | None,
        tokenizer_kwargs: Mapping[str, Any] | None,
    ) -> list:
        encoded = self._encode(texts, first, tokenizer_kwargs)
        for i, ids in enumerate(encoded["input_ids"]):
            if self.tokenizer.mask_token_id not in ids:
                raise ValueError(
                    f"{place(i, first)} has no {self.tokenizer.mask_token}"
                    + (" left after truncation" if self.tokenizer.mask_token in texts[i] else f": {texts[i]!r:.80}")
                )
        return self._run(encoded, lambda runner, batch: self._fill(runner, batch, top_k, target_ids), batch_size)

    def _fill(self, runner: nn.Module, batch: BatchEncoding, top_k: int, target_ids: list[int] | None) -> list:
        masked = batch["input_ids"] == self.tokenizer.mask_token_id  # (B, T)
        probabilities = self._logits(runner, batch, masked).float().softmax(-1)  # (M, V)
        if target_ids is not None:
            probabilities = probabilities[:, target_ids]
            top_k = min(top_k, len(target_ids))
        scores, found = (part.tolist() for part in probabilities.topk(top_k))  # (M, top_k) each
        if target_ids is not None:
            found = [[target_ids[index] for index in row] for row in found]
        rows = zip(scores, found, strict=True)
        return [self._propose(ids, rows) for ids in batch["input_ids"].tolist()]

    def _logits(self, runner: nn.Module, batch: BatchEncoding, masked: Tensor) -> Tensor:
        """(M, V), the words' scores at the M masks in reading order, and nowhere else: most of the work is there."""
        if self.fast:
            return runner(**batch, positions=masked).logits
        return runner.cls(runner.bert(**batch).last_hidden_state[masked])  # (B, T, D) -> (M, D) -> (M, V)

    def _propose(self, ids: list[int], answers: Iterator[tuple[list[float], list[int]]]) -> list:
        """The answers for one text, which takes those of its masks from `answers`: a list, or one a mask if several."""
        pad, mask = self.tokenizer.pad_token_id, self.tokenizer.mask_token_id
        ids = [index for index in ids if index != pad]
        spots = [spot for spot, index in enumerate(ids) if index == mask]
        proposals = []
        for spot, (scores, tokens) in zip(spots, answers, strict=False):  # takes as many answers as there are spots
            filled = [[*ids[:spot], *[token] * (token != pad), *ids[spot + 1 :]] for token in tokens]
            # Other masks are special tokens too, but their places shall be seen
            sequences = self.tokenizer.batch_decode(filled, skip_special_tokens=len(spots) == 1)
            words = self.tokenizer.batch_decode([[token] for token in tokens])
            fields = zip(scores, tokens, words, sequences, strict=True)
            proposals.append([dict(zip(PROPOSAL, values, strict=True)) for values in fields])
        return proposals[0] if len(proposals) == 1 else proposals

    def _check_top_k(self, top_k: int) -> int:
        return check_count("top_k", top_k, 1, self.model.config.vocab_size)

    def _target_ids(self, targets: str | Sequence[str]) -> list[int]:
        if not isinstance(targets, (str, list, tuple, set)):
            raise TypeError(f"targets must be a str or a list of str, got {shown(targets)}")
        found: dict[int, None] = {}
        for i, target in enumerate([targets] if isinstance(targets, str) else targets):
            check_text(target, f"targets[{i}]")
            token = self.tokenizer.convert_tokens_to_ids(target)
            if token == self.tokenizer.unk_token_id and target != self.tokenizer.unk_token:
                pieces = self.tokenizer.encode(target, add_special_tokens=False)
                instead = repr(self.tokenizer.convert_ids_to_tokens(pieces[0])) if pieces else "nothing"
                warnings.warn(f"target {target!r} is not one token: {instead} is scored instead", stacklevel=3)
                if not pieces:
                    continue
                token = pieces[0]
            found[token] = None
        if not found:
            raise ValueError(f"targets must name at least one word of the vocabulary, got {targets!r}")
        return list(found)


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
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """For one pair a dict: label (of NextSentence), its score, and the probabilities of both labels by name.

        A pair is two arguments, a tuple (text, text_pair), or a dict with these keys; several are a list of them, or
        two lists, and give a list. Raises TypeError for input that is no pair, ValueError for one of too many tokens.
        """
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

    def _judge(self, runner: nn.Module, batch: BatchEncoding) -> list[dict[str, Any]]:
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

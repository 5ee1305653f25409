"""The likeliest words at each [MASK]."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minibert.checks import check_count, check_text, shown
from minibert.heads import BertForMaskedLM
from minibert.pipelines.base import Pipeline, is_plain
from minibert.pipelines.items import place
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
        if tokenizer.mask_token is None:
            raise ValueError("fill-mask needs a tokenizer with a mask_token")
        self.top_k, self.targets = self._check_top_k(top_k), targets

    def __call__(
        self,
        inputs: str | Sequence[str],
        top_k: int | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> list:
        """For one text a list of dicts, best first: score (its probability), token (id), token_str, sequence.

        Where a text has several masks, a list of such lists, one a mask; each is filled as if the others stayed, so
        scores are not joint. For several texts a list of what each alone would give, but for a list of one text just
        that, as in transformers. targets limits the answers to these words; their scores stay shares of the whole
        vocabulary. A target that is not one token stands for its first one, with a warning.

        Raises TypeError for input that is no text, ValueError for a text without [MASK] or with too many tokens, for
        top_k outside of the vocabulary and for no targets.
        """
        self._refuse_in_call(unknown)
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
        return self._run(encoded, lambda runner, batch, _: self._fill(runner, batch, top_k, target_ids), batch_size)

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
        if runner is not self.model:
            return runner(**batch, positions=masked).logits
        if is_plain(self.model, BertForMaskedLM):
            return runner.cls(runner.bert(**batch).last_hidden_state[masked])  # (B, T, D) -> (M, D) -> (M, V)
        return runner(**batch).logits[masked]  # (B, T, V) -> (M, V)

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

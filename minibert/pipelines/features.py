"""The last hidden state of every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minibert.model import BertModel
from minibert.pipelines.base import Pipeline, given_once, rows_of
from minibert.text.tokenizer import BatchEncoding, BertTokenizer


class FeatureExtractionPipeline(Pipeline):
    """A vector for each token of each text. (For one vector a text, see `SentenceEncoder`.)

    >>> extract = pipeline("feature-extraction", "bert-base-uncased")
    >>> extract("A text.", return_tensors=True).shape
    torch.Size([1, 5, 768])
    """

    task = "feature-extraction"
    model_class = BertModel

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        return_tensors: bool = False,
        truncation: bool | str | None = None,
        tokenize_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(getattr(model, "base_model", model), tokenizer, **options)
        self.return_tensors = return_tensors
        self.tokenizer_kwargs |= _for_tokenizer(truncation, tokenize_kwargs)

    @classmethod
    def load(cls, name_or_path: Any, **where: Any) -> nn.Module:
        return BertModel.from_pretrained(name_or_path, add_pooling_layer=False, **where)  # of any head's file

    def __call__(
        self,
        inputs: Any,
        return_tensors: bool | None = None,
        truncation: bool | str | None = None,
        tokenize_kwargs: Mapping[str, Any] | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **unknown: Any,
    ) -> Any:
        """For one text nested lists of float, or with return_tensors a tensor, (1, T, D), special tokens included.

        For several texts a list of these. A model with a head gives the states of its encoder. tokenize_kwargs go to
        the tokenizer; with padding="max_length" or pad_to_multiple_of the states of padding are among the T. Raises
        TypeError for input that is no text, ValueError for too many tokens without truncation.
        """
        self._refuse_in_call(unknown)
        return self._answer(
            inputs,
            as_tensors=self.return_tensors if return_tensors is None else return_tensors,
            tokenizer_kwargs=_for_tokenizer(truncation, tokenize_kwargs),
            batch_size=batch_size,
        )

    def _results(
        self,
        texts: list[str],
        first: int | None,
        *,
        as_tensors: bool,
        tokenizer_kwargs: Mapping[str, Any],
        batch_size: int | None,
    ) -> list:
        encoded = self._encode(texts, first, tokenizer_kwargs)
        is_padded = any(0 in mask for mask in encoded.get("attention_mask", ()))

        def answer(runner: nn.Module, batch: BatchEncoding, spans: list[slice]) -> list:
            model = self.model if is_padded else runner  # the optimized one has zeros where padding is
            rows = rows_of(model(**batch).last_hidden_state, spans)
            return [torch.from_numpy(row)[None] if as_tensors else [row.tolist()] for row in rows]

        return self._run(encoded, answer, batch_size)


def _for_tokenizer(truncation: bool | str | None, tokenize_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    return given_once(tokenize_kwargs, {} if truncation is None else {"truncation": truncation}, "tokenize_kwargs")

"""A label, several, or a number for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minibert.checks import check_choice, check_count, check_text
from minibert.heads import BertForSequenceClassification
from minibert.pipelines.base import TOKENIZER_OPTIONS, Pipeline, given_once
from minibert.pipelines.items import Pair, as_pair, check_pair
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
}
UNSET = ""  # top_k=None means all labels, so that "not given" needs another value


class TextClassificationPipeline(Pipeline):
    """What is said of each text, or of each pair of texts (as a cross-encoder scores a query and a passage).

    >>> classify = pipeline("text-classification", "directory-or-name")
    >>> classify(["A fine day.", "A bad day."])
    [{'label': 'POSITIVE', 'score': 0.99}, {'label': 'NEGATIVE', 'score': 0.98}]
    """

    task = "text-classification"
    model_class = BertForSequenceClassification
    item = "a str, a pair (text, text_pair) or a dict with these keys"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        top_k: int | str | None = UNSET,
        function_to_apply: str | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        for_tokenizer = {name: options.pop(name) for name in TOKENIZER_OPTIONS if name in options}
        kwargs = given_once(tokenizer_kwargs, for_tokenizer, "tokenizer_kwargs")
        super().__init__(model, tokenizer, tokenizer_kwargs=kwargs, **options)
        self.top_k = top_k if top_k in (UNSET, None) else check_count("top_k", top_k)
        self.function_to_apply = self._check_function(function_to_apply)

    def __call__(
        self,
        inputs: Any,
        top_k: int | str | None = UNSET,
        function_to_apply: str | None = None,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **more_for_tokenizer: Any,
    ) -> Any:
        """The likeliest label as {"label", "score"}, or with top_k a list of so many, best first; None: of all labels.

        As in transformers, one str gives a list of one dict where top_k is not given; a pair, or each item of a list,
        gives the dict itself. function_to_apply makes scores of logits: "none", "sigmoid" or "softmax"; by default
        none for a model of problem_type "regression", a sigmoid for "multi_label_classification" and for models of one
        label, else a softmax. Further arguments go to the tokenizer: truncation=True, max_length=128.

        Raises TypeError for input of another kind, ValueError for a text of too many tokens.
        """
        self._refuse_in_call({n: v for n, v in more_for_tokenizer.items() if n not in TOKENIZER_OPTIONS})
        results = self._answer(
            inputs,
            batch_size=batch_size,
            tokenizer_kwargs=given_once(tokenizer_kwargs, more_for_tokenizer, "tokenizer_kwargs"),
            top_k=self.top_k if top_k == UNSET else top_k if top_k is None else check_count("top_k", top_k),
            function=self._check_function(function_to_apply) or self.function_to_apply or self._default_function(),
        )
        return [results] if isinstance(inputs, str) and top_k == UNSET else results

    def _check(self, item: Any, name: str) -> str | Pair:
        if isinstance(item, Mapping) and item.keys() == {"text"}:
            item = item["text"]
        if isinstance(item, list) and len(item) == 1 and as_pair(item[0]):  # [["a", "b"]], as transformers had pairs
            item = item[0]
        return check_pair(item, name) if isinstance(item, (tuple, list, Mapping)) else check_text(item, name)

    def _is_one(self, inputs: Any) -> bool:
        is_pair = as_pair(inputs) is not None and not isinstance(inputs, list)  # ["a", "b"] is two texts
        return isinstance(inputs, (str, Mapping)) or is_pair

    def _results(
        self,
        items: list,
        first: int | None,
        *,
        top_k: int | str | None,
        function: str,
        batch_size: int | None,
        tokenizer_kwargs: Mapping[str, Any],
    ) -> list:
        def answer(runner: nn.Module, batch: BatchEncoding, _: list[slice]) -> list:
            scores = FUNCTIONS[function](runner(**batch).logits.float())  # (B, labels)
            return [self._named(row, top_k) for row in scores.tolist()]

        return self._run(self._encode(items, first, tokenizer_kwargs), answer, batch_size)

    def _named(self, scores: list[float], top_k: int | str | None) -> dict[str, Any] | list[dict[str, Any]]:
        names = self.model.config.id2label
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        best = [{"label": names[label], "score": scores[label]} for label in order]
        return best[0] if top_k == UNSET else best[:top_k]

    def _check_function(self, name: str | None) -> str | None:
        if name is None or name == "default":
            return None
        return check_choice("function_to_apply", name.lower() if isinstance(name, str) else name, FUNCTIONS)

    def _default_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        one = config.problem_type == "multi_label_classification" or config.num_labels == 1
        return "sigmoid" if one else "softmax"

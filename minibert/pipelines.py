"""Text in, answers out: `pipeline("fill-mask", "bert-base-uncased")("Paris is the [MASK] of France.")`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minibert import hub
from minibert.heads import BertForMaskedLM, BertForNextSentencePrediction, NextSentence
from minibert.tokenizer import BatchEncoding, BertTokenizer

# A batch's tokens, padding included. On a CPU larger batches are slower: they leave the caches and hold more padding.
TOKENS_PER_BATCH = {"cpu": 512, "gpu": 16384}
PROPOSAL = ("score", "token", "token_str", "sequence")  # the fields of an answer to fill-mask

Answer = Callable[[BatchEncoding], Sequence[Any]]  # a padded batch of rows -> one result a row


class Pipeline:
    """What the tasks share: checking, tokenizing, batches of texts of like length, results in the order of the input.

    The model is put in eval mode, and stays where it is. batch_size bounds the texts of a batch, whose tokens are
    bounded anyway. tokenizer_kwargs go to each call of the tokenizer; a text of more tokens than the model has
    positions is a ValueError unless {"truncation": True} is among them.
    """

    task: ClassVar[str]
    model_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        batch_size: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ):
        if not isinstance(model, self.model_class):
            raise TypeError(f"{self.task} needs a {self.model_class.__name__}, got {type(model).__name__}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(task={self.task!r}, model={type(self.model).__name__}, device={self.device})"

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _encode(self, texts: list, tokenizer_kwargs: Mapping[str, Any] | None) -> BatchEncoding:
        """Lists of ids of texts or pairs of texts, none longer than the model takes."""
        options = {**self.tokenizer_kwargs, **(tokenizer_kwargs or {})}
        limit = self.model.config.max_position_embeddings
        if options.get("truncation"):
            options.setdefault("max_length", min(limit, self.tokenizer.model_max_length))
        encoded = self.tokenizer(texts, **options)
        for i, ids in enumerate(encoded["input_ids"]):
            if len(ids) > limit:
                raise ValueError(
                    f"{_place(i, texts)} has {len(ids)} tokens, the model takes {limit}: shorten it, or have it cut "
                    "with tokenizer_kwargs={'truncation': True}"
                )
        return encoded

    def _run(self, encoded: BatchEncoding, answer: Answer, batch_size: int | None) -> list[Any]:
        """The results of all rows, computed in batches of rows of like length."""
        from tqdm import tqdm

        lengths = [len(ids) for ids in encoded["input_ids"]]
        results: list[Any] = [None] * len(lengths)
        tokens = TOKENS_PER_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        # On a terminal, and only when it takes longer than a moment
        with tqdm(total=len(lengths), desc=self.task, delay=3, disable=None, leave=False) as bar:
            for rows in batches(lengths, tokens, self.batch_size if batch_size is None else batch_size):
                picked = {name: [column[row] for row in rows] for name, column in encoded.items()}
                batch = self.tokenizer.pad(picked, return_tensors="pt").to(self.device)
                with torch.inference_mode():
                    for row, result in zip(rows, answer(batch), strict=True):
                        results[row] = result
                bar.update(len(rows))
        return results


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
        texts, _ = as_texts(inputs)
        if not texts:
            return []
        k = self.top_k if top_k is None else self._check_top_k(top_k)
        targets = self.targets if targets is None else targets
        target_ids = None if targets is None else self._target_ids(targets)
        encoded = self._encode(texts, tokenizer_kwargs)
        for i, ids in enumerate(encoded["input_ids"]):
            if self.tokenizer.mask_token_id not in ids:
                raise ValueError(
                    f"{_place(i, texts)} has no {self.tokenizer.mask_token}"
                    + (" left after truncation" if self.tokenizer.mask_token in texts[i] else f": {texts[i]!r:.80}")
                )
        results = self._run(encoded, lambda batch: self._fill(batch, k, target_ids), batch_size)
        return results[0] if len(texts) == 1 else results

    def _fill(self, batch: BatchEncoding, top_k: int, target_ids: list[int] | None) -> list:
        masked = batch["input_ids"] == self.tokenizer.mask_token_id  # (B, T)
        probabilities = self._logits(batch, masked).float().softmax(-1)  # (M, V)
        if target_ids is not None:
            probabilities = probabilities[:, target_ids]
            top_k = min(top_k, len(target_ids))
        scores, found = (part.tolist() for part in probabilities.topk(top_k))  # (M, top_k) each
        if target_ids is not None:
            found = [[target_ids[index] for index in row] for row in found]
        rows = zip(scores, found, strict=True)
        return [self._propose(ids, rows) for ids in batch["input_ids"].tolist()]

    def _logits(self, batch: BatchEncoding, masked: Tensor) -> Tensor:
        """(M, V), the words' scores at the M masks in reading order, and nowhere else: most of the work is there."""
        states = self.model.bert(**batch).last_hidden_state  # (B, T, D)
        return self.model.cls(states[masked])

    def _propose(self, ids: list[int], answers: Iterator[tuple[list[float], list[int]]]) -> list:
        """The answers for one text, which takes those of its masks from `answers`: a list, or one a mask if several."""
        pad, mask = self.tokenizer.pad_token_id, self.tokenizer.mask_token_id
        ids = [index for index in ids if index != pad]
        places = [place for place, index in enumerate(ids) if index == mask]
        proposals = []
        for place, (scores, tokens) in zip(places, answers, strict=False):  # takes as many answers as there are places
            filled = [[*ids[:place], *[token] * (token != pad), *ids[place + 1 :]] for token in tokens]
            # Other masks are special tokens too, but their places shall be seen
            sequences = self.tokenizer.batch_decode(filled, skip_special_tokens=len(places) == 1)
            words = self.tokenizer.batch_decode([[token] for token in tokens])
            fields = zip(scores, tokens, words, sequences, strict=True)
            proposals.append([dict(zip(PROPOSAL, values, strict=True)) for values in fields])
        return proposals[0] if len(proposals) == 1 else proposals

    def _check_top_k(self, top_k: int) -> int:
        size = self.model.config.vocab_size
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= size:
            raise ValueError(f"top_k must be a whole number from 1 to the vocabulary's {size}, got {top_k!r}")
        return top_k

    def _target_ids(self, targets: str | Sequence[str]) -> list[int]:
        targets, _ = as_texts(targets, "targets")
        found: dict[int, None] = {}
        for target in targets:
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
        pairs, is_batched = as_pairs(inputs, text_pair)
        if not pairs:
            return []
        results = self._run(self._encode(pairs, tokenizer_kwargs), self._judge, batch_size)
        return results if is_batched else results[0]

    def _judge(self, batch: BatchEncoding) -> list[dict[str, Any]]:
        rows = self.model(**batch).logits.float().softmax(-1).tolist()  # (B, 2)
        results = []
        for row in rows:
            probabilities = {label.name: row[label] for label in NextSentence}
            label = max(probabilities, key=probabilities.__getitem__)
            results.append({"label": label, "score": probabilities[label], "probabilities": probabilities})
        return results


PIPELINES: dict[str, type[Pipeline]] = {kind.task: kind for kind in (FillMaskPipeline, NextSentencePipeline)}


def pipeline(
    task: str,
    model: str | os.PathLike[str] | nn.Module | None = None,
    tokenizer: str | os.PathLike[str] | BertTokenizer | None = None,
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    **options: Any,
) -> Pipeline:
    """A callable for `task`: "fill-mask" or "next-sentence-prediction".

    model is a directory, a name on the Hub, or a model of the class that the task needs; default the model bundled with
    minibert. tokenizer defaults to the one beside it. device: a name, or the number of a GPU (-1: the CPU); default a
    GPU if there is one, and for a ready model the place where it is. dtype, revision, cache_dir, local_files_only and
    token are those of `from_pretrained`. options are the task's own, and defaults for its calls (top_k=3).

    Raises ValueError for an unknown task, and what loading raises.
    """
    if task not in PIPELINES:
        raise ValueError(f"task must be one of {', '.join(map(repr, PIPELINES))}; got {task!r}")
    kind = PIPELINES[task]
    where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
    if model is None:
        model = hub.default_model()
    if tokenizer is None and isinstance(model, nn.Module):
        raise ValueError("tokenizer must be given where model is a ready model and not a name")
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = BertTokenizer.from_pretrained(model if tokenizer is None else tokenizer, **where)
    if isinstance(device, int):
        device = f"cuda:{device}" if device >= 0 else "cpu"
    if isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype={dtype} is for a model given by name; cast a ready one with model.to(dtype)")
        return kind(model if device is None else model.to(device), tokenizer, **options)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = kind.model_class.from_pretrained(model, dtype=dtype, device=device, **where)
    return kind(loaded, tokenizer, **options)


def batches(lengths: Sequence[int], tokens: int, batch_size: int | None) -> Iterator[list[int]]:
    """Numbers of rows in batches, longest first; a batch padded to its longest row has at most so many tokens."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number from 1 up, got {batch_size!r}")
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, tokens // lengths[order[start]])
        end = start + min(size, batch_size or size)
        yield order[start:end]
        start = end


def _place(i: int, texts: Sequence[Any]) -> str:
    return f"inputs[{i}]" if len(texts) > 1 else "inputs"


def as_texts(inputs: Any, name: str = "inputs") -> tuple[list[str], bool]:
    """Texts as a list, and whether they came as one."""
    if isinstance(inputs, str):
        return [inputs], False
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"{name} must be a str or a list of str, got {type(inputs).__name__}")
    for i, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a str, got {type(text).__name__}")
    return list(inputs), True


def as_pairs(inputs: Any, text_pair: Any = None) -> tuple[list[tuple[str, str]], bool]:
    """Pairs of texts as a list, and whether they came as one."""
    if text_pair is not None:
        (first, is_batched), (second, other_is_batched) = as_texts(inputs), as_texts(text_pair, "text_pair")
        if is_batched != other_is_batched or len(first) != len(second):
            raise ValueError(f"inputs has {len(first)} texts and text_pair {len(second)}: give both alone or as lists")
        return list(zip(first, second, strict=True)), is_batched
    if _pair(inputs) is not None and not isinstance(inputs, list):  # ["a", "b"] could also be two texts
        return [_pair(inputs)], False
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs must be a pair (text, text_pair) or a list of pairs, got {type(inputs).__name__}")
    for i, item in enumerate(inputs):
        if _pair(item) is None:
            raise TypeError(f"inputs[{i}] must be a pair (text, text_pair), got {item!r:.60}")
    return [_pair(item) for item in inputs], True


def _pair(item: Any) -> tuple[str, str] | None:
    if isinstance(item, Mapping) and item.keys() == {"text", "text_pair"}:
        item = (item["text"], item["text_pair"])
    is_pair = isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item)
    return tuple(item) if is_pair else None

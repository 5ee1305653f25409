"""What all pipelines share: the items that come in, batches of texts of like length, the module that computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minibert.fast import optimize
from minibert.pipelines.inputs import check_count, check_text, is_stream, place, shown
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

# A batch's tokens, padding included. On a CPU larger batches are slower: they leave the caches and hold more padding.
TOKENS_PER_BATCH = {"cpu": 512, "gpu": 16384}
# Of a stream, so many items or characters are taken at a time, whichever is reached first
STREAM_ITEMS, STREAM_CHARACTERS = 256, 1 << 20

Answer = Callable[[nn.Module, BatchEncoding], Sequence[Any]]  # what computes, a padded batch -> one result a row
Rows = Mapping[str, list]  # columns (input_ids, token_type_ids ...), each a list of rows


class Pipeline:
    """What the tasks share. A pipeline is called with one item, with a list, or with any other iterable.

    A list gives a list. Any other iterable (an iterator, a dataset) gives a generator, which takes some hundred items
    at a time, so memory stays bounded; where one of them is bad, those before it are answered first. With batch_size,
    that many are taken at a time.

    The model is put in eval mode, and stays where it is. fast: compute on `optimize(model)`, which gives the same
    numbers up to rounding; None, the default, does so for float32 models on a CPU, unless a ready model comes in train
    mode. batch_size bounds the texts of a batch, whose tokens are bounded anyway. tokenizer_kwargs go to each call of
    the tokenizer; a text of more tokens than the model has positions is a ValueError unless {"truncation": True} is
    among them. progress: show a bar on standard error when a call takes longer than a moment; None, the default, does
    so on a terminal. Calls may come from several threads.
    """

    task: ClassVar[str]
    model_class: ClassVar[type[nn.Module]]
    item: ClassVar[str] = "a str"  # what the task takes, in errors

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        fast: bool | None = None,
        batch_size: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ):
        if not isinstance(model, self.model_class):
            raise TypeError(f"{self.task} needs a {self.model_class.__name__}, got {type(model).__name__}")
        if fast is None:
            fast = not model.training and model.device.type == "cpu" and model.dtype == torch.float32
        self.model, self.tokenizer, self.fast = model.eval(), tokenizer, fast
        self.batch_size, self.progress = batch_size, progress
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        self._optimized: tuple[list, nn.Module] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        path = ", fast" if self.fast else ""
        return (
            f"{type(self).__name__}(task={self.task!r}, model={type(self.model).__name__}, device={self.device}{path})"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def runner(self) -> nn.Module:
        """What computes: the model, or its optimized form, made on first use and again when the model has changed."""
        if not self.fast:
            return self.model
        # In-place changes count up a parameter's version; another place in memory is another parameter
        state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in self.model.parameters()]
        with self._lock:
            if self._optimized is None or self._optimized[0] != state:
                self._optimized = state, optimize(self.model)
            return self._optimized[1]

    # What the tasks fill in

    @classmethod
    def load(cls, name_or_path: Any, **where: Any) -> nn.Module:
        """The model that the task needs, from a directory or the Hub."""
        return cls.model_class.from_pretrained(name_or_path, **where)

    def _check(self, item: Any, name: str) -> Any:
        """One item as the task takes it. TypeError or ValueError for anything else, with `name`."""
        return check_text(item, name)

    def _is_one(self, inputs: Any) -> bool:
        """Whether the input is one item, and not several."""
        return isinstance(inputs, str)

    def _results(self, items: list, first: int | None, **options: Any) -> list:
        """One result an item. `first`: see `place`."""
        raise NotImplementedError

    # Items to results

    def _answer(self, inputs: Any, **options: Any) -> Any:
        """The result of one item, the list of those of several, or the generator of those of a stream."""
        check_count("batch_size", 1 if (size := options.get("batch_size")) is None else size)
        if self._is_one(inputs):
            return self._results([self._check(inputs, "inputs")], None, **options)[0]
        if is_stream(inputs):
            return self._stream(iter(inputs), **options)
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(f"inputs must be {self.item}, or a list or an iterator of them; got {shown(inputs)}")
        items = [self._check(item, place(i, 0)) for i, item in enumerate(inputs)]
        return self._results(items, 0, **options) if items else []

    def _stream(self, inputs: Iterator, **options: Any) -> Iterator:
        most = options.get("batch_size") or self.batch_size or STREAM_ITEMS
        items, first, characters = [], 0, 0
        while True:
            try:
                items.append(self._check(item := next(inputs), place(len(items), first)))
                characters += len(item) if isinstance(item, str) else sum(map(len, _texts(item)))
            except StopIteration:
                yield from self._some(items, first, **options)
                return
            except Exception:  # of the iterator, or of the check: what came before is answered
                yield from self._some(items, first, **options)
                raise
            if len(items) == most or characters >= STREAM_CHARACTERS:
                yield from self._some(items, first, **options)
                items, first, characters = [], first + len(items), 0

    def _some(self, items: list, first: int, **options: Any) -> Iterator:
        try:
            results = self._results(items, first, **options) if items else []
        except (TypeError, ValueError):  # one is bad: those before it are answered
            results = (self._results([item], first + i, **options)[0] for i, item in enumerate(items))
        yield from results

    def _encode(self, texts: list, first: int | None, tokenizer_kwargs: Mapping[str, Any] | None) -> BatchEncoding:
        """Lists of ids of texts or pairs of texts, none longer than the model takes."""
        options = {**self.tokenizer_kwargs, **(tokenizer_kwargs or {})}
        if options.get("padding") in (True, "longest"):  # as every batch is padded
            del options["padding"]
        if options.get("truncation"):
            options.setdefault("max_length", self.longest)
        encoded = self.tokenizer(texts, **options)
        limit = self.model.config.max_position_embeddings
        for i, ids in enumerate(encoded["input_ids"]):
            if len(ids) > limit:
                raise ValueError(
                    f"{place(i, first)} has {len(ids)} tokens, the model takes {limit}: shorten it, or have it cut "
                    "with tokenizer_kwargs={'truncation': True}"
                )
        return encoded

    @property
    def longest(self) -> int:
        """How many tokens the model and the tokenizer's settings allow."""
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)

    def _run(self, rows: Rows, answer: Answer, batch_size: int | None) -> list[Any]:
        """The results of all rows, computed in batches of rows of like length."""
        from tqdm import tqdm

        lengths = [len(ids) for ids in rows["input_ids"]]
        results: list[Any] = [None] * len(lengths)
        runner, tokens = self.runner, TOKENS_PER_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        off = None if self.progress is None else not self.progress  # None: tqdm looks whether it is on a terminal
        with tqdm(total=len(lengths), desc=self.task, delay=3, disable=off, leave=False) as bar:
            for numbers in batches(lengths, tokens, self.batch_size if batch_size is None else batch_size):
                picked = {name: [column[number] for number in numbers] for name, column in rows.items()}
                batch = self.tokenizer.pad(picked, return_tensors="pt").to(self.device)
                with torch.inference_mode():
                    for number, result in zip(numbers, answer(runner, batch), strict=True):
                        results[number] = result
                bar.update(len(numbers))
        return results


def rows_of(values: Tensor, batch: BatchEncoding) -> list[Any]:
    """(B, T, ...) as one float32 array a row, without its padding (which is on the right or on the left)."""
    masks = batch["attention_mask"].bool().cpu()
    return [row[mask].numpy() for row, mask in zip(values.float().cpu(), masks, strict=True)]


def batches(lengths: Sequence[int], tokens: int, batch_size: int | None) -> Iterator[list[int]]:
    """Numbers of rows in batches, longest first; a batch padded to its longest row has at most so many tokens."""
    if batch_size is not None:
        check_count("batch_size", batch_size)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, tokens // max(1, lengths[order[start]]))
        end = start + min(size, batch_size or size)
        yield order[start:end]
        start = end


def windows(length: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Where so many tokens are cut into parts of at most `room`, each repeating `overlap` of the one before."""
    return [(start, min(start + room, length)) for start in range(0, max(1, length - overlap), room - overlap)]


def _texts(item: Any) -> Iterable[str]:
    return (value for value in (item.values() if isinstance(item, Mapping) else item) if isinstance(value, str))

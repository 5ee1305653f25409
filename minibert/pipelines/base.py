"""What all pipelines share: the items that come in, batches of texts of like length, the module that computes."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minibert.checks import check_count, check_text, shown
from minibert.fast import optimize
from minibert.fast.optimized import ChangedError, OptimizedModel
from minibert.pipelines.items import is_stream, place
from minibert.text.tokenizer import BatchEncoding, BertTokenizer
from minibert.weights import hub
from minibert.weights.convert import HEADS
from minibert.weights.pretrained import as_device, as_dtype, load_config

# A batch's tokens, padding included. On a CPU larger batches are slower: they leave the caches and hold more padding.
TOKENS_PER_BATCH = {"cpu": 512, "gpu": 16384}
# Of a stream, so many items or characters are taken at a time, whichever is reached first
STREAM_ITEMS, STREAM_CHARACTERS = 256, 1 << 20

# What computes, a padded batch, where in it each row lies without the padding -> one result a row
Answer = Callable[[nn.Module, BatchEncoding, list[slice]], Sequence[Any]]
# Arguments of transformers' pipelines that mean nothing for BERT, and are taken where they are None
UNUSED = ("feature_extractor", "image_processor", "processor", "modelcard", "framework", "args_parser", "model_card")
_OF_PRETRAINING = ("BertForMaskedLM", "BertForNextSentencePrediction")  # a BertForPreTraining holds both heads
_MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
# What the tokenizer's call takes, by way of the pipeline's: truncation, max_length, ...
TOKENIZER_OPTIONS = tuple(
    name for name in inspect.signature(BertTokenizer.__call__).parameters if not name.startswith(("self", "text"))
)
_OTHER_ROWS = ("return_overflowing_tokens", "is_split_into_words")  # of the tokenizer: its rows would not be the texts
Rows = Mapping[str, list]  # columns (input_ids, token_type_ids ...), each a list of rows


class Pipeline:
    """What the tasks share. A pipeline is called with one item, with a list, or with any other iterable.

    A list gives a list. Any other iterable (an iterator, a dataset) gives a generator, which takes some hundred items
    at a time, so memory stays bounded; where one of them is bad, those before it are answered first. With batch_size,
    that many are taken at a time.

    The model is put in eval mode, and stays where it is unless a device is given. A PEFT model stands for the model in
    it, adapters included. fast: compute on `optimize(model)`, which gives the same numbers up to rounding; None, the
    default, does so for float32 models on a CPU, unless a ready model comes in train mode or `optimize` does not know
    it (hooks, adapters, subclasses): then the model itself computes, and a warning says so once. batch_size bounds the
    texts of a batch, whose tokens are bounded anyway. tokenizer_kwargs go to each call of the tokenizer; a text of more
    tokens than the model has positions is a ValueError unless {"truncation": True} is among them. progress: show a bar
    on standard error when a call takes longer than a moment; None, the default, does so on a terminal. num_workers is
    taken for compatibility: the texts are tokenized in threads of their own anyway.

    Calls may come from several threads. A pipeline can be pickled, for a spawned process or a Ray actor; the optimized
    form is made anew there.
    """

    task: ClassVar[str]
    model_class: ClassVar[type[nn.Module]]
    item: ClassVar[str] = "a str"  # what the task takes, in errors
    takes_tokenizer_kwargs: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: BertTokenizer,
        *,
        fast: bool | None = None,
        batch_size: int | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        num_workers: int | None = None,
        **unused: Any,
    ):
        self._refuse({name: value for name, value in unused.items() if name not in UNUSED or value is not None})
        model = _whole(model)
        if not isinstance(model, self.model_class):
            raise TypeError(f"{self.task} needs a {self.model_class.__name__}, got {type(model).__name__}")
        if not isinstance(tokenizer, BertTokenizer):
            raise TypeError(f"tokenizer must be a BertTokenizer, got {shown(tokenizer)}")
        if as_dtype(dtype) not in (None, model.dtype):
            raise ValueError(f"dtype={dtype}, but the model is in {model.dtype}: cast it with model.to(dtype)")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if num_workers is not None:
            check_count("num_workers", num_workers, 0)
        model = model if device is None else model.to(chosen_device(device))
        self._insists = fast is True
        if fast is None:
            fast = not model.training and model.device.type == "cpu" and model.dtype == torch.float32
        self.model, self.tokenizer, self.fast = model.eval(), tokenizer, fast
        self.batch_size, self.progress = batch_size, progress
        self.tokenizer_kwargs = dict(tokenizer_kwargs or {})
        if self.tokenizer_kwargs and not self.takes_tokenizer_kwargs:
            self._refuse({"tokenizer_kwargs": self.tokenizer_kwargs})
        self._optimized: nn.Module | None = None
        self._lock = ForkedLock()

    def __repr__(self) -> str:
        path = ", fast" if self.fast else ""
        return (
            f"{type(self).__name__}(task={self.task!r}, model={type(self.model).__name__}, device={self.device}{path})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimized": None}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    torch_dtype = dtype

    @property
    def runner(self) -> nn.Module:
        """What computes: the model, or its optimized form, made on first use and again when the model has changed."""
        if not self.fast:
            return self.model
        with self._lock:
            runner = self._optimized
            # The plain model, where it had to be that, is right for good
            if runner is None or (isinstance(runner, OptimizedModel) and not runner.is_current()):
                self._optimized = self._optimize()
            return self._optimized

    def _optimize(self) -> nn.Module:
        try:
            return optimize(self.model)
        except TypeError as error:  # what it does not know exactly, it would compute wrongly
            if self._insists:
                raise
            warnings.warn(f"{self.task} computes on the plain model: {error}", stacklevel=6)
            return self.model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the model and its tokenizer to a directory that `pipeline` opens again; options: those of the model."""
        self.model.save_pretrained(save_directory, **options)
        self.tokenizer.save_pretrained(save_directory)

    def predict(self, inputs: Any) -> Any:
        """The same as a call, as scikit-learn names it."""
        return self(inputs)

    transform = predict

    @classmethod
    def options(cls) -> list[str]:
        """What the constructor takes beside model and tokenizer."""
        own, common = _parameters(cls.__init__), _parameters(Pipeline.__init__)
        names = dict.fromkeys([*own, *common])
        return [name for name in names if cls.takes_tokenizer_kwargs or name != "tokenizer_kwargs"]

    def _refuse(self, unknown: Mapping[str, Any], allowed: Iterable[str] | None = None) -> None:
        """Raise TypeError for an option that the task does not have; `allowed` are those of a call."""
        for name in unknown:
            if allowed is None:
                allowed = self.options()
            raise TypeError(f"{self.task} has no option {name!r}; it has {', '.join(allowed)}")

    def _refuse_in_call(self, unknown: Mapping[str, Any]) -> None:
        if unknown:
            self._refuse(unknown, _parameters(type(self).__call__))

    # What the tasks fill in

    @classmethod
    def load(cls, name_or_path: Any, **where: Any) -> nn.Module:
        """The model that the task needs, from a directory or the Hub.

        Raises ValueError for one that was saved with another head, or with none: its answers would mean nothing.
        """
        source = hub.as_source(
            name_or_path, **{key: where.pop(key) for key in _parameters(hub.Source.__init__) if key in where}
        )
        check_head(
            cls.task,
            cls.model_class.__name__,
            load_config(cls.model_class.config_class, source, {}).architectures,
            source.name,
        )
        model, report = cls.model_class.from_pretrained(source, output_loading_info=True, **where)
        if new := report.named("newly initialised"):
            raise ValueError(
                f"{source.name} is not fine-tuned for {cls.task}: it lacks {', '.join(new)}, which would be random. To "
                f"use it all the same, pass {cls.model_class.__name__}.from_pretrained(...) as model"
            )
        return model

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
        if (size := options.get("batch_size")) is not None:
            check_count("batch_size", size)
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
        """Lists of ids of texts or pairs of texts, none longer than the model takes; what else the tokenizer gave is
        left out.
        """
        options = {**self.tokenizer_kwargs, **(tokenizer_kwargs or {})}
        self._check_tokenizer_kwargs(options)
        multiple = None
        if options.get("padding") in (True, "longest"):  # each text is its own longest, and every batch is padded
            del options["padding"]
            multiple = options.pop("pad_to_multiple_of", None)
        if options.get("truncation"):
            options.setdefault("max_length", self.longest)
        given = self.tokenizer(texts, **options)
        encoded = BatchEncoding({name: given[name] for name in _MODEL_INPUTS if name in given})
        if multiple is not None:
            side = options.get("padding_side")
            encoded = self._padded_alone(encoded, pad_to_multiple_of=multiple, padding_side=side)
        limit = self.model.config.max_position_embeddings
        for i, ids in enumerate(encoded["input_ids"]):
            if len(ids) > limit:
                raise ValueError(
                    f"{place(i, first)} has {len(ids)} tokens, the model takes {limit}: shorten it, or have it cut "
                    "with tokenizer_kwargs={'truncation': True}"
                )
        return encoded

    def _check_tokenizer_kwargs(self, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            if name in _OTHER_ROWS and value:
                raise ValueError(f"{name}={value!r}: {self.task} takes whole texts, and gives one result each")
            if name not in TOKENIZER_OPTIONS:
                allowed = ", ".join(name for name in TOKENIZER_OPTIONS if name not in _OTHER_ROWS)
                raise TypeError(f"{self.task}: the tokenizer has no option {name!r}; it has {allowed}")

    def _padded_alone(self, encoded: BatchEncoding, **options: Any) -> BatchEncoding:
        rows = [{name: column[i] for name, column in encoded.items()} for i in range(len(encoded["input_ids"]))]
        padded = [self.tokenizer.pad(row, **options) for row in rows]
        return BatchEncoding({name: [row[name] for row in padded] for name in encoded})

    @property
    def longest(self) -> int:
        """How many tokens the model and the tokenizer's settings allow."""
        return min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)

    def _run(self, rows: Rows, answer: Answer, batch_size: int | None) -> list[Any]:
        """The results of all rows, computed in batches of rows of like length."""
        runner = self._optimized if self.fast else None
        try:
            return self._run_on(self.runner if runner is None else runner, rows, answer, batch_size)
        except ChangedError:  # all rows, so that no call's results are of two models
            return self._run_on(self.runner, rows, answer, batch_size)

    def _run_on(self, runner: nn.Module, rows: Rows, answer: Answer, batch_size: int | None) -> list[Any]:
        from tqdm import tqdm

        device, lengths = runner.device, [len(ids) for ids in rows["input_ids"]]
        results: list[Any] = [None] * len(lengths)
        tokens = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "gpu"]
        parts = list(batches(lengths, tokens, self.batch_size if batch_size is None else batch_size))
        # Of a single batch a bar would not move, and to set it up takes a part of a text's time
        off = not self.progress if self.progress is not None else len(parts) < 2 or None  # None: if on no terminal
        shown = nullcontext() if off else tqdm(total=len(lengths), desc=self.task, delay=3, disable=off, leave=False)
        with shown as bar:
            for numbers in parts:
                picked = {name: [column[number] for number in numbers] for name, column in rows.items()}
                batch = self.tokenizer.pad(picked, return_tensors="pt").to(device)
                width, left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
                sizes = [lengths[number] for number in numbers]
                spans = [slice(width - size, width) if left else slice(0, size) for size in sizes]
                with torch.inference_mode():
                    for number, result in zip(numbers, answer(runner, batch, spans), strict=True):
                        results[number] = result
                if bar is not None:
                    bar.update(len(numbers))
        return results


def rows_of(values: Tensor, spans: list[slice]) -> list[Any]:
    """(B, T, ...) as one float32 array a row, without its padding."""
    return [row[span].numpy() for row, span in zip(values.float().cpu(), spans, strict=True)]


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


def chosen_device(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name, or the GPU of that number (-1: the CPU); for None a GPU if there is one, else the CPU.

    Raises ValueError for one that torch does not know or that is not here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif isinstance(device, int):
        device = f"cuda:{device}" if device >= 0 else "cpu"
    return as_device(device, computes=True)


def check_head(task: str, wanted: str, architectures: Sequence[str] | None, name: str) -> None:
    """Raise ValueError where a model was saved with another head of BERT's than the one `wanted`."""
    heads = set(HEADS.values())
    opened = {wanted, "BertForPreTraining"} if wanted in _OF_PRETRAINING else {wanted}  # from which it opens
    if architectures and wanted in heads and all(head in heads - opened for head in architectures):
        raise ValueError(f"{task} needs a {wanted}, but {name} was saved as a {' and a '.join(architectures)}")


def _whole(model: Any) -> Any:
    """The model itself; for a PEFT model the one in it, which its adapters have changed in place."""
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise TypeError(f"{type(model).__name__}: its prompt lies outside of the model, where a pipeline does not look")
    return model.get_base_model()


def given_once(options: Mapping[str, Any] | None, others: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The tokenizer's `options`, which are the argument `name`, and others. ValueError for one that is in both."""
    options = options or {}
    if twice := next((option for option in others if option in options), None):
        raise ValueError(f"{twice} is given twice, by itself and in {name}")
    return {**options, **others}


def is_plain(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call is just the forward of `kind`, so that its parts may be called one by one."""
    return type(model).forward is kind.forward and not (model._forward_hooks or model._forward_pre_hooks)


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of a function's own options."""
    parameters = inspect.signature(function).parameters.values()
    skipped = ("self", "model", "tokenizer", "inputs", "name_or_path")
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in skipped]


class ForkedLock:
    """A lock that a child process, forked while a thread held it, does not find locked; it can be pickled."""

    def __init__(self) -> None:
        self._make()

    def _make(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._make()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ForkedLock, ()


def _texts(item: Any) -> Iterable[str]:
    return (value for value in (item.values() if isinstance(item, Mapping) else item) if isinstance(value, str))

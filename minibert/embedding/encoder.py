"""SentenceEncoder: texts to vectors, with the files, the names and the numbers of sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from torch import Tensor

from minibert.checks import check_choice, check_count
from minibert.embedding import similarity
from minibert.embedding.base import Encoder, check_prompts, fast_or_plain
from minibert.embedding.options import (
    AllOptions,
    AnyOptions,
    ConstructorOptions,
    Device,
    Options,
    SaveOptions,
    Texts,
    VectorOptions,
    form,
    from_constructor,
    further,
    in_form,
    named_texts,
)
from minibert.embedding.precision import check_precision
from minibert.embedding.repository import open_repository, write_repository
from minibert.embedding.texts import CHUNK_TEXTS, as_texts, checked, chunks
from minibert.embedding.workers import Pool
from minibert.model import BertModel
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub
from minibert.weights.pretrained import as_device

# What a text is for -> the names by which models call its prompt
TASK_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


class SentenceEncoder(Encoder):
    """Turns texts into vectors that are near each other where the meanings are.

    >>> encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    >>> embeddings = encoder.encode(["The bank is closed.", "They closed the bank.", "A river bank."])  # (3, 384)
    >>> encoder.similarity(embeddings, embeddings)  # (3, 3)

    model is a BertModel, or what `optimize` makes of one. pooling is a Pooling or the name of a mode; the modules in
    `after` (Dense, Normalize) then follow. Texts of more than max_seq_length tokens are cut. prompts are put before
    each text; default_prompt_name is the one that is used when none is named. truncate_dim keeps only so many numbers
    of a vector (for models trained to allow it).

    Names, files and numbers are those of sentence-transformers' SentenceTransformer. Left out on purpose: images,
    sound and chat messages; its modules as items (`encoder[0]`) and any that are not Transformer, Pooling, Dense,
    Normalize; adapters, trainers, evaluators, model cards, `push_to_hub`. Other on purpose: no texts give an array of
    shape (0, D), there (0,); `output_value=None` gives each text without its batch's padding; batches are sized by
    their tokens unless batch_size is given, and a progress bar is shown on a terminal only.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: Device | None = None,
        dtype: torch.dtype | str | None = None,
        fast: bool = True,
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        **others: Unpack[ConstructorOptions],
    ) -> SentenceEncoder:
        """Open a sentence-transformers model, or a bare BERT, which gets mean pooling.

        Args:
            name_or_path: a directory, a bundled model, or a name on the Hub; `revision`, `cache_dir`,
                `local_files_only` and `token` are explained at `minibert.weights.hub.Source`, with the errors. The
                cache is SENTENCE_TRANSFORMERS_HOME of the environment where it is set and no other is given.
            device: default a GPU if there is one, else the CPU.
            dtype: what is computed in. By default that of the file, but at least float32 on a CPU. With `fast`, also
                "auto" and "int8"; see `optimize`.
            fast: run on what `optimize` makes of the model; where it refuses, on the model itself, with a notice.
            prompts, default_prompt_name, similarity_fn_name, truncate_dim: instead of what the files say, where they
                are not None; prompts of other names stay.
            **others: what SentenceTransformer's constructor takes besides: see `options.from_constructor`.

        Raises ValueError for a model with modules that minibert does not have, and for damaged files.
        """
        where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        dtype = from_constructor(others, where, dtype)
        source = hub.Source(name_or_path, **where)
        place = as_place("cuda" if device is None and torch.cuda.is_available() else device)
        files = open_repository(source)
        weights = dtype
        if fast:
            exact = torch.float64 if dtype in (torch.float64, "float64") else torch.float32
            weights = exact if place.type == "cpu" else None
        model = BertModel.from_pretrained(files.encoder, add_pooling_layer=False, dtype=weights, device=place)
        given = {
            "default_prompt_name": default_prompt_name,
            "similarity_fn_name": similarity_fn_name,
            "truncate_dim": truncate_dim,
        }
        given_prompts = {name: text for name, text in check_prompts(prompts or {}).items() if text is not None}
        return cls(
            fast_or_plain(model, dtype) if fast else model,
            _tokenizer(files.encoder, files.settings.get("do_lower_case", False)),
            files.make_pooling(model.config.hidden_size),
            files.make_after(),
            max_seq_length=files.settings.get("max_seq_length"),
            prompts={**(files.defaults.get("prompts") or {}), **given_prompts},
            **{name: files.defaults.get(name) if value is None else value for name, value in given.items()},
        )

    def save_pretrained(self, directory: str | os.PathLike[str], **others: Unpack[SaveOptions]) -> None:
        """Write a sentence-transformers repository, whole or not at all; both libraries open it.

        `others` are what SentenceTransformer's takes besides (model_name, create_model_card, train_datasets,
        safe_serialization): without effect, as no model card is written, and only safetensors.

        Raises TypeError for a module behind the pooling that has no such files; NotADirectoryError if `directory` is
        a file; OSError if it cannot be written, and then nothing has changed.
        """
        if unknown := sorted(set(others) - SaveOptions.__annotations__.keys()):
            raise TypeError(f"save_pretrained takes no argument {', '.join(unknown)}")
        write_repository(self, directory)

    save = save_pretrained

    @overload
    def encode(
        self,
        inputs: Texts | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        **options: Unpack[VectorOptions],
    ) -> np.ndarray: ...

    @overload
    def encode(
        self,
        inputs: Texts | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        *,
        convert_to_tensor: Literal[True],
        **options: Unpack[VectorOptions],
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        inputs: Texts | None = ...,
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        show_progress_bar: bool | None = ...,
        **options: Unpack[AnyOptions],
    ) -> Any: ...

    def encode(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Device | Sequence[Device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: Pool | None = None,
        chunk_size: int | None = None,
        **more: Any,
    ) -> Any:
        """The vectors of texts, (n, D) in their order; for a single str one vector, (D,).

        Args:
            inputs: a str, or any iterable of str or of pairs of them; by name also `sentences` or `texts`. Items are
                read a few thousand at a time; see `encode_stream` for results that do not fit in memory either.
            prompt_name: the prompt of this name in `prompts` is put before each text, and before a pair's first.
            prompt: a prompt itself, in the place of prompt_name.
            batch_size: at most so many texts at once. Their tokens are bounded anyway.
            show_progress_bar: True or False; by default on a terminal, if it takes longer than a moment.
            output_value: "token_embeddings" for a list of the tokens' states, (T, D) a text; None for a list of dicts
                with all there is of a text, tensors by name.
            precision: "int8", "uint8", "binary" or "ubinary"; see `minibert.embedding.precision.quantize`.
            convert_to_numpy, convert_to_tensor: a float32 array is the default. convert_to_tensor=True gives a tensor
                on the device of the model, convert_to_numpy=False alone a list of tensors.
            device: move the encoder there first; of several devices, each gets a process and a share of the texts.
            normalize_embeddings: scale the vectors to length 1, which some models do anyway; also `normalize`.
            truncate_dim: instead of the encoder's own.
            pool: processes from `start_multi_process_pool`.
            chunk_size: texts that are embedded, or sent to a process, at a time.
            **more: `sentences`, `texts`, `normalize`; convert_to="numpy", "torch" or "list"; processes=n, for n new
                ones (in a script, under `if __name__ == "__main__":`); task, which changes nothing here.

        Raises TypeError or ValueError, naming the index, for an item that is no text; in a list before anything is
        computed. What else is raised midway, by the iterable or by Ctrl-C, carries the vectors of all texts before in
        its attribute `embeddings`.
        """
        given = further(more)
        texts, single = as_texts(named_texts(inputs, given.sentences, given.texts))
        precision, asked = check_precision(precision), form(given.convert_to, convert_to_numpy, convert_to_tensor)
        normalize = normalize_embeddings or given.normalize
        options = self.options(prompt_name, prompt, batch_size, normalize, truncate_dim, output_value)
        where = self._processes(device, given.processes, pool)
        size = CHUNK_TEXTS if chunk_size is None else check_count("chunk_size", chunk_size)
        parts: list[Any] = []
        try:
            parts.extend(self._results(texts, options, size, show_progress_bar, where))
        except BaseException as error:
            error.embeddings = self._joined(parts, options, asked, precision)  # type: ignore[attr-defined]
            raise
        results = self._joined(parts, options, asked, precision)
        return results[0] if single else results

    def encode_query(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[AllOptions],
    ) -> Any:
        """`encode` with the prompt "query", if the model has it and no other is given."""
        return self._encode_as("query", inputs, prompt_name, prompt, options)

    def encode_document(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Unpack[AllOptions],
    ) -> Any:
        """`encode` with the prompt "document", "passage" or "corpus", whichever the model has, unless one is given."""
        return self._encode_as("document", inputs, prompt_name, prompt, options)

    def _encode_as(
        self,
        task: Literal["query", "document"],
        inputs: Texts | None,
        prompt_name: str | None,
        prompt: str | None,
        options: AllOptions,
    ) -> Any:
        inputs = named_texts(inputs, options.pop("sentences", None), options.pop("texts", None))
        if prompt_name is None and prompt is None:
            prompt_name = next((name for name in TASK_PROMPTS[task] if name in self.prompts), None)
        options.setdefault("task", task)
        return self.encode(inputs=inputs, prompt_name=prompt_name, prompt=prompt, **options)

    def encode_stream(
        self,
        inputs: Texts | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        texts: Texts | None = None,
        sentences: Texts | None = None,
        normalize: bool = False,
        convert_to: Literal["numpy", "torch"] = "numpy",
        truncate_dim: int | None = None,
        processes: int | None = None,
        pool: Pool | None = None,
        chunk_size: int = CHUNK_TEXTS,
    ) -> Iterator[Any]:
        """The vectors as they are computed, in chunks (at most chunk_size, D): memory stays flat.

        inputs may be a generator of any length. Arguments as for `encode`. The vectors of all texts before a wrong one
        are given before the error is raised.
        """
        items, _ = as_texts(named_texts(inputs, sentences, texts))
        check_choice("convert_to", convert_to, ("numpy", "torch"))
        options = self.options(prompt_name, prompt, batch_size, normalize, truncate_dim)
        where = self._processes(None, processes, pool)
        results = self._results(items, options, check_count("chunk_size", chunk_size), show_progress_bar, where)
        return (self._joined([part], options, convert_to, "float32") for part in results)

    def start_multi_process_pool(self, target_devices: Sequence[Device] | None = None) -> Pool:
        """Processes for `encode(..., pool=pool)`, one a device: by default one a GPU, or four on a CPU.

        Each has a copy of the encoder as it is now. End them with `pool.close()`, or with `with ... as pool:`.
        """
        if target_devices is None:
            count = torch.cuda.device_count()
            target_devices = [f"cuda:{number}" for number in range(count)] or ["cpu"] * 4
        return Pool(self, [as_place(device) for device in target_devices])

    def encode_multi_process(self, sentences: Texts, pool: Pool, **options: Unpack[AllOptions]) -> Any:
        """The older name of `encode(sentences, pool=pool)`."""
        return self.encode(sentences, **{**options, "pool": pool})

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """End the processes of a pool."""
        pool.close()

    def _processes(
        self, device: Device | Sequence[Device] | None, processes: int | None, pool: Pool | None
    ) -> AbstractContextManager[Pool | None]:
        """The pool that shall embed, none for this process; one that was started for it ends with it."""
        several = isinstance(device, (list, tuple))
        if (several + (processes is not None) + (pool is not None)) > 1:
            raise ValueError("give one of pool, processes and several devices")
        if pool is not None:
            if not isinstance(pool, Pool):
                raise TypeError(f"pool must come from start_multi_process_pool, got {type(pool).__name__}")
            return nullcontext(pool)
        if several:
            return self.start_multi_process_pool(device)
        if device is not None:
            self.to(as_place(device))
        if processes is not None:
            return self.start_multi_process_pool([self.device] * check_count("processes", processes))
        return nullcontext()

    def _results(
        self,
        texts: Iterable[Any],
        options: Options,
        size: int,
        show: bool | None,
        where: AbstractContextManager[Pool | None],
    ) -> Iterator[Any]:
        """What `embed` gives for each chunk of the texts, in order, with a progress bar."""
        total = None
        if isinstance(texts, (list, tuple)):  # all there is, so that a wrong item is found before the work
            texts = [checked(text, f"texts[{number}]") for number, text in enumerate(texts)]
        if isinstance(texts, Sized):
            total = len(texts)
        # A bar of a single chunk would not move before it is done, and to set it up takes a part of a short text's time
        disable = not show if show is not None or (total is not None and total <= size) else None
        bar = None
        if not disable:
            from tqdm import tqdm

            settings: dict[str, Any] = {"delay": 0 if show else 3, "disable": disable, "leave": bool(show)}
            bar = tqdm(total=total, desc="embed", unit="text", **settings)
        with where as pool, nullcontext() if bar is None else bar:
            parts = chunks(texts, size)
            found = (self.embed(part, options) for part in parts) if pool is None else pool.embed(parts, options)
            for result, _ in found:
                yield result
                if bar is not None:
                    bar.update(len(result))

    def _joined(self, parts: list[Any], options: Options, asked: str, precision: str) -> Any:
        """All results together, in the form that was asked for."""
        if options.output != "sentence_embedding":
            return [item for part in parts for item in part]
        if len(parts) == 1:
            together = parts[0]
        elif parts:
            together = torch.cat([part.to(parts[0].device) for part in parts])
        else:
            together = torch.empty(0, self.width(options.truncate_dim), device=self.device, dtype=self.dtype)
        return in_form(together, asked, precision, self.device, self.dtype)

    # Comparing

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """How alike each of n vectors is to each of m, (n, m), by `similarity_fn_name`; more is more alike."""
        return similarity.matrix(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """How alike the vectors are pair by pair, (n,)."""
        return similarity.pairwise(self.similarity_fn_name, embeddings1, embeddings2)


def as_place(device: Device | None) -> torch.device:
    """A device by its name or the number of a GPU; the CPU for None. Raises ValueError for one that is not here."""
    return as_device(f"cuda:{device}" if isinstance(device, int) else device, computes=True)


def _tokenizer(source: hub.Source, lowercase: bool) -> BertTokenizer:
    tokenizer = BertTokenizer.from_pretrained(source)
    if not lowercase or tokenizer.do_lower_case:
        return tokenizer
    # sentence_bert_config.json asks for lower case alone; BERT's own lower-casing would take accents off too
    return BertTokenizer.from_pretrained(source, do_lower_case=True, strip_accents=bool(tokenizer.strip_accents))

"""SentenceEncoder: texts to vectors, with the files, the names and the numbers of sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.checks import check_count
from minibert.embedding import similarity, workers
from minibert.embedding.modules import Dense, Pooling
from minibert.embedding.repository import open_repository
from minibert.embedding.texts import CHUNK_TEXTS, check_iterable, check_text, chunks
from minibert.fast import optimize
from minibert.fast.optimized import OptimizedModel
from minibert.model import BertModel
from minibert.pipelines import batches
from minibert.text.tokenizer import BertTokenizer
from minibert.weights import hub

TOKENS_PER_BATCH = {"cpu": 1024, "gpu": 16384}  # beyond, a CPU gets slower: what a layer works on leaves the caches
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names by which models call the prompt of what is searched


@dataclass(frozen=True)
class Options:
    """How to embed, checked: what a worker has to know beside the texts."""

    prompt: str
    batch_size: int | None
    normalize: bool
    truncate_dim: int | None


class SentenceEncoder:
    """Turns texts into vectors that are near each other where the meanings are.

    >>> encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    >>> embeddings = encoder.encode(["The bank is closed.", "They closed the bank.", "A river bank."])  # (3, 384)
    >>> encoder.similarity(embeddings, embeddings)  # (3, 3)

    model is a BertModel, or what `optimize` makes of one. pooling is a Pooling or the name of a mode; the modules in
    `after` (Dense, Normalize) then follow. Texts of more than max_seq_length tokens are cut. prompts are put before
    each text; default_prompt_name is the one that is used when none is named. truncate_dim keeps only so many numbers
    of a vector (for models trained to allow it).
    """

    def __init__(
        self,
        model: BertModel | OptimizedModel,
        tokenizer: BertTokenizer,
        pooling: str | Pooling = "mean",
        after: Sequence[nn.Module] = (),
        *,
        max_seq_length: int | None = None,
        prompts: Mapping[str, str | None] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
    ):
        plain = model.model if isinstance(model, OptimizedModel) else model
        if not isinstance(plain, BertModel):
            raise TypeError(f"model must be a BertModel, or one that went through optimize; got {type(plain).__name__}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pooling = Pooling(pooling) if isinstance(pooling, str) else pooling
        self.after = nn.Sequential(*after).to(plain.device, plain.dtype).eval()
        self.max_seq_length = max_seq_length
        # sentence-transformers gives every model these two, empty unless it says otherwise
        self.prompts = {"query": "", "document": ""} | {name: text or "" for name, text in (prompts or {}).items()}
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity.check_name(similarity_fn_name or "cosine")
        self.truncate_dim = truncate_dim
        if default_prompt_name is not None:
            self._prompt(None, default_prompt_name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        fast: bool = True,
    ) -> SentenceEncoder:
        """Open a sentence-transformers model, or a bare BERT, which gets mean pooling.

        Args:
            name_or_path: a directory, a bundled model, or a name on the Hub; `revision`, `cache_dir`,
                `local_files_only` and `token` are explained at `minibert.weights.hub.Source`, with the errors.
            device: default the CPU.
            dtype: what is computed in. By default that of the file, but at least float32 on a CPU. With `fast`, also
                "auto" and "int8"; see `optimize`.
            fast: run on what `optimize` makes of the model.

        Raises ValueError for a model with modules that minibert does not have, and for damaged files.
        """
        where = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        device = torch.device(device or "cpu")
        files = open_repository(hub.Source(name_or_path, **where))
        weights = dtype
        if fast:
            exact = torch.float64 if dtype in (torch.float64, "float64") else torch.float32
            weights = exact if device.type == "cpu" else None
        model = BertModel.from_pretrained(files.encoder, add_pooling_layer=False, dtype=weights, device=device)
        return cls(
            optimize(model, dtype) if fast else model,
            _tokenizer(files.encoder, files.settings.get("do_lower_case", False)),
            files.make_pooling(model.config.hidden_size),
            files.make_after(),
            max_seq_length=files.settings.get("max_seq_length"),
            **{name: files.defaults.get(name) for name in ("prompts", "default_prompt_name", "similarity_fn_name")},
            truncate_dim=files.defaults.get("truncate_dim"),
        )

    def __repr__(self) -> str:
        parts = [type(self.model).__name__, f"Pooling({self.pooling.extra_repr()})"]
        parts += [type(module).__name__ for module in self.after]
        return (
            f"SentenceEncoder({' -> '.join(parts)}, dimension={self.get_embedding_dimension()}, "
            f"max_seq_length={self.max_seq_length}, device={str(self.device)!r})"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_seq_length(self) -> int:
        """The tokens that are kept of a text, [CLS] and [SEP] included."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, length: int | None) -> None:
        limit = self.model.config.max_position_embeddings
        if length is None:
            length = min(self.tokenizer.model_max_length, limit)
        if not isinstance(length, int) or isinstance(length, bool) or not 2 < length <= limit:
            raise ValueError(f"max_seq_length must be a whole number from 3 to {limit}, got {length!r}")
        self._max_seq_length = length

    def get_embedding_dimension(self) -> int:
        """How many numbers a vector has."""
        return self.width(self.truncate_dim)

    get_sentence_embedding_dimension = get_embedding_dimension

    def width(self, truncate_dim: int | None) -> int:
        """The same for vectors cut to `truncate_dim` numbers; None: not cut."""
        size = len(self.pooling.modes) * self.model.config.hidden_size
        for module in self.after:
            size = module.linear.out_features if isinstance(module, Dense) else size
        return size if truncate_dim is None else min(size, truncate_dim)

    # Embedding

    def encode(
        self,
        texts: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize: bool = False,
        convert_to: str = "numpy",
        truncate_dim: int | None = None,
        processes: int | None = None,
        normalize_embeddings: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> np.ndarray | Tensor:
        """The vectors of texts, (n, D) in their order; for a single str one vector, (D,).

        Args:
            texts: a str, or any iterable of str. Its items are read a few thousand at a time; see `encode_stream` for
                results that do not fit in memory either.
            prompt_name: the prompt of this name in `prompts` is put before each text.
            prompt: a prompt itself, in the place of prompt_name.
            batch_size: at most so many texts at once. Their tokens are bounded anyway.
            show_progress_bar: True or False; by default on a terminal, if it takes longer than a moment.
            normalize: scale the vectors to length 1 (which some models do anyway). sentence-transformers calls it
                normalize_embeddings.
            convert_to: "numpy" for a float32 array; "torch", or convert_to_tensor=True, or convert_to_numpy=False, for
                a tensor on the device of the model.
            truncate_dim: instead of the encoder's own.
            processes: spread the work over so many new processes. Each loads the model once, and takes an equal share
                of the threads. A script that uses it must do its work under `if __name__ == "__main__":`.

        Raises TypeError or ValueError, naming the index, for an item that is no text; in a list before anything is
        computed. What else is raised midway, by the iterable or by Ctrl-C, carries the vectors of all texts before in
        its attribute `embeddings`.
        """
        convert_to = "torch" if convert_to_tensor or not convert_to_numpy else convert_to
        stream = self.encode_stream(
            texts,
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            normalize=normalize or normalize_embeddings,
            convert_to=convert_to,
            truncate_dim=truncate_dim,
            processes=processes,
        )
        none = torch.empty(0, self.width(self.truncate_dim if truncate_dim is None else truncate_dim))
        parts = [_converted(none, convert_to, self.model)]
        try:
            parts.extend(stream)
        except BaseException as error:
            error.embeddings = _joined(parts)  # type: ignore[attr-defined]
            raise
        return _joined(parts)[0] if isinstance(texts, str) else _joined(parts)

    def encode_query(self, texts: str | Iterable[str], prompt_name: str | None = None, **options: Any) -> Any:
        """`encode` with the prompt "query", unless another is given."""
        if prompt_name is None and options.get("prompt") is None:
            prompt_name = "query"
        return self.encode(texts, prompt_name, **options)

    def encode_document(self, texts: str | Iterable[str], prompt_name: str | None = None, **options: Any) -> Any:
        """`encode` with the prompt "document", "passage" or "corpus", whichever the model has, unless one is given."""
        if prompt_name is None and options.get("prompt") is None:
            prompt_name = next(name for name in DOCUMENT_PROMPTS if name in self.prompts)
        return self.encode(texts, prompt_name, **options)

    def encode_stream(
        self,
        texts: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        *,
        normalize: bool = False,
        convert_to: str = "numpy",
        truncate_dim: int | None = None,
        processes: int | None = None,
        chunk_size: int = CHUNK_TEXTS,
    ) -> Iterator[np.ndarray | Tensor]:
        """The vectors as they are computed, in chunks (at most chunk_size, D): memory stays flat.

        texts may be a generator of any length. Arguments as for `encode`. The vectors of all texts before a wrong one
        are given before the error is raised.
        """
        texts = [texts] if isinstance(texts, str) else texts
        check_iterable(texts)
        if isinstance(texts, (list, tuple)):
            for number, text in enumerate(texts):
                check_text(text, f"texts[{number}]")
        if convert_to not in ("numpy", "torch"):
            raise ValueError(f"convert_to must be 'numpy' or 'torch', got {convert_to!r}")
        options = self.options(prompt_name, prompt, batch_size, normalize, truncate_dim)
        check_count("chunk_size", chunk_size)
        parts = chunks(texts, chunk_size)
        if processes is None:
            results = ((self.embed(part, options)[0]) for part in parts)
        else:
            check_count("processes", processes)
            results = workers.embed(self, parts, options, processes)
        total = len(texts) if hasattr(texts, "__len__") else None
        return self._stream(results, convert_to, total, show_progress_bar)

    def _stream(
        self, results: Iterator[Tensor], convert_to: str, total: int | None, show: bool | None
    ) -> Iterator[np.ndarray | Tensor]:
        from tqdm import tqdm

        disable = None if show is None else not show
        settings = {"unit": "text", "delay": 0 if show else 3, "disable": disable, "leave": bool(show)}
        with tqdm(total=total, desc="embed", **settings) as bar:
            for embeddings in results:
                yield _converted(embeddings, convert_to, self.model)
                bar.update(len(embeddings))

    def options(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
    ) -> Options:
        """Arguments of `encode`, checked and looked up. Raises ValueError."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        if truncate_dim is not None:
            check_count("truncate_dim", truncate_dim)
        return Options(self._prompt(prompt, prompt_name), batch_size, normalize, truncate_dim)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], options: Options) -> tuple[Tensor, int]:
        """The vectors of texts that have been checked, (n, D), all at once; and how many were cut."""
        rows, cut = self._tokenize(texts, options.prompt)
        prompt_length = 0
        if options.prompt and not self.pooling.include_prompt:
            prompt_length = len(self.tokenizer(options.prompt)["input_ids"]) - 1  # without [SEP]
        size = TOKENS_PER_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        found = torch.empty(len(rows), self.width(options.truncate_dim), device=self.device, dtype=self.model.dtype)
        for picked in batches([len(row) for row in rows], size, options.batch_size):
            states, mask = self._states([rows[row] for row in picked])
            vectors = self.after(self.pooling(states, mask, prompt_length))[:, : options.truncate_dim]
            found[picked] = F.normalize(vectors, dim=-1) if options.normalize else vectors
        return found, cut

    def _states(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The last hidden states (B, T, D) and the mask (B, T); T is 1 where only the first token is wanted."""
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if not (self.pooling.first_token_only and isinstance(self.model, OptimizedModel)):
            return self.model(ids, mask).last_hidden_state, mask
        first = torch.zeros_like(mask, dtype=torch.bool)
        first[:, 0] = True
        return self.model(ids, mask, positions=first).last_hidden_state[:, None], mask[:, :1]  # (B, D) -> (B, 1, D)

    def _tokenize(self, texts: Sequence[str], prompt: str) -> tuple[list[list[int]], int]:
        """Ids of each text, at most max_seq_length, and how many texts were longer.

        Of a very long text only a beginning is tokenized, if it holds enough. A word that is cut in two changes no
        more than its own tokens, and a word of many tokens is one [UNK].
        """
        limit = self.max_seq_length
        enough = limit + self.tokenizer.backend_tokenizer.model.max_input_chars_per_word + 28
        from_right = self.tokenizer.truncation_side == "left"
        characters = max(map(len, texts)) if from_right else 8 * enough
        texts = [prompt + text for text in texts] if prompt else texts
        rows = self._ids([text[:characters] for text in texts])
        while again := [i for i, text in enumerate(texts) if len(rows[i]) < enough and len(text) > characters]:
            characters *= 4
            for i, row in zip(again, self._ids([texts[i][:characters] for i in again]), strict=True):
                rows[i] = row
        cut = [i for i, row in enumerate(rows) if len(row) > limit]
        for i in cut:
            row = rows[i]
            rows[i] = [row[0], *row[-limit + 1 :]] if from_right else [*row[: limit - 1], row[-1]]
        return rows, len(cut)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            check_text(prompt, "prompt")
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name={name!r}: the model has the prompts {', '.join(map(repr, self.prompts))}")
        return self.prompts[name]

    # Comparing

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """How alike each of n vectors is to each of m, (n, m), by `similarity_fn_name`; more is more alike."""
        first, second = similarity.as_rows(embeddings1, "embeddings1"), similarity.as_rows(embeddings2, "embeddings2")
        return similarity.MATRIX[self.similarity_fn_name](first, second)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """How alike the vectors are pair by pair, (n,)."""
        first, second = similarity.as_rows(embeddings1, "embeddings1"), similarity.as_rows(embeddings2, "embeddings2")
        return similarity.PAIRWISE[self.similarity_fn_name](first, second)


def _tokenizer(source: hub.Source, lowercase: bool) -> BertTokenizer:
    tokenizer = BertTokenizer.from_pretrained(source)
    if not lowercase or tokenizer.do_lower_case:
        return tokenizer
    # sentence_bert_config.json asks for lower case alone; BERT's own lower-casing would take accents off too
    return BertTokenizer.from_pretrained(source, do_lower_case=True, strip_accents=bool(tokenizer.strip_accents))


def _converted(embeddings: Tensor, convert_to: str, like: nn.Module) -> np.ndarray | Tensor:
    if convert_to == "numpy":
        return embeddings.float().cpu().numpy()
    return embeddings.to(like.device, like.dtype)


def _joined(parts: list[Any]) -> np.ndarray | Tensor:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)

"""What a sentence encoder is made of and set to, and the computation itself: checked texts in, vectors out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from minibert.checks import check_choice, check_count, check_text
from minibert.config import BertConfig
from minibert.embedding import similarity
from minibert.embedding.modules import Dense, Pooling, normalized
from minibert.embedding.options import OUTPUTS, Options
from minibert.embedding.texts import Text, checked
from minibert.embedding.tokens import prompt_tokens, tokenize
from minibert.fast import optimize
from minibert.fast.optimized import ChangedError, OptimizedModel
from minibert.model import BertModel
from minibert.pipelines import batches
from minibert.text.tokenizer import BatchEncoding, BertTokenizer

logger = logging.getLogger("minibert")

TOKENS_PER_BATCH = {"cpu": 1024, "gpu": 16384}  # beyond, a CPU gets slower: what a layer works on leaves the caches


class Encoder:
    """BERT, pooling, and what follows; with the settings that decide over the vectors."""

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
        self.model: BertModel | OptimizedModel = model.eval()
        self.tokenizer = tokenizer
        self.pooling = Pooling(pooling) if isinstance(pooling, str) else pooling
        self.after = nn.Sequential(*after).to(plain.device, plain.dtype).eval()
        self.max_seq_length = max_seq_length
        # sentence-transformers gives every model these two, empty unless it says otherwise
        self.prompts = {"query": "", "document": "", **(prompts or {})}
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity_fn_name
        self.truncate_dim = truncate_dim

    def __repr__(self) -> str:
        parts = [type(self.model).__name__, f"Pooling({self.pooling.extra_repr()})"]
        parts += [type(module).__name__ for module in self.after]
        return (
            f"{type(self).__name__}({' -> '.join(parts)}, dimension={self.get_embedding_dimension()}, "
            f"max_seq_length={self.max_seq_length}, device={str(self.device)!r})"
        )

    # Where it is, and in what type

    @property
    def plain(self) -> BertModel:
        """The model whose parameters are computed with: `model` itself, or what it was optimized from."""
        return self.model.model if isinstance(self.model, OptimizedModel) else self.model

    transformers_model = plain  # sentence-transformers' name

    @property
    def config(self) -> BertConfig:
        """The config of the model inside."""
        return self.plain.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors that `encode` returns."""
        return self.model.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast it, with arguments as for `torch.nn.Module.to`; returns the encoder itself.

        An optimized model is made anew, computing in what it was asked to compute in, or in the new type; where
        `optimize` refuses that, as a type that this CPU is slow at, the model itself computes, with a notice.
        """
        plain, before = self.plain, (self.plain.device, self.plain.dtype)
        plan = self.model.plan.dtype if isinstance(self.model, OptimizedModel) else None
        plain.to(*args, **kwargs)
        self.after.to(plain.device, plain.dtype)
        if isinstance(self.model, OptimizedModel) and before != (plain.device, plain.dtype):
            cast = before[1] != plain.dtype
            same = plan == str(before[1]).removeprefix("torch.")
            self.model = fast_or_plain(plain, None if cast or same else plan)
        return self

    def cpu(self) -> Self:
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> Self:
        return self.to("cuda" if device is None else device)

    def half(self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def double(self) -> Self:
        return self.to(torch.float64)

    def eval(self) -> Self:
        """The encoder itself, which never drops out."""
        return self

    # Settings

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

    def get_max_seq_length(self) -> int:
        return self.max_seq_length

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Whether the tokens of a prompt count in the vector, as for most models they do."""
        self.pooling.include_prompt = include_prompt

    @property
    def prompts(self) -> dict[str, str]:
        """What is put before texts, by name."""
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: Mapping[str, str | None]) -> None:
        texts = {name: "" if text is None else text for name, text in check_prompts(prompts).items()}
        for name, text in texts.items():
            check_text(text, f"prompts[{name!r}]")
        self._prompts = texts

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that is used when none is named."""
        return self._default_prompt_name

    @default_prompt_name.setter
    def default_prompt_name(self, name: str | None) -> None:
        if name is not None and name not in self.prompts:
            raise ValueError(f"default_prompt_name={name!r}: {self._known_prompts()}")
        self._default_prompt_name = name

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: "cosine" (also for None), "dot", "euclidean" or "manhattan"."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: str | None) -> None:
        self._similarity_fn_name = similarity.check_name("cosine" if name is None else name)

    @property
    def truncate_dim(self) -> int | None:
        """How many numbers of a vector are kept; None: all."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, count: int | None) -> None:
        self._truncate_dim = count if count is None else check_count("truncate_dim", count)

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """`truncate_dim` within the `with` block."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    truncate_sentence_embeddings = truncate_embeddings

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

    def options(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        output: str | None = "sentence_embedding",
    ) -> Options:
        """Arguments of `encode`, checked and looked up. Raises ValueError."""
        if batch_size is not None:
            check_count("batch_size", batch_size)
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        if truncate_dim is not None:
            check_count("truncate_dim", truncate_dim)
        check_choice("output_value", output, OUTPUTS)
        return Options(self._prompt(prompt, prompt_name), batch_size, normalize, truncate_dim, output)

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None:
            check_text(prompt, "prompt")
            if name is not None:
                logger.warning("prompt and prompt_name are both given: %r is not used", name)
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name={name!r}: {self._known_prompts()}")
        return check_text(self.prompts[name] or "", f"prompts[{name!r}]")  # the dict can be written to

    def _known_prompts(self) -> str:
        return f"the model has the prompts {', '.join(map(repr, self.prompts))}"

    # Computing

    def _optimize_again(self, model: OptimizedModel) -> None:
        """For a model that was trained, cast or adapted after it was optimized."""
        plan, plain = model.plan.dtype, model.model
        less_exact = plain.dtype == torch.float32 and plan in ("int8", "bfloat16")
        self.model = fast_or_plain(plain, plan if less_exact else None)

    def preprocess(self, inputs: Sequence[Text], prompt: str | None = None) -> BatchEncoding:
        """What the model reads of texts: `input_ids`, `token_type_ids` and `attention_mask`, (n, T) tensors on the CPU.

        Behind the prompt, cut to `max_seq_length`, padded to the longest.
        """
        texts = [checked(text, f"inputs[{number}]") for number, text in enumerate(inputs)]
        tokens = tokenize(self.tokenizer, texts, check_text(prompt or "", "prompt"), self.max_seq_length)
        rows = {"input_ids": tokens.ids, "token_type_ids": tokens.types}
        return self.tokenizer.pad(rows, padding_side="right", return_tensors="pt")

    def tokenize(self, texts: Sequence[Text]) -> BatchEncoding:
        """The older name of `preprocess`."""
        return self.preprocess(texts)

    def embed(self, texts: Sequence[Text], options: Options) -> tuple[Any, int]:
        """The vectors of texts that have been checked, (n, D), all at once; and how many texts were cut.

        For other outputs than vectors, a list: see `encode`.
        """
        with torch.no_grad():
            try:
                return self._embed(texts, options)
            except ChangedError:
                self._optimize_again(self.model)
                return self._embed(texts, options)  # all of them: no call's vectors are of two models

    def _embed(self, texts: Sequence[Text], options: Options) -> tuple[Any, int]:
        tokens = tokenize(self.tokenizer, texts, options.prompt, self.max_seq_length)
        whole = options.output != "sentence_embedding"
        counted = options.prompt and (whole or not self.pooling.include_prompt)
        prompt_length = prompt_tokens(self.tokenizer, options.prompt) if counted else 0
        size = TOKENS_PER_BATCH["cpu" if self.device.type == "cpu" else "gpu"]
        items: list[Any] = [None] * len(texts)
        found: list[Tensor] = []
        order: list[int] = []
        for picked in batches(list(map(len, tokens.ids)), size, options.batch_size):
            ids, types = [tokens.ids[i] for i in picked], [tokens.types[i] for i in picked]
            states, mask = self._states(ids, types, whole)
            vectors = self.after(self.pooling(states, mask, prompt_length))
            if options.truncate_dim is not None:
                vectors = vectors[:, : options.truncate_dim]
            if not whole:
                found.append(normalized(vectors) if options.normalize else vectors)
                order.extend(picked)
                continue
            for i, row, kinds, state, vector in zip(picked, ids, types, states, vectors, strict=True):
                state = state[: len(row)].clone()  # (T, D) without padding, and without holding the batch
                items[i] = state
                if options.output is None:
                    items[i] = self._everything(row, kinds, state, vector.clone(), prompt_length)
        return (items if whole else self._in_order(found, order, options)), tokens.cut

    def _in_order(self, found: list[Tensor], order: list[int], options: Options) -> Tensor:
        """Vectors of batches as one tensor, (n, D), the texts' own order restored."""
        if len(order) == 1:
            return found[0]
        together = torch.empty(len(order), self.width(options.truncate_dim), device=self.device, dtype=self.dtype)
        if order:
            together[torch.tensor(order, device=self.device)] = torch.cat(found)
        return together

    def _everything(
        self, ids: list[int], types: list[int], state: Tensor, vector: Tensor, prompt_length: int
    ) -> dict[str, Any]:
        """What `encode` gives for `output_value=None`."""
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "token_type_ids": torch.tensor(types, device=self.device),
            "attention_mask": torch.ones(len(ids), dtype=torch.long, device=self.device),
            **({"prompt_length": prompt_length} if prompt_length else {}),
            "modality": "text",
            "token_embeddings": state,
            "sentence_embedding": vector,
        }

    def _states(self, ids: list[list[int]], types: list[list[int]], whole: bool) -> tuple[Tensor, Tensor | None]:
        """The last hidden states (B, T, D) and the mask (B, T), None where nothing is padding.

        T is 1 where only the first token is wanted.
        """
        kinds = types if any(map(any, types)) else None
        if not isinstance(self.model, OptimizedModel):
            rows = {"input_ids": ids, **({} if kinds is None else {"token_type_ids": kinds})}
            batch = self.tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self.device)
            mask = batch["attention_mask"]
            return self.model(batch["input_ids"], mask, batch.get("token_type_ids")).last_hidden_state, mask
        first_only = self.pooling.first_token_only and not whole
        states, lengths = self.model.encode_rows(ids, kinds, first_only)
        if first_only:
            return states[:, None], None  # (B, D) -> (B, 1, D)
        B, T = len(lengths), max(lengths)
        if sum(lengths) == B * T:  # no padding
            return states.view(B, T, -1), None
        mask = torch.arange(T) < torch.tensor(lengths)[:, None]  # (B, T)
        padded = torch.nn.utils.rnn.pad_sequence(states.split(lengths), batch_first=True)  # (N, D) -> (B, T, D)
        return padded, mask.long().to(self.device)


def check_prompts(prompts: Any) -> Mapping[str, str | None]:
    """Raises TypeError for what is no dict; its texts are checked where it is set."""
    if not isinstance(prompts, Mapping):
        raise TypeError(f"prompts must be a dict of names and texts, got {type(prompts).__name__}")
    return prompts


def fast_or_plain(model: BertModel, dtype: torch.dtype | str | None) -> BertModel | OptimizedModel:
    """What `optimize` makes of a model, or the model itself, with a notice, if that is none that it knows exactly."""
    try:
        return optimize(model, dtype)
    except (TypeError, ValueError) as error:
        if dtype is not None and isinstance(error, ValueError):
            raise  # a type was asked for that cannot be had
        logger.warning("SentenceEncoder computes on the plain model: %s", error)
        return model

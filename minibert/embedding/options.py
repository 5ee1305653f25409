"""The arguments of `SentenceEncoder.encode`: their types, checked values, and the forms that results come in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from minibert.checks import check_choice
from minibert.compat import loading
from minibert.embedding.precision import quantize
from minibert.embedding.texts import Text
from minibert.embedding.workers import Pool

Texts = Text | Iterable[Text]
Device = str | int | torch.device
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

OUTPUTS = ("sentence_embedding", "token_embeddings", None)
FORMS = ("numpy", "torch", "list")


class VectorOptions(TypedDict, total=False):
    """Arguments of `encode` that leave its result an array, or a tensor."""

    sentences: Texts
    texts: Texts
    precision: Precision | None
    device: Device | Sequence[Device] | None
    normalize_embeddings: bool
    truncate_dim: int | None
    pool: Pool | None
    chunk_size: int | None
    normalize: bool
    processes: int | None
    task: Literal["query", "document"] | None


class AnyOptions(VectorOptions, total=False):
    """All that can be given by name only."""

    output_value: Literal["sentence_embedding", "token_embeddings"] | None
    convert_to_numpy: bool
    convert_to_tensor: bool
    convert_to: Literal["numpy", "torch", "list"] | None


class AllOptions(AnyOptions, total=False):
    """All but the texts and their prompt."""

    batch_size: int | None
    show_progress_bar: bool | None


class ConstructorOptions(TypedDict, total=False):
    """Arguments of sentence-transformers' constructor that `SentenceEncoder.from_pretrained` takes besides its own."""

    cache_folder: str | os.PathLike[str] | None
    use_auth_token: str | bool | None
    trust_remote_code: bool
    model_kwargs: dict[str, Any] | None
    processor_kwargs: dict[str, Any] | None
    tokenizer_kwargs: dict[str, Any] | None
    config_kwargs: dict[str, Any] | None
    backend: Literal["torch"]


class SaveOptions(TypedDict, total=False):
    """Arguments of its `save_pretrained` that change nothing here."""

    model_name: str | None
    create_model_card: bool
    train_datasets: list[str] | None
    safe_serialization: bool


@dataclass(frozen=True)
class Further:
    """Arguments of `encode` that sentence-transformers' does not have, or not under this name; and `task`."""

    sentences: Any = None
    texts: Any = None
    normalize: bool = False
    convert_to: str | None = None
    processes: int | None = None
    task: str | None = None


def further(arguments: dict[str, Any]) -> Further:
    """Raises TypeError for an argument that `encode` does not have, ValueError for an unknown task."""
    for name in arguments:
        if name not in Further.__dataclass_fields__:
            known = ", ".join(Further.__dataclass_fields__)
            raise TypeError(f"encode takes no argument {name!r}; by name alone it takes {known}")
    check_choice("task", arguments.get("task"), (None, "query", "document"))
    return Further(**arguments)


@dataclass(frozen=True)
class Options:
    """How to embed, checked: what a worker has to know beside the texts."""

    prompt: str
    batch_size: int | None
    normalize: bool
    truncate_dim: int | None
    output: str | None = "sentence_embedding"


def named_texts(inputs: Any, sentences: Any, texts: Any) -> Any:
    """The texts, under whichever of the three names they came. Raises TypeError for none or several."""
    given = [value for value in (inputs, sentences, texts) if value is not None]
    if len(given) > 1:
        raise TypeError("inputs, sentences and texts are names of one argument: give one of them")
    return given[0] if given else None


def form(convert_to: str | None, convert_to_numpy: bool, convert_to_tensor: bool) -> str:
    """One of `FORMS`. Raises ValueError for any other `convert_to`."""
    if convert_to is None:
        return "torch" if convert_to_tensor else "numpy" if convert_to_numpy else "list"
    return check_choice("convert_to", convert_to, FORMS)


def in_form(vectors: Tensor, form: str, precision: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Vectors (n, D), all there are, in the form and the precision that were asked for; tensors on that device."""
    if precision != "float32":
        vectors = torch.from_numpy(quantize(vectors.float().cpu().numpy(), precision))
        dtype = vectors.dtype
    if form == "numpy":
        return vectors.numpy() if precision != "float32" else as_array(vectors)
    vectors = vectors.to(device, dtype)
    return list(vectors) if form == "list" else vectors


def as_array(vectors: Tensor) -> np.ndarray:
    """As float32, or as float64 if they are that."""
    return (vectors if vectors.dtype == torch.float64 else vectors.float()).cpu().numpy()


def from_constructor(options: ConstructorOptions, where: dict[str, Any], dtype: Any) -> Any:
    """The arguments of SentenceTransformer's constructor in minibert's words: completes `where`, returns the dtype.

    cache_folder and use_auth_token are cache_dir and token; SENTENCE_TRANSFORMERS_HOME in the environment is the cache
    where none is given. model_kwargs may hold a dtype and what `minibert.compat.loading` takes; trust_remote_code does
    nothing. Raises ValueError for another backend than torch, for two different tokens, and for what would change the
    numbers and is not here, TypeError for what nobody knows.
    """
    given: dict[str, Any] = {**options}
    check_choice("backend", given.pop("backend", "torch"), ("torch",))
    given.pop("trust_remote_code", None)
    folder = given.pop("cache_folder", None)
    where["cache_dir"] = loading.one_of(("cache_dir", "cache_folder"), where["cache_dir"], folder)
    if where["cache_dir"] is None:
        where["cache_dir"] = os.environ.get("SENTENCE_TRANSFORMERS_HOME") or None
    for_model = dict(given.pop("model_kwargs", None) or {})
    loading.take_ignored(for_model)
    loading.take_location(given, where)
    loading.take_location(for_model, where)
    loading.check_attention(for_model.pop("attn_implementation", None))
    wanted = loading.one_of(("dtype", "torch_dtype"), for_model.pop("dtype", None), for_model.pop("torch_dtype", None))
    unknown = [name for name, value in given.items() if value not in (None, {})]
    if unknown := unknown + [f"model_kwargs[{name!r}]" for name in for_model]:
        raise TypeError(f"from_pretrained takes no argument {', '.join(unknown)}")
    return loading.one_of(("dtype", "model_kwargs['dtype']"), dtype, None if wanted == "auto" else wanted)

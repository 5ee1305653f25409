"""AutoConfig, AutoTokenizer, AutoModel...: names that most scripts use. There is one family, so each is one class."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, overload

import minibert

if TYPE_CHECKING:
    import torch

    from minibert.weights.checkpoint import LoadReport

M = TypeVar("M")


class _Auto(Generic[M]):
    """A class that is never made: `from_pretrained` and `from_config` make what the class `makes` is."""

    makes: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # to mypy, a class that says NoReturn has no methods
        raise TypeError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(name_or_path)")


class _AutoPart(_Auto[M]):
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> M:
        """As that of the class; raises the same errors."""
        return getattr(minibert, cls.makes).from_pretrained(pretrained_model_name_or_path, **options)


class _AutoModel(_Auto[M]):
    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[False] = ...,
        dtype: torch.dtype | str | None = ...,
        device: torch.device | str | None = ...,
        **options: Any,
    ) -> M: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        output_loading_info: Literal[True],
        dtype: torch.dtype | str | None = ...,
        device: torch.device | str | None = ...,
        **options: Any,
    ) -> tuple[M, LoadReport]: ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """As that of the class; raises the same errors."""
        return getattr(minibert, cls.makes).from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> M:
        """A new model, its weights initialised, of a copy of the config. Takes `dtype` and `attn_implementation`."""
        return getattr(minibert, cls.makes)._from_config(config, **options)


class AutoConfig(_AutoPart["minibert.BertConfig"]):
    """BertConfig by transformers' general name."""

    makes = "BertConfig"

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> minibert.BertConfig:
        """A new config. Raises ValueError for any type but "bert"."""
        return minibert.BertConfig(model_type=model_type, **fields)


class AutoTokenizer(_AutoPart["minibert.BertTokenizer"]):
    """BertTokenizer by transformers' general name."""

    makes = "BertTokenizer"


class AutoModel(_AutoModel["minibert.BertModel"]):
    """BertModel by transformers' general name."""

    makes = "BertModel"


class AutoModelForPreTraining(_AutoModel["minibert.BertForPreTraining"]):
    """BertForPreTraining by transformers' general name."""

    makes = "BertForPreTraining"


class AutoModelForMaskedLM(_AutoModel["minibert.BertForMaskedLM"]):
    """BertForMaskedLM by transformers' general name."""

    makes = "BertForMaskedLM"


class AutoModelForNextSentencePrediction(_AutoModel["minibert.BertForNextSentencePrediction"]):
    """BertForNextSentencePrediction by transformers' general name."""

    makes = "BertForNextSentencePrediction"


class AutoModelForSequenceClassification(_AutoModel["minibert.BertForSequenceClassification"]):
    """BertForSequenceClassification by transformers' general name."""

    makes = "BertForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel["minibert.BertForTokenClassification"]):
    """BertForTokenClassification by transformers' general name."""

    makes = "BertForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel["minibert.BertForQuestionAnswering"]):
    """BertForQuestionAnswering by transformers' general name."""

    makes = "BertForQuestionAnswering"


class AutoModelForMultipleChoice(_AutoModel["minibert.BertForMultipleChoice"]):
    """BertForMultipleChoice by transformers' general name."""

    makes = "BertForMultipleChoice"

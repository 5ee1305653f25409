"""AutoConfig, AutoTokenizer, AutoModel...: names that most scripts use. There is one family, so each is one class."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import minibert


class _Auto:
    """A class that is never made: `from_pretrained` and `from_config` make a model of the class `makes`."""

    makes: str

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(name_or_path)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """As that of the class; raises the same errors."""
        return getattr(minibert, cls.makes).from_pretrained(pretrained_model_name_or_path, **options)


class _AutoModel(_Auto):
    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """A new model, its weights initialised, of a copy of the config. Takes `dtype` and `attn_implementation`."""
        return getattr(minibert, cls.makes)._from_config(config, **options)


class AutoConfig(_Auto):
    """BertConfig by transformers' general name."""

    makes = "BertConfig"

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> Any:
        """A new config. Raises ValueError for any type but "bert"."""
        return minibert.BertConfig(model_type=model_type, **fields)


class AutoTokenizer(_Auto):
    """BertTokenizer by transformers' general name."""

    makes = "BertTokenizer"


class AutoModel(_AutoModel):
    """BertModel by transformers' general name."""

    makes = "BertModel"


class AutoModelForPreTraining(_AutoModel):
    """BertForPreTraining by transformers' general name."""

    makes = "BertForPreTraining"


class AutoModelForMaskedLM(_AutoModel):
    """BertForMaskedLM by transformers' general name."""

    makes = "BertForMaskedLM"


class AutoModelForNextSentencePrediction(_AutoModel):
    """BertForNextSentencePrediction by transformers' general name."""

    makes = "BertForNextSentencePrediction"


class AutoModelForSequenceClassification(_AutoModel):
    """BertForSequenceClassification by transformers' general name."""

    makes = "BertForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel):
    """BertForTokenClassification by transformers' general name."""

    makes = "BertForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel):
    """BertForQuestionAnswering by transformers' general name."""

    makes = "BertForQuestionAnswering"


class AutoModelForMultipleChoice(_AutoModel):
    """BertForMultipleChoice by transformers' general name."""

    makes = "BertForMultipleChoice"

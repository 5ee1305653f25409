"""minibert: BERT from scratch in plain PyTorch, with the public names of transformers.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see, and `_HOME` says again for use
    from minibert import parity as parity
    from minibert import study as study
    from minibert.base import BertPreTrainedModel as BertPreTrainedModel
    from minibert.compat.auto import AutoConfig as AutoConfig
    from minibert.compat.auto import AutoModel as AutoModel
    from minibert.compat.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
    from minibert.compat.auto import AutoModelForMultipleChoice as AutoModelForMultipleChoice
    from minibert.compat.auto import AutoModelForNextSentencePrediction as AutoModelForNextSentencePrediction
    from minibert.compat.auto import AutoModelForPreTraining as AutoModelForPreTraining
    from minibert.compat.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from minibert.compat.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from minibert.compat.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from minibert.compat.auto import AutoTokenizer as AutoTokenizer
    from minibert.config import BertConfig as BertConfig
    from minibert.embedding import SentenceEncoder as SentenceEncoder
    from minibert.embedding import semantic_search as semantic_search
    from minibert.fast import optimize as optimize
    from minibert.heads import BertForMaskedLM as BertForMaskedLM
    from minibert.heads import BertForMultipleChoice as BertForMultipleChoice
    from minibert.heads import BertForNextSentencePrediction as BertForNextSentencePrediction
    from minibert.heads import BertForPreTraining as BertForPreTraining
    from minibert.heads import BertForQuestionAnswering as BertForQuestionAnswering
    from minibert.heads import BertForSequenceClassification as BertForSequenceClassification
    from minibert.heads import BertForTokenClassification as BertForTokenClassification
    from minibert.heads import NextSentence as NextSentence
    from minibert.model import BertModel as BertModel
    from minibert.pipelines import FeatureExtractionPipeline as FeatureExtractionPipeline
    from minibert.pipelines import FillMaskPipeline as FillMaskPipeline
    from minibert.pipelines import NextSentencePipeline as NextSentencePipeline
    from minibert.pipelines import Pipeline as Pipeline
    from minibert.pipelines import QuestionAnsweringPipeline as QuestionAnsweringPipeline
    from minibert.pipelines import TextClassificationPipeline as TextClassificationPipeline
    from minibert.pipelines import TokenClassificationPipeline as TokenClassificationPipeline
    from minibert.pipelines import ZeroShotClassificationPipeline as ZeroShotClassificationPipeline
    from minibert.pipelines import pipeline as pipeline
    from minibert.text.tokenizer import BatchEncoding as BatchEncoding
    from minibert.text.tokenizer import BertTokenizer as BertTokenizer
    from minibert.text.tokenizer import BertTokenizerFast as BertTokenizerFast

__version__ = "0.1.0"

_HOME = {
    "minibert.config": ["BertConfig"],
    "minibert.model": ["BertModel"],
    "minibert.base": ["BertPreTrainedModel"],
    "minibert.heads": [
        "BertForMaskedLM",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "BertForPreTraining",
        "BertForQuestionAnswering",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "NextSentence",
    ],
    "minibert.text.tokenizer": ["BatchEncoding", "BertTokenizer", "BertTokenizerFast"],
    "minibert.pipelines": [
        "FeatureExtractionPipeline",
        "FillMaskPipeline",
        "NextSentencePipeline",
        "Pipeline",
        "QuestionAnsweringPipeline",
        "TextClassificationPipeline",
        "TokenClassificationPipeline",
        "ZeroShotClassificationPipeline",
        "pipeline",
    ],
    "minibert.fast": ["optimize"],
    "minibert.embedding": ["SentenceEncoder", "semantic_search"],
    "minibert.compat.auto": [
        "AutoConfig",
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForNextSentencePrediction",
        "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    ],
}
_ROOMS = ("parity", "study")  # reached as attributes: minibert.study.trace
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"minibert.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"minibert has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]

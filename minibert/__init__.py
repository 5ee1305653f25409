"""minibert: BERT from scratch in plain PyTorch, with the public names of transformers.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

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
    "minibert.embedding": ["SentenceEncoder"],
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

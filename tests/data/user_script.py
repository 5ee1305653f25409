"""What a user may write, with every public name; mypy --strict and pyright pass it as it stands. It is not run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from minibert import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    BertTokenizer,
    BertTokenizerFast,
    FeatureExtractionPipeline,
    FillMaskPipeline,
    NextSentence,
    NextSentencePipeline,
    Pipeline,
    QuestionAnsweringPipeline,
    SentenceEncoder,
    TextClassificationPipeline,
    TokenClassificationPipeline,
    ZeroShotClassificationPipeline,
    optimize,
    parity,
    pipeline,
    semantic_search,
    study,
)


def load(directory: Path) -> BertModel:
    model = BertModel.from_pretrained(directory, dtype="float32", device="cpu")
    other, report = BertForMaskedLM.from_pretrained("bert-base-uncased", output_loading_info=True)
    print(report["missing_keys"], other.config.vocab_size)
    heads: list[type[BertPreTrainedModel]] = [
        BertForPreTraining,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
    ]
    for head in heads:
        head(BertConfig(hidden_size=32, num_attention_heads=2)).save_pretrained(directory)
    return model.eval()


def load_by_auto(directory: Path) -> BertForSequenceClassification:
    config: BertConfig = AutoConfig.from_pretrained(directory)
    tokenizer: BertTokenizer = AutoTokenizer.from_pretrained(directory)
    encoder: BertModel = AutoModel.from_pretrained(directory)
    words: BertForMaskedLM = AutoModelForMaskedLM.from_pretrained(directory)
    both: BertForPreTraining = AutoModelForPreTraining.from_pretrained(directory)
    choice: BertForMultipleChoice = AutoModelForMultipleChoice.from_pretrained(directory)
    following: BertForNextSentencePrediction = AutoModelForNextSentencePrediction.from_pretrained(directory)
    answers, report = AutoModelForQuestionAnswering.from_pretrained(directory, output_loading_info=True)
    checked: BertForQuestionAnswering = answers
    tags: BertForTokenClassification = AutoModelForTokenClassification.from_pretrained(directory)
    print(config.hidden_size, len(tokenizer), encoder.dtype, words.num_parameters(), both.device)
    print(choice, following, checked, report["missing_keys"], tags)
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)


def tokenize(texts: list[str]) -> torch.Tensor:
    tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")
    fast: BertTokenizer = BertTokenizerFast.from_pretrained("bert-base-uncased")
    batch: BatchEncoding = tokenizer(texts, padding=True, return_tensors="pt")
    print(fast.decode([101, 102]), NextSentence.IS_NEXT)
    ids: torch.Tensor = batch["input_ids"]
    return ids


def embed(texts: list[str]) -> np.ndarray:
    encoder = SentenceEncoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", truncate_dim=64)
    vectors = encoder.encode(texts, normalize_embeddings=True, batch_size=8)
    tensor = encoder.encode([("a", "b")], convert_to_tensor=True)
    print(vectors.shape, tensor.device, encoder.similarity(vectors, vectors), semantic_search(vectors, vectors))
    encoder.save_pretrained("here")
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    print(encoder.encode_multi_process(texts, pool, batch_size=8))
    encoder.stop_multi_process_pool(pool)
    for chunk in encoder.encode_stream(iter(texts), chunk_size=100):
        print(chunk.shape)
    return vectors


def compute(model: BertModel, ids: torch.Tensor) -> None:
    fast = optimize(model, "bfloat16")
    print(fast.explain(), fast(ids).last_hidden_state, study.trace, parity.compare)


def answer() -> None:
    print(pipeline("fill-mask")("Paris is the [MASK] of France.", top_k=3))
    print(pipeline("ner", "some/model", aggregation_strategy="first")(["Paris"]))
    print(pipeline("sentiment-analysis", "some/model")("good"))
    print(pipeline("question-answering", "some/model")(question="Who?", context="Her."))
    print(pipeline("feature-extraction")("text"))
    print(pipeline("next-sentence-prediction")(("a", "b")))


def answer_by_class(model: BertForMaskedLM, tokenizer: BertTokenizer) -> list[Pipeline]:
    fill = FillMaskPipeline(model, tokenizer, top_k=2)
    others: list[type[Pipeline]] = [
        FeatureExtractionPipeline,
        NextSentencePipeline,
        QuestionAnsweringPipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        ZeroShotClassificationPipeline,
    ]
    print(fill("Paris is the [MASK] of France."), [kind.task for kind in others])
    return [fill]

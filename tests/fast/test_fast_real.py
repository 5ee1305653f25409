"""Lower precision on real checkpoints: what int8 and bfloat16 may cost in answers, by the benchmark's own measures."""

from pathlib import Path

import pytest
import torch
from reference import assert_as_exact

from minibert import BertForSequenceClassification, optimize
from minibert.fast import plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    missing = {name: reason for name in ("bfloat16", "int8") if (reason := plan._obstacle(name))}
    fast = plan.Speeds({"plain": 1.0, "float32": 2.0, "bfloat16": 4.0, "int8": 8.0}, missing)
    # numbers here do not depend on a busy machine
    monkeypatch.setattr(plan, "measure", lambda names, D, F, attempt=0: fast)
    import quality

    return quality


def test_fill_mask_agrees(quality, rxnfp_dir):
    values = {row["dtype"]: row["value"] for row in quality.fill_mask(rxnfp_dir / "bert_pretrained")}
    assert values["float32"] == 1.0
    assert values["bfloat16"] >= 0.97
    assert values["int8"] >= 0.97


def test_sentence_embeddings_keep_their_direction(quality, minilm_dir):
    texts = ["A man is playing a guitar.", "The stock market fell sharply today.", "Who wrote this?", "Rain.",
             "BERT reads whole sentences at once, from both sides.", "Two dogs run over snow."]  # fmt: skip
    for row in quality.embeddings(minilm_dir, texts):
        assert row["value"] >= 0.995, row


def test_classifier_of_reactions(rxnfp_dir):
    model = BertForSequenceClassification.from_pretrained(rxnfp_dir / "bert_ft_10k_25s")
    ids = torch.randint(5, model.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, fast = model(ids).logits, optimize(model)(ids).logits
        assert_as_exact(fast, plain, model.double()(ids).logits)

"""Vectors from pairs: the loss is sentence-transformers' own, and so are the files."""

from __future__ import annotations

import random

import finetune_case as case
import pytest
import torch
from finetune_case import WORDS, metrics_of, run
from reference import assert_as_exact, rounding

import minibert
from minibert.embedding.modules import Normalize
from minibert.finetuning.sentence_pairs import SCALE, SentencePairs, ranking_loss
from minibert.finetuning.start import open_model

ROUNDING = 64 * torch.finfo(torch.float32).eps  # of log(exp(x)) - x, with x the 20 of the scale
PARTNERS = dict(zip(WORDS[:8], WORDS[8:16], strict=True))


def partners(path, count, seed, negatives=False):
    """Two words, and their partners: which words belong together is arbitrary, and must be learnt."""
    draw, lines = random.Random(seed), ["text,text_pair" + ",negative" * negatives]
    for _ in range(count):
        words = draw.sample(WORDS[:8], 3)
        pair = " ".join(PARTNERS[word] for word in words)
        lines.append(f"{' '.join(words)},{pair}" + f",{PARTNERS[words[0]]}" * negatives)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def learnt(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    train, dev = partners(out / "train.csv", 300, 0), partners(out / "dev.csv", 60, 1)
    assert run(start, out / "run", train, dev, "sentence-pairs", "--epochs", 6) == 0
    return out


def test_pairs_are_found(learnt):
    """By chance one of some fifty candidates would be right."""
    lines = metrics_of(learnt / "run")
    assert max(line["accuracy"] for line in lines) > 0.6
    assert all(line["mrr"] >= line["accuracy"] for line in lines)


def test_both_libraries_open_the_encoder(learnt):
    from sentence_transformers import SentenceTransformer

    directory = learnt / "run" / "model"
    texts = ["sun rain day", "cat", "dog bird, fish " * 20, ""]
    ours = minibert.SentenceEncoder.from_pretrained(directory)
    theirs = SentenceTransformer(str(directory), device="cpu")
    found, expected = (encoder.encode(texts, convert_to_tensor=True) for encoder in (ours, theirs))
    exact = SentenceTransformer(str(directory), device="cpu").double().encode(texts, convert_to_tensor=True)
    assert_as_exact(found, expected, exact)
    assert ours.max_seq_length == theirs.max_seq_length == 32
    found = ours.encode(
        ["sun rain day", *(" ".join(PARTNERS[w] for w in words.split()) for words in ("sun rain day", "cat dog sky"))]
    )
    similarity = ours.similarity(found[:1], found[1:])[0]
    assert similarity[0] > similarity[1]


def test_a_sentence_encoder_goes_on(learnt, tmp_path, capsys):
    """One with modules and settings of its own, which the result has too."""
    encoder = minibert.SentenceEncoder.from_pretrained(learnt / "run" / "model", fast=False)
    other = minibert.SentenceEncoder(
        encoder.model, encoder.tokenizer, "cls", [Normalize()], max_seq_length=20, default_prompt_name="query",
        prompts={"query": "cat ", "document": "dog "},
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    train = learnt / "dev.csv"
    assert run(tmp_path / "other", tmp_path / "run", train, train, "sentence-pairs", "--epochs", 1) == 0
    assert "head: none: cls pooling" in capsys.readouterr().out
    result = minibert.SentenceEncoder.from_pretrained(tmp_path / "run" / "model")
    assert (result.pooling.modes, result.max_seq_length, result.default_prompt_name) == (("cls",), 20, "query")
    assert [type(module).__name__ for module in result.after] == ["Normalize"]
    assert result.prompts == other.prompts
    task = SentencePairs()
    examples = task.read(train)
    begin = open_model(task, str(tmp_path / "other"), None, 0)
    rows = task.encode(examples, begin.tokenizer, {}, 32)
    assert all(row[1] == begin.tokenizer.vocab["cat"] for row in rows.input_ids)  # the prompt
    assert max(map(len, rows.input_ids)) <= 20


@pytest.mark.parametrize("negatives", [False, True])
def test_the_loss_is_that_of_sentence_transformers(start, tmp_path, negatives):
    """Value and gradient of every parameter, on the same batch of different texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    task = SentencePairs()
    path = tmp_path / "pairs.csv"
    columns = [["sun rain", "cat", "bad ugly day", "tom"], ["dog", "bird fish", "nice good", "paris sarah"],
               ["london", "sky sun", "sun day", "ugly cat"]][: 2 + negatives]  # fmt: skip
    header = ["text", "text_pair", "negative"][: 2 + negatives]
    path.write_text("\n".join(",".join(row) for row in [header, *zip(*columns, strict=True)]))
    examples = task.read(path)
    begin = open_model(task, str(start), None, 0)
    rows = task.encode(examples, begin.tokenizer, {}, 32)
    loss = task.loss(begin.model.eval(), begin.tokenizer, rows, list(range(4)))
    loss.backward()
    task.encoder.save_pretrained(tmp_path / "encoder")
    peer = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").eval()
    reference = MultipleNegativesRankingLoss(peer)
    expected = reference([peer.tokenize(column) for column in columns], torch.zeros(4))
    expected.backward()
    # The scale times a cosine's rounding, which is less than that of the states it is of (they are longer than 1)
    assert loss.item() == pytest.approx(expected.item(), abs=SCALE * 4 * rounding(peer[0].auto_model))
    exact = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").eval().double()
    MultipleNegativesRankingLoss(exact)([exact.tokenize(c) for c in columns], torch.zeros(4)).backward()
    gradients = [
        {name: parameter.grad for name, parameter in model.named_parameters()}
        for model in (begin.model, peer[0].auto_model, exact[0].auto_model)
    ]
    # All of them at once: some are zero but for rounding, a key's bias by nature
    assert_as_exact(*(torch.cat([found[name].flatten() for name in gradients[0]]) for found in gradients))


def test_the_loss_by_hand():
    anchors, candidates = torch.eye(2), torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 5.0]])
    cosines = torch.tensor([[1.0, 0.5**0.5, 0.0], [0.0, 0.5**0.5, 1.0]])
    expected = torch.stack([(20 * cosines[i]).logsumexp(0) - 20 * cosines[i, i] for i in range(2)]).mean()
    assert ranking_loss(anchors, candidates).item() == pytest.approx(expected.item(), abs=ROUNDING)
    excluded = torch.tensor([[False, True, True], [True, False, True]])
    assert ranking_loss(anchors, candidates, excluded).item() == 0


def test_equal_texts_are_no_negatives_of_each_other(start, tmp_path):
    """Of four pairs that say the same, or that share a text, nothing is wrong to confuse."""
    path = tmp_path / "pairs.csv"
    path.write_text("text,text_pair\nsun,day\nsun,day\nsun,sky\nrain,day\nday,sun\n")
    task = SentencePairs()
    examples = task.read(path)
    begin = open_model(task, str(start), None, 0)
    rows = task.encode(examples, begin.tokenizer, {}, 32)
    loss = task.loss(begin.model.eval(), begin.tokenizer, rows, [0, 1])
    assert loss.item() == pytest.approx(0, abs=ROUNDING)
    with torch.no_grad():
        assert task.loss(begin.model, begin.tokenizer, rows, [0, 2]).item() == pytest.approx(0, abs=ROUNDING)
        assert task.loss(begin.model, begin.tokenizer, rows, [0, 4]).item() == pytest.approx(0, abs=ROUNDING)
        assert task.loss(begin.model, begin.tokenizer, rows, [2, 3]).item() > 0
    scores = task.validate(begin.model, begin.tokenizer, rows)
    assert 0 < scores["mrr"] <= 1


def test_what_cannot_be_learnt(start, tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("text,text_pair\nsun,day\nrain,day\n")
    assert run(start, tmp_path / "run", path, path, "sentence-pairs") == 1
    assert "a.csv: one and the same second text everywhere" in capsys.readouterr().err
    path = case.weather(tmp_path / "b.csv", 5, 0, pairs=True)
    assert run(start, tmp_path / "run", path, path, "sentence-pairs") == 1
    assert "b.csv:1: the column 'label': sentence pairs have no labels" in capsys.readouterr().err
    path = partners(tmp_path / "c.csv", 20, 0)
    assert run(start, tmp_path / "run", path, path, "sentence-pairs", "--batch-size", 1) == 1
    assert "batch_size is 1, but must be at least 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

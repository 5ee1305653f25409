"""Sentence pairs and masks: the paper's rules, checked on what comes out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from minibert.pretraining import data
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.data import (
    BatchMaker,
    PairRules,
    Plan,
    Position,
    lengths_of,
    plan_batches,
    plan_pairs,
    report,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DOCUMENTS, SENTENCES = 40, 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Documents whose every word says where it is from: "d3 s7 w2" is made of three tokens that name the place."""
    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    names = [f"{kind}{i}" for kind, count in (("d", DOCUMENTS), ("s", SENTENCES), ("w", 20)) for i in range(count)]
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL, *names, "##x", "##y"]) + "\n")
    documents = [
        "\n".join(
            " ".join(f"d{d} s{s} w{w}" + "xyx"[: draw.randrange(4)] for w in range(draw.randint(1, 8)))
            for s in range(draw.randint(1, SENTENCES))
        )
        for d in range(DOCUMENTS)
    ]
    (directory / "text.txt").write_text("\n\n".join(documents))
    return build_corpus(
        directory / "text.txt", directory / "corpus", directory / "vocab.txt", num_workers=1, progress=False
    )


def all_pairs(corpus: Corpus, rules: PairRules, seed: int = 0) -> np.ndarray:
    return plan_pairs(corpus, np.arange(DOCUMENTS), rules, np.random.default_rng(seed))


def plans(corpus: Corpus, rules: PairRules, count: int, **options) -> list[Plan]:
    return list(itertools.islice(plan_batches(corpus, rules, 8, **options), count))


def equal(a: data.Batch, b: data.Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(list(vars(a).values())[:-1], list(vars(b).values())[:-1], strict=True))


def document_of(corpus: Corpus, position: np.ndarray) -> np.ndarray:
    return np.searchsorted(corpus.sentences[corpus.documents], position, side="right") - 1


@pytest.mark.parametrize("max_length", [8, 32, 128])
def test_pairs_follow_the_rules(corpus, max_length):
    rules = PairRules(max_length=max_length)
    pairs = np.concatenate([all_pairs(corpus, rules, seed) for seed in range(20)])
    a_document, b_document = document_of(corpus, pairs["a"]), document_of(corpus, pairs["b"])
    assert (pairs["a_length"] >= 1).all()
    assert (pairs["b_length"] >= 1).all()
    assert (lengths_of(pairs) <= max_length).all()
    for start, length, document in (("a", "a_length", a_document), ("b", "b_length", b_document)):
        assert (document == document_of(corpus, pairs[start] + pairs[length] - 1)).all()  # never over the end
    random_next = pairs["not_next"] == 1
    assert (a_document == b_document)[~random_next].all()
    assert (a_document != b_document)[random_next].all()
    uncut = ~random_next & (pairs["cut"] == 0)
    assert (pairs["a"] + pairs["a_length"] == pairs["b"])[uncut].all()
    assert abs(random_next.mean() - 0.5) < 0.03
    assert abs(pairs["short"].mean() - 0.1) < 0.02


def test_every_sentence_is_used_as_it_goes(corpus):
    """Without cuts and random pairs, the pairs of a document are that document."""
    pairs = all_pairs(corpus, PairRules(max_length=2000, random_next_probability=0.0, short_probability=0.0))
    sizes = np.diff(corpus.documents)
    covered = pairs["a_length"].sum() + pairs["b_length"].sum()
    alone = np.diff(corpus.sentences)[corpus.documents[:-1][sizes == 1]].sum()
    assert covered == corpus.sentences[-1] - alone  # a document of one sentence has no next one


def google_truncation(a: int, b: int, room: int) -> tuple[int, int]:
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


def test_truncation_is_googles():
    room = 20
    sizes = np.array(list(itertools.product(range(1, 50), range(1, 50))))
    pairs = np.zeros(len(sizes), data.PAIR)
    pairs["a_length"], pairs["b_length"] = sizes.T
    pairs["a"], pairs["b"] = 1000, 2000
    data._truncate(pairs, room, np.random.default_rng(0))
    expected = np.array([google_truncation(a, b, room) for a, b in sizes.tolist()])
    assert np.array_equal(np.stack([pairs["a_length"], pairs["b_length"]], 1), expected)
    removed = sizes[:, 0] - pairs["a_length"]
    front = pairs["a"] - 1000
    assert ((front >= 0) & (front <= removed)).all()
    assert abs(front.sum() / removed.sum() - 0.5) < 0.02  # half of the cuts at either end


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole_words", [False, True])
def test_batches_are_well_formed(corpus, packed, whole_words):
    rules = PairRules(max_length=64, whole_words=whole_words, short_probability=0.5)
    maker, pieces = BatchMaker(corpus, rules, packed=packed), corpus.vocab_file.read_text().splitlines()
    for plan in plans(corpus, rules, 20, packed=packed):
        batch = maker[plan]
        labels, ids = batch.labels.numpy(), batch.input_ids.numpy()
        original = np.where(labels >= 0, labels, ids)
        assert (original[batch.pair.numpy() == 0] == 0).all()
        for number, pair in enumerate(plan.pairs, start=1):
            here = batch.pair.numpy() == number
            a, b = corpus.tokens(pair["a"], pair["a_length"]), corpus.tokens(pair["b"], pair["b_length"])
            assert original[here].tolist() == [2, *a, 3, *b, 3]
            assert batch.token_type_ids.numpy()[here].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
            assert batch.position_ids.numpy()[here].tolist() == list(range(here.sum()))
            cls = batch.cls_positions[number - 1]
            assert batch.pair.flatten()[cls] == number
            assert batch.position_ids.flatten()[cls] == 0
            assert batch.next_sentence_label[number - 1] == pair["not_next"]
            budget = max(1, round(0.15 * (len(a) + len(b))))
            chosen = labels[here] >= 0
            assert chosen.sum() <= budget if whole_words else chosen.sum() == budget
            assert not chosen[[0, len(a) + 1, -1]].any()
            if whole_words:
                goes_on = np.array([pieces[i].startswith("##") for i in original[here]])
                assert (chosen[1:] == chosen[:-1])[goes_on[1:] & ~np.isin(original[here][:-1], [2, 3])].all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_80_10_10(corpus, whole_words):
    found = report(corpus, PairRules(max_length=64, whole_words=whole_words), 32, batches=60)
    assert abs(found.chosen - 0.15) < 0.01
    assert abs(found.masked - 0.8) < 0.015
    assert abs(found.kept - 0.1) < 0.015  # a random token is rarely the same
    assert abs(found.replaced - 0.1) < 0.015
    assert found.masked + found.kept + found.replaced == pytest.approx(1.0)
    assert "random" in str(found)


def test_all_ordinary_tokens_may_come_in_and_no_other(corpus):
    maker, seen = BatchMaker(corpus, PairRules(max_length=64)), set()
    for plan in plans(corpus, PairRules(max_length=64, masked=1.0), 200):
        maker.rules = PairRules(max_length=64, masked=1.0)
        batch = maker[plan]
        found = batch.input_ids.flatten()[batch.masked_positions]
        seen |= set(found[(found != batch.masked_labels) & (batch.masked_labels >= 0)].tolist())
    assert seen == {4, *range(5, corpus.vocab_size)}


def test_the_seed_decides_and_nothing_else(corpus):
    rules = PairRules(max_length=64)
    first, again = (plans(corpus, rules, 12) for _ in range(2))
    maker = BatchMaker(corpus, rules)
    assert all(equal(maker[a], maker[b]) for a, b in zip(first, again, strict=True))
    # in any order, and whatever the padding
    padded = BatchMaker(corpus, rules, pad_to=64)
    for plan in reversed(first):
        batch, wide = maker[plan], padded[plan]
        assert torch.equal(batch.input_ids, wide.input_ids[:, : batch.input_ids.shape[1]])
    other = plans(corpus, replace(rules, seed=1), 12)
    assert not any(equal(maker[a], maker[b]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_the_stream_starts_anywhere(corpus, packed, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENTS_A_BLOCK", 16)  # three blocks an epoch
    rules = PairRules(max_length=64)
    whole = plans(corpus, rules, 60, packed=packed)
    assert whole[-1].epoch > 0
    for i in (0, 1, 7, 30, 58):
        rest = plans(corpus, rules, 59 - i, packed=packed, start=whole[i].after)
        assert all(
            a.pairs.tobytes() == b.pairs.tobytes() and a.after == b.after
            for a, b in zip(whole[i + 1 :], rest, strict=True)
        )


def test_masks_and_pairs_are_new_every_epoch(corpus):
    rules = PairRules(max_length=64)
    first = next(plan_batches(corpus, rules, 8))
    second = next(plan_batches(corpus, rules, 8, start=Position(epoch=1)))
    assert first.pairs.tobytes() != second.pairs.tobytes()
    maker = BatchMaker(corpus, rules)
    assert not torch.equal(maker[first].masked_positions, maker[replace(first, epoch=1)].masked_positions)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_make_up_the_batch(corpus, packed, parts):
    rules = PairRules(max_length=64)
    maker = BatchMaker(corpus, rules, packed=packed, pad_to=64)
    for plan in plans(corpus, rules, 5, packed=packed):
        whole = maker[plan]
        pieces = [maker[plan.part(i, parts)] for i in range(parts)]
        assert torch.equal(whole.input_ids, torch.cat([piece.input_ids for piece in pieces]))
        assert torch.equal(whole.labels, torch.cat([piece.labels for piece in pieces]))
        assert sorted(whole.next_sentence_label) == sorted(torch.cat([p.next_sentence_label for p in pieces]))


def test_packing_wastes_little(corpus):
    rules = PairRules(max_length=64, short_probability=1.0)
    packed, padded = (report(corpus, rules, 8, packed=packed, batches=30) for packed in (True, False))
    assert packed.padding < 0.15  # rows of one pair of these lengths, not sorted, would waste about half
    assert packed.pairs > padded.pairs
    epoch = itertools.takewhile(lambda plan: plan.epoch == 0, plan_batches(corpus, rules, 8, packed=True))
    numbers = {number for plan in epoch for number in plan.pairs["number"].tolist()}
    assert numbers == set(range(max(numbers) + 1))  # each pair at least once


def test_a_corpus_smaller_than_a_batch(corpus):
    pairs = 0
    for packed in (False, True):
        plan = next(plan_batches(corpus, PairRules(max_length=64), 5000, packed=packed))
        assert len(np.unique(plan.pairs["row"])) == 5000
        pairs += len(plan.pairs)
    assert pairs > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 4}, "max_length is 4"),
        ({"masked": 1.5}, "masked is 1.5"),
        ({"short_probability": -1}, "must be from 0 to 1"),
    ],
)
def test_impossible_rules(change, message):
    with pytest.raises(ValueError, match=message):
        PairRules(**change)

"""Sentence pairs and masks: the paper's rules, checked on what comes out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_job import labels_of

from minibert.pretraining import batches, order, pairs
from minibert.pretraining.batches import Batch, BatchMaker, _whole_words
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.order import Plan, Position, plan_batches
from minibert.pretraining.pairs import PairRules, lengths_of, plan_pairs
from minibert.pretraining.report import report

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


def equal(a: Batch, b: Batch) -> bool:
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
    planned = np.zeros(len(sizes), pairs.PAIR)
    planned["a_length"], planned["b_length"] = sizes.T
    planned["a"], planned["b"] = 1000, 2000
    pairs._truncate(planned, room, np.random.default_rng(0))
    expected = np.array([google_truncation(a, b, room) for a, b in sizes.tolist()])
    assert np.array_equal(np.stack([planned["a_length"], planned["b_length"]], 1), expected)
    removed = sizes[:, 0] - planned["a_length"]
    front = planned["a"] - 1000
    assert ((front >= 0) & (front <= removed)).all()
    assert abs(front.sum() / removed.sum() - 0.5) < 0.02  # half of the cuts at either end


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whole_words", [False, True])
def test_batches_are_well_formed(corpus, packed, whole_words):
    rules = PairRules(max_length=64, whole_words=whole_words, short_probability=0.5)
    maker = BatchMaker(corpus, rules, packed=packed)
    pieces = (corpus.directory / "vocab.txt").read_text().splitlines()
    for plan in plans(corpus, rules, 20, packed=packed):
        batch = maker[plan]
        labels, ids = labels_of(batch).numpy(), batch.input_ids.numpy()
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


def test_what_is_left_of_a_pairs_budget_is_not_the_next_ones():
    """No word of three pieces fits into a budget of two; of two pieces, one fits into three."""
    word = np.repeat([0, 1, 2, 3, 4], [3, 3, 2, 2, 2])
    taken = _whole_words(word, sizes=np.array([6, 6]), budgets=np.array([2, 3]))
    assert np.flatnonzero(taken).tolist() == [6, 7]


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
    monkeypatch.setattr(order, "DOCUMENTS_A_BLOCK", 16)  # three blocks an epoch
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


def test_nothing_random_is_drawn_twice(corpus, monkeypatch):
    """Every block of every epoch, and every pair in it, has random numbers of its own."""
    monkeypatch.setattr(order, "DOCUMENTS_A_BLOCK", 10)
    drawn = []
    for module in (order, batches):
        monkeypatch.setattr(module, "random_of", lambda *words: (drawn.append(words), pairs.random_of(*words))[1])
    maker, repeated = BatchMaker(corpus, PairRules(max_length=64)), 0
    for plan in plan_batches(corpus, maker.rules, 8, epochs=2):
        maker[plan]
        repeated += int(plan.pairs["repeated"].sum())  # these are the same pairs again
    assert len(drawn) > 200
    assert len(drawn) - len({(*words, 0, 0, 0)[:4] for words in drawn}) == repeated


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_make_up_the_batch(corpus, packed, parts):
    rules = PairRules(max_length=64)
    maker = BatchMaker(corpus, rules, packed=packed, pad_to=64)
    for plan in plans(corpus, rules, 5, packed=packed):
        whole = maker[plan]
        pieces = [maker[plan.part(i, parts)] for i in range(parts)]
        assert torch.equal(whole.input_ids, torch.cat([piece.input_ids for piece in pieces]))
        assert torch.equal(labels_of(whole), torch.cat([labels_of(piece) for piece in pieces]))
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


# --- what would not be seen in the losses


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory) -> Corpus:
    return documents_of(60, 30, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory) -> Corpus:
    return documents_of(6, 300, tmp_path_factory.mktemp("short"))


def documents_of(sentences: int, count: int, directory: Path) -> Corpus:
    """Sentences of 3 to 30 words, whose lengths say nothing about their places."""
    draw = random.Random(1)
    (directory / "vocab.txt").write_text("\n".join([*SPECIAL, *"abcdefgh"]) + "\n")
    documents = [
        "\n".join(" ".join(draw.choices("abcdefgh", k=draw.randint(3, 30))) for _ in range(sentences))
        for _ in range(count)
    ]
    (directory / "text.txt").write_text("\n\n".join(documents))
    return build_corpus(
        directory / "text.txt", directory / "corpus", directory / "vocab.txt", num_workers=1, progress=False
    )


@pytest.mark.parametrize("short", [0.0, 1.0])
@pytest.mark.parametrize(("which", "max_length"), [("long_documents", 128), ("short_documents", 512)])
def test_lengths_do_not_tell_random_pairs_from_others(which, max_length, short, request):
    """Not where an example is full either, nor where its document ends before."""
    corpus, rules = request.getfixturevalue(which), PairRules(max_length=max_length, short_probability=short)
    documents = np.arange(len(corpus.documents) - 1)
    planned = np.concatenate([plan_pairs(corpus, documents, rules, np.random.default_rng(i)) for i in range(20)])
    random_next, real = (planned[planned["not_next"] == label] for label in (1, 0))
    for name in ("a_length", "b_length", "cut"):
        assert random_next[name].mean() == pytest.approx(real[name].mean(), rel=0.1, abs=0.5)
    # Nor does the shape of their distribution: the best threshold on B's length is right hardly more often than a coin
    lengths = np.arange(max_length)[:, None]
    shares = [(pairs_["b_length"] <= lengths).mean(1) for pairs_ in (random_next, real)]
    assert np.abs(shares[0] - shares[1]).max() < 0.1


def test_text_that_a_random_one_displaces_comes_next(long_documents):
    """With random second texts alone, the first ones are each document from its beginning up to its last sentence."""
    rules = PairRules(max_length=2500, short_probability=0.0, random_next_probability=1.0)
    planned = plan_pairs(long_documents, np.arange(30), rules, np.random.default_rng(0))
    owners = document_of(long_documents, planned["a"])
    assert not planned["cut"].any()
    for document in range(30):
        first, end = long_documents.documents[document : document + 2]
        own = np.sort(planned[owners == document], order="a")
        assert own["a"][0] == long_documents.sentences[first]
        assert (own["a"][1:] == own["a"][:-1] + own["a_length"][:-1]).all()  # no gap
        assert own["a"][-1] + own["a_length"][-1] == long_documents.sentences[end - 1]


def test_documents_are_shuffled(corpus, monkeypatch):
    monkeypatch.setattr(order, "DOCUMENTS_A_BLOCK", 10)
    chosen = []
    for epoch in range(3):
        stream = plan_batches(corpus, PairRules(max_length=64), 8, start=Position(epoch=epoch), epochs=epoch + 1)
        first = np.concatenate([plan.pairs["a"] for plan in stream if plan.block == 0])
        chosen.append(frozenset(document_of(corpus, first)))
    assert len(set(chosen)) == 3
    assert not any(documents == frozenset(range(10)) for documents in chosen)


@pytest.mark.parametrize("packed", [False, True])
def test_batches_come_in_no_order_of_length(long_documents, packed):
    rules = PairRules(max_length=128, short_probability=1.0)
    stream = plan_batches(long_documents, rules, 8, packed=packed, epochs=1)
    longest = [lengths_of(plan.pairs).mean() for plan in stream]
    assert len(longest) > 20
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [8, 1000])
def test_an_epoch_has_an_end_and_each_pair_counts_once(corpus, packed, rows, monkeypatch):
    monkeypatch.setattr(order, "DOCUMENTS_A_BLOCK", 16)
    rules = PairRules(max_length=64)
    endless = itertools.takewhile(lambda plan: plan.epoch == 0, plan_batches(corpus, rules, rows, packed=packed))
    epoch = list(plan_batches(corpus, rules, rows, packed=packed, epochs=1))
    assert [plan.after for plan in epoch] == [plan.after for plan in endless]
    maker, once = (BatchMaker(corpus, rules, packed=packed, once=once) for once in (False, True))
    labelled, all_labelled, counted = 0, 0, set()
    for plan in epoch:
        batch, whole = once[plan], maker[plan]
        assert torch.equal(batch.input_ids, whole.input_ids)
        kept = batch.next_sentence_label != -100
        assert torch.equal(batch.next_sentence_label[kept], whole.next_sentence_label[kept])
        assert kept.tolist() == (plan.pairs["repeated"] == 0).tolist()
        assert batch.pairs == kept.sum()
        labelled += batch.masked
        counted |= {(plan.block, number) for number in plan.pairs["number"][kept.numpy()].tolist()}
        all_labelled += batch.pairs
        # The masks of a pair that counts are all there
        expected = np.isin(np.arange(1, 1 + len(plan.pairs)), np.flatnonzero(kept.numpy()) + 1)
        owner = whole.pair.flatten()[whole.masked_positions][whole.masked_labels >= 0].numpy() - 1
        assert batch.masked == expected[owner].sum()
    assert len(counted) == all_labelled  # none twice
    blocks = {plan.block for plan in epoch}
    fresh = {
        (block, number)
        for block in blocks
        for plan in epoch
        if plan.block == block
        for number in plan.pairs["number"].tolist()
    }
    assert counted == fresh  # none left out
    assert labelled > 0

"""Scores, against those of others and against what was counted by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
from seqeval.metrics import classification_report
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, IOE2

from minibert.finetuning import schemes
from minibert.finetuning.answers import answer_scores, best_threshold, exact_match, f1, normalize
from minibert.finetuning.schemes import check_scheme, entity_scores, find_scheme
from minibert.finetuning.scores import class_scores, multi_label_scores, number_scores, ranking_scores


def test_class_scores_are_those_of_others():
    draw = np.random.default_rng(0)
    true, found = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    expected = [2 * ((found == c) & (true == c)).sum() / ((found == c).sum() + (true == c).sum()) for c in (0, 1)]
    scores = class_scores(found, true)
    assert scores == {"accuracy": pytest.approx((found == true).mean()), "macro_f1": pytest.approx(np.mean(expected))}
    assert class_scores(np.array([1, 1]), np.array([1, 1])) == {"accuracy": 1, "macro_f1": 1}
    # A class that is never found counts, as does one that is found and never right
    assert class_scores(np.array([0, 0, 2]), np.array([0, 1, 0]))["macro_f1"] == pytest.approx((0.5 + 0 + 0) / 3)
    scores = multi_label_scores(np.array([[1, 0], [1, 1]]) > 0, np.array([[1, 0], [0, 1]]) > 0)
    assert scores == {"accuracy": 0.5, "micro_f1": pytest.approx(0.8), "macro_f1": pytest.approx((2 / 3 + 1) / 2)}
    scores = number_scores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert scores == {"rmse": pytest.approx(3**-0.5), "r2": pytest.approx(0.5), "pearson": pytest.approx(0.981981)}


def test_ranking_scores():
    similarity = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.7, 0.7, 0.1]])
    right = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]]) > 0
    expected = {"accuracy": pytest.approx(1 / 3), "mrr": pytest.approx((1 + 1 / 2 + 1 / 2) / 3)}  # a tie is lost
    assert ranking_scores(similarity, right) == expected
    assert ranking_scores(similarity, np.ones((3, 3), dtype=bool)) == {"accuracy": 1, "mrr": 1}


# Entities


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        ("O B-A I-A", "IOB"), ("B I O", "IOB"), ("B I", "IOB"), ("I-A O", "IOB"), ("b-per i-per o", "IOB"),
        ("B_A I_A O", "IOB"), ("A-B A-I C-B O", "IOB"), ("I-A E-A O", "IOE"), ("E-A S-A B-A I-A O", "IOBES"),
        ("S-A O", "IOBES"), ("B-A L-A U-B O", "BILOU"), ("U-A O", "BILOU"), ("B M E S", "BMES"),
        ("B-A M-A W-A O", "BMEWO"),
        ("PER LOC O", "IO"), ("person-actor art-music O", "IO"), ("NN VB DT", "none"), ("N V O A S E", "none"),
        ("hepatitis_B vitamin_E O", "IO"), ("0 1", "none"), ("O", "none"),
    ],
)  # fmt: skip
def test_schemes_are_known_by_their_labels(labels, scheme):
    assert find_scheme(labels.split()) == scheme


@pytest.mark.parametrize("labels", ["O B-A I-A MISC", "B-A X O", "B-A L-A S-A O", "E-A U-A O", "S-A MISC O"])
def test_mixed_labels_are_refused(labels):
    with pytest.raises(ValueError, match="has a letter that places it in an entity, but"):
        find_scheme(labels.split())


@pytest.mark.parametrize(
    ("one", "scheme", "other", "f1"),
    [
        ("B I O B", "IOB", "B I O B", 1),
        ("B I O B", "IOB", "B O O B", 0.5),
        ("B I I", "IOB", "B B I", 0),
        ("B-A I-A O", "IOB", "I-A I-A O", 1),  # IOB1 and IOB2
        ("I-A I-B", "IOB", "B-A B-B", 1),
        ("B-X-Y I-X-Y", "IOB", "B-X-Y I-X-Z", 0),
        ("B_A I_A O", "IOB", "B_A I_A O", 1),
        ("A-B A-I C-B", "IOB", "A-B A-I C-B", 1),
        ("A-B A-I C-B", "IOB", "A-B A-I C-I", 1),
        ("b-per i-per o", "IOB", "B-per I-per O", 1),
        ("B-A L-A U-B", "BILOU", "B-A L-A U-B", 1),
        ("U-A U-A", "BILOU", "B-A L-A", 0),
        ("B-A I-A L-A U-A", "BILOU", "B-A L-A U-A U-A", 0.4),
        ("B-A E-A S-A", "IOBES", "B-A E-A S-A", 1),
        ("S-A S-A", "IOBES", "B-A E-A", 0),
        ("I-A E-A E-A", "IOE", "I-A E-A E-A", 1),
        ("I-A E-A E-A", "IOE", "I-A I-A E-A", 0),
        ("B M E S", "BMES", "B M E S", 1),
        ("PER PER LOC O", "IO", "PER PER LOC O", 1),
        ("PER PER LOC O", "IO", "PER O LOC O", 0.5),
        ("O O", "IOB", "O O", 0),
    ],
)
def test_entity_scores(one, scheme, other, f1):
    scores = entity_scores([one.split()], [other.split()], scheme)
    assert scores["f1"] == pytest.approx(f1)


def test_precision_recall_and_accuracy():
    true, found = [["B-A", "I-A", "O"], ["B-B"]], [["B-A", "O", "O"], ["B-B"]]
    assert entity_scores(found, true) == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.75}
    true, found = [["B-A", "O", "B-A"]], [["B-A", "O", "O"]]
    assert entity_scores(found, true) == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "accuracy": 2 / 3,
    }


def entities_of(draw, count, begin, inside, end, single):
    """Labels of well-formed entities with something between them."""
    labels = []
    for _ in range(count):
        kind, length = draw.choice("XY"), draw.randint(1, 4)
        letters = single if length == 1 else begin + inside * (length - 2) + end
        labels += [f"{letter}-{kind}" for letter in letters] + ["O"] * draw.randint(1, 2)
    return labels


@pytest.mark.parametrize(
    ("scheme", "reference", "letters"),
    [("IOB", IOB2, "BIIB"), ("IOB", IOB1, "IIII"),
     ("IOE", IOE2, "IIEE"), ("IOBES", IOBES, "BIES"), ("BILOU", BILOU, "BILU")],
)  # fmt: skip
def test_well_formed_labels_are_scored_as_seqeval_does_strictly(scheme, reference, letters):
    draw = random.Random(0)
    true, found = ([entities_of(draw, 6, *letters) for _ in range(60)] for _ in range(2))
    pairs = [(a[: min(len(a), len(b))], b[: min(len(a), len(b))]) for a, b in zip(true, found, strict=True)]
    whole = [(a, b) for a, b in pairs if a[-1] == b[-1] == "O"]  # no entity is cut off
    true, found = ([*side] for side in zip(*whole, strict=True))
    report = classification_report(true, found, mode="strict", scheme=reference, output_dict=True, zero_division=0)
    ours = entity_scores(found, true, scheme)
    assert 0 < ours["f1"] < 1
    assert ours["f1"] == pytest.approx(report["micro avg"]["f1-score"])
    assert ours["precision"] == pytest.approx(report["micro avg"]["precision"])


def test_entities_ask_for_seqeval(monkeypatch):
    monkeypatch.setattr(schemes, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'minibert-torch\[finetune\]'"):
        check_scheme("IOB", ["B-A", "O"])
    check_scheme("none", ["NN", "VB"])


# Answers


def test_answers_are_compared_as_squad_does():
    assert normalize("  The \t Quick,  (brown) an Fox! ") == "quick brown fox"
    assert normalize("theatre another A-b") == "theatre another ab"
    assert exact_match("the Cat.", "cat") == 1
    assert f1("the big cat", "big dog") == 0.5
    assert f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert f1("", "") == f1("the", "a") == 1
    assert f1("", "cat") == f1("cat", "") == f1("cat", "dog") == 0


def test_answer_scores():
    assert answer_scores(["Paris", "big cat"], [["in paris", "Paris!"], ["cat"]]) == {
        "exact_match": 50, "f1": pytest.approx((1 + 2 / 3) * 50)}  # fmt: skip
    scores = answer_scores(["", "dog", "cat", ""], [[], [], ["cat"], ["dog"]])
    assert scores == {"exact_match": 50, "f1": 50, "has_answer_exact_match": 50, "has_answer_f1": 50, "no_answer": 50}
    assert answer_scores([""], [["the"]])["exact_match"] == 100
    assert answer_scores([""], [[]]) == {"exact_match": 100, "f1": 100, "no_answer": 100}


@pytest.mark.parametrize(
    ("differences", "percent", "threshold"),
    [
        # What keeping each answer gains over leaving it out: 1, -1, 2/3, -1. Leaving all out is worth 2 of 4.
        ((-3.0, -2.0, -1.0, 2.0), 75, -3.0),
        ((-3.0, -1.0, -2.0, 2.0), 100 * (2 + 5 / 3) / 4, -2.0),
        ((-3.0, 5.0, -3.0, 7.0), 100 * (2 + 5 / 3) / 4, -3.0),
        ((1.0, 1.0, 2.0, 3.0), 100 * (2 + 2 / 3) / 4, 2.0),  # no threshold keeps the first without the second
        ((2.0, -1.0, 1.0, -2.0), 50, -3.0),  # none is kept
        ((1.0, 1.0, 1.0, 1.0), 50, 0.0),  # nor here, where it is all or none
    ],
)
def test_best_threshold_by_hand(differences, percent, threshold):
    answers, right = ["Paris", "dog", "big cat", "bird"], [["paris"], [], ["cat"], []]
    assert best_threshold(answers, differences, right) == (pytest.approx(percent), threshold)


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_the_best_of_all(seed):
    """Against all thresholds, one by one; some differences are equal, and some answers empty."""
    draw = random.Random(seed)
    texts = ["cat", "big cat", "dog", "the", "big dog bird", ""]
    answers = draw.choices(texts, k=30)
    right = [draw.sample(texts[:5], draw.choice([0, 0, 1, 2])) for _ in answers]
    differences = [draw.choice([draw.uniform(-5, 5), draw.randint(-3, 3)]) for _ in answers]
    kept_by = {
        threshold: [a if d <= threshold else "" for a, d in zip(answers, differences, strict=True)]
        for threshold in [min(differences) - 1, *differences]
    }
    scores = {threshold: answer_scores(kept, right)["f1"] for threshold, kept in kept_by.items()}
    percent, threshold = best_threshold(answers, differences, right)
    assert percent == pytest.approx(max(scores.values()))
    assert scores[threshold] == pytest.approx(percent)
    assert all(scores[lower] < percent - 1e-9 for lower in scores if lower < threshold)

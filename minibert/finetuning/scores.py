"""How good predictions are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def class_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """accuracy, and macro_f1, the mean of F1 over the classes that occur; predicted, true: (N,) whole numbers."""
    f1 = [_f1(predicted == label, true == label) for label in np.union1d(predicted, true)]
    return {"accuracy": float((predicted == true).mean()), "macro_f1": float(np.mean(f1))}


def multi_label_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Share of rows that are right in all labels, micro and macro F1; predicted, true: (N, labels) boolean."""
    f1 = [_f1(predicted[:, label], true[:, label]) for label in range(true.shape[1])]
    return {
        "accuracy": float((predicted == true).all(1).mean()),
        "micro_f1": _f1(predicted, true),
        "macro_f1": float(np.mean(f1)),
    }


def number_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Root of the mean squared error, its share of the spread explained (r2), and Pearson's correlation; (N,) each."""
    error, spread = float(((predicted - true) ** 2).mean()), float(true.var())
    varies = spread > 0 and float(predicted.var()) > 0
    return {
        "rmse": error**0.5,
        "r2": 1 - error / spread if spread > 0 else 0.0,
        "pearson": float(np.corrcoef(predicted, true)[0, 1]) if varies else 0.0,
    }


def entity_scores(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over entities, which must be right in type and both ends, and the words' accuracy.

    As the CoNLL shared tasks count (conlleval): an I- that continues nothing begins an entity.
    """
    found = {(i, *entity) for i, labels in enumerate(predicted) for entity in entities(labels)}
    wanted = {(i, *entity) for i, labels in enumerate(true) for entity in entities(labels)}
    right, words = len(found & wanted), sum(map(len, true))
    same = sum(a == b for ours, theirs in zip(predicted, true, strict=True) for a, b in zip(ours, theirs, strict=True))
    return {
        "precision": right / len(found) if found else 0.0,
        "recall": right / len(wanted) if wanted else 0.0,
        "f1": 2 * right / (len(found) + len(wanted)) if found or wanted else 0.0,
        "accuracy": same / max(1, words),
    }


def entities(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """First word, one past the last, and type of each entity in IOB1 or IOB2 labels."""
    spans: list[tuple[int, int, str]] = []
    open_kind = None  # of the entity that the word before belongs to
    for i, label in enumerate(labels):
        kind = label[2:] if label.startswith(("B-", "I-")) else label
        if label == "O":
            open_kind = None
        elif kind == open_kind and not label.startswith("B-"):
            spans[-1] = (spans[-1][0], i + 1, kind)
        else:
            spans.append((i, i + 1, kind))
            open_kind = kind
    return spans


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 0.0

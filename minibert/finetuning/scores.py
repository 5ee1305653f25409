"""How good predictions are."""

from __future__ import annotations

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


def ranking_scores(similarity: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Share of rows whose best column is right (accuracy), and the mean of 1 / rank of the best right one (mrr).

    similarity: (N, M), of each text to each candidate; right: (N, M) boolean, at least one in each row. A wrong
    candidate that is as near as a right one counts as nearer.
    """
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)  # (N, 1)
    ranks = 1 + ((similarity >= best) & ~right).sum(1)  # (N,)
    return {"accuracy": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else 0.0

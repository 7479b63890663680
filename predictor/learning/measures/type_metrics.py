"""Measures of probabilities of behavior types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor.learning.data import Targets
from predictor.learning.measures.metrics import Floats
from predictor.models.history import Ints

TypeScorer = Callable[[Targets, slice], Floats]
"""From the histories of some contexts to probabilities (rows, behavior types)."""

CALIBRATION_BINS = 15
"""Of the calibration error, with about the same number of lines in each."""


def type_metrics(
    probabilities: Floats,
    true: Ints,
    behavior_types: Sequence[str],
    predicted: Ints | None = None,
) -> dict[str, Any]:
    """Measures of type probabilities, one row per line of a target basket.

    Args:
        probabilities: (lines, types), rows sum to 1.
        true: (lines,) the type that came; negative for one that training never saw, which counts
            as wrong in accuracy and recall and is left out of the measures of probability.
        behavior_types: names, in the order of the columns.
        predicted: (lines,) the type that is answered by a decision rule of its own; None: the most
            probable one. Measures of probability do not look at it.

    Returns:
        accuracy; precision, recall, f1 (macro, over types that occur or are predicted) and the
        same per type; roc_auc (macro, one against the rest, over types with both); mse (mean
        over lines of the squared distance to the one-hot truth, summed over types: Brier's
        score); log_loss; ece (expected calibration error of the most probable type, 15 bins of
        equal mass); confusion_matrix (true x predicted).
    """
    if not len(true):
        return {"lines": 0}
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    known = true >= 0
    types = len(behavior_types)
    confusion = np.zeros((types, types), np.int64)
    np.add.at(confusion, (true[known], predicted[known]), 1)
    per_type = _per_type(confusion, predicted, probabilities, true, behavior_types)
    seen = [values for values in per_type.values() if values["support"] or values["predicted"]]
    areas = [values["roc_auc"] for values in per_type.values() if values["roc_auc"] is not None]
    return {
        "accuracy": float((predicted == true).mean()),
        **{
            name: float(np.mean([values[name] for values in seen]))
            for name in ("precision", "recall", "f1")
        },
        "roc_auc": float(np.mean(areas)) if areas else None,
        **_probability_metrics(probabilities[known], true[known]),
        "per_type": per_type,
        "confusion_matrix": confusion.tolist(),
        "lines": len(true),
        "unknown_types": int((~known).sum()),
    }


def _per_type(
    confusion: NDArray[np.int64],
    predicted: Ints,
    probabilities: Floats,
    true: Ints,
    behavior_types: Sequence[str],
) -> dict[str, dict[str, Any]]:
    out = {}
    for code, name in enumerate(behavior_types):
        right, support = int(confusion[code, code]), int((true == code).sum())
        chosen = int((predicted == code).sum())
        precision, recall = right / max(1, chosen), right / max(1, support)
        out[name] = {
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-12),
            "roc_auc": roc_auc(probabilities[:, code], true == code),
            "support": support,
            "predicted": chosen,
        }
    return out


def _probability_metrics(probabilities: Floats, true: Ints) -> dict[str, float]:
    if not len(true):
        return {}
    squares, surprises = losses(probabilities, true)
    gap, bin_ = calibration_gaps(probabilities, true)
    return {
        "mse": float(squares.mean()),
        "log_loss": float(surprises.mean()),
        "ece": float(np.abs(np.bincount(bin_, gap)).sum() / len(true)),
    }


def losses(probabilities: Floats, true: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each line: the squared distance to the one-hot truth, and minus the logarithm of the true
    type's probability.

    Args:
        probabilities: (lines, types).
        true: (lines,) none negative.
    """
    own = probabilities[np.arange(len(true)), true].astype(np.float64)
    # Without making the one-hot truth.
    squares: NDArray[np.float64] = (probabilities.astype(np.float64) ** 2).sum(axis=1) - 2 * own + 1
    # The floor is float32's: a probability below it was a true zero.
    return squares, -np.log(np.maximum(own, 1e-38))


def calibration_gaps(probabilities: Floats, true: Ints) -> tuple[NDArray[np.float64], Ints]:
    """Of each line: whether the most probable type came, less its probability; and its bin, as the
    expected calibration error has them.

    Args:
        probabilities: (lines, types).
        true: (lines,) none negative.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    gap = (probabilities.argmax(axis=1) == true) - confidence
    bins = min(CALIBRATION_BINS, len(true))
    return gap, equal_mass_bins(confidence, bins)


def equal_mass_bins(values: NDArray[np.float64], bins: int) -> Ints:
    """(n,) which of the bins each value falls into: about the same number in each, ascending.

    Equal values stay together, as nothing but chance would tell them apart; so a bin may be empty.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2  # mean rank from 0 of each distinct value
    found: Ints = (middle * bins / len(values)).astype(np.int64)[inverse]
    return found


def roc_auc(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve, ties at their mean rank; None where a class is empty.

    It is the Mann-Whitney statistic: the chance that a positive scores above a negative.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))

"""Measures of item lists and of type probabilities.

Items are ranked over the full catalogue, never against a sample (Krichene and Rendle, 2020), and
ties count against the target: an item's rank is the number of items that score as high or higher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor.learning.data import NONE, Targets
from predictor.models.history import Ints

Floats = NDArray[np.float32]

ItemScorer = Callable[[Targets, slice], Floats]
"""From the histories of some contexts to scores (rows, items): model and baselines alike."""

TypeScorer = Callable[[Targets, slice], Floats]
"""From the histories of some contexts to probabilities (rows, behavior types)."""

K = 10
CALIBRATION_BINS = 15
BATCH = 256
"""Contexts scored at once: bounds memory to BATCH rows of the catalogue."""


def batches(size: int, step: int = BATCH) -> list[slice]:
    """Slices that cover range(size)."""
    return [slice(begin, min(size, begin + step)) for begin in range(0, size, step)]


def item_metrics(
    scorer: ItemScorer, targets: Targets, warm: NDArray[np.bool_], *, exclude_history: bool
) -> dict[str, float]:
    """Measures of the K best items against the distinct items of each target basket.

    Args:
        scorer: gives the scores to rank by.
        targets: baskets without items are passed over.
        warm: (items,) whether an item has events in training.
        exclude_history: whether the items of a user's history are left out of ranking and targets.

    Returns:
        hits_at_10: hits among the best 10 over min(10, basket), mean over baskets, with its
            standard error; recall_at_10: hits over basket; ndcg_at_10 with binary gains;
            coverage_at_10: share of the catalogue in any list; warm_recall_at_10 and
            cold_recall_at_10: share of single target items that were hit, by kind, with their
            numbers; contexts: baskets measured.
    """
    hits, recalls, gains, listed = [], [], [], np.zeros(len(warm), np.bool_)
    counts = np.zeros((2, 2), np.int64)  # (cold, warm) x (missed, hit)
    for rows in batches(len(targets)):
        row, item = _distinct_targets(targets, rows, exclude_history)
        measured = np.unique(row)
        if not len(measured):
            continue
        scores = np.array(scorer(targets, rows), np.float32)
        if exclude_history:
            scores[_history_items(targets, rows)] = -np.inf
        rank = _pessimistic_ranks(scores, row, item)
        hit = rank <= K
        size = np.bincount(row, minlength=len(scores))[measured]
        hit_count = np.bincount(row, hit, minlength=len(scores))[measured]
        gain = np.where(hit, 1 / np.log2(1 + rank), 0.0)
        best = np.cumsum(1 / np.log2(np.arange(2, K + 2)))[np.minimum(size, K) - 1]
        hits.append(hit_count / np.minimum(size, K))
        recalls.append(hit_count / size)
        gains.append(np.bincount(row, gain, minlength=len(scores))[measured] / best)
        listed[_best(scores)[measured].ravel()] = True
        known = item >= 0
        np.add.at(counts, (warm[item[known]].astype(int), hit[known].astype(int)), 1)
        counts[0, 0] += int((~known).sum())  # an item that no catalogue has is a cold miss
    if not hits:
        return {"contexts": 0}
    all_hits = np.concatenate(hits)
    cold, warm_counts = counts
    return {
        "hits_at_10": float(all_hits.mean()),
        "hits_at_10_standard_error": float(all_hits.std() / np.sqrt(len(all_hits))),
        "recall_at_10": float(np.concatenate(recalls).mean()),
        "ndcg_at_10": float(np.concatenate(gains).mean()),
        "coverage_at_10": float(listed.mean()),
        "warm_recall_at_10": float(warm_counts[1] / max(1, warm_counts.sum())),
        "cold_recall_at_10": float(cold[1] / max(1, cold.sum())),
        "warm_targets": int(warm_counts.sum()),
        "cold_targets": int(cold.sum()),
        "contexts": len(all_hits),
    }


def _distinct_targets(targets: Targets, rows: slice, exclude_history: bool) -> tuple[Ints, Ints]:
    """Pairs (row within `rows`, item), each once."""
    begin, end = np.searchsorted(targets.row, [rows.start, rows.stop])
    row, item = targets.row[begin:end] - rows.start, targets.item[begin:end]
    chosen = item != NONE
    pairs = np.unique(np.stack([row[chosen], item[chosen]]), axis=1)
    if exclude_history:
        had = set(zip(*(axis.tolist() for axis in _history_items(targets, rows)), strict=True))
        pairs = pairs[:, [pair not in had for pair in zip(*pairs.tolist(), strict=True)]]
    return pairs[0], pairs[1]


def _history_items(targets: Targets, rows: slice) -> tuple[Ints, Ints]:
    """(row within `rows`, item) of every event of the histories that has an item."""
    whole = len(targets.events)
    lengths = targets.lengths(whole)[rows]
    item = targets.events.item[targets.positions(rows, whole)]
    row = np.repeat(np.arange(len(lengths)), lengths)
    return row[item >= 0], item[item >= 0]


def _pessimistic_ranks(scores: Floats, row: Ints, item: Ints) -> Ints:
    """Rank from 1 of each (row, item); beyond K it may be any number above K."""
    ranks = np.full(len(row), scores.shape[1] + K, np.int64)
    own = np.where(item >= 0, scores[row, np.maximum(item, 0)], -np.inf)
    k = min(K, scores.shape[1])
    threshold = np.partition(scores, -k, axis=1)[:, -k]
    near = np.flatnonzero((own >= threshold[row]) & np.isfinite(own))
    for chosen in (near[part] for part in batches(len(near))):
        ranks[chosen] = (scores[row[chosen]] >= own[chosen, None]).sum(axis=1)
    return ranks


def _best(scores: Floats) -> Ints:
    """(rows, k) the best K items in any order."""
    k = min(K, scores.shape[1])
    best: Ints = np.argpartition(scores, -k, axis=1)[:, -k:]
    return best


def type_metrics(
    probabilities: Floats, true: Ints, behavior_types: Sequence[str]
) -> dict[str, Any]:
    """Measures of type probabilities, one row per line of a target basket.

    Args:
        probabilities: (lines, types), rows sum to 1.
        true: (lines,) the type that came; negative for one that training never saw, which counts
            as wrong in accuracy and recall and is left out of the measures of probability.
        behavior_types: names, in the order of the columns.

    Returns:
        accuracy; precision, recall, f1 (macro, over types that occur or are predicted) and the
        same per type; roc_auc (macro, one against the rest, over types with both); mse (mean
        over lines of the squared distance to the one-hot truth, summed over types: Brier's
        score); log_loss; ece (expected calibration error of the predicted type, 15 bins of
        equal mass); confusion_matrix (true x predicted).
    """
    if not len(true):
        return {"lines": 0}
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
        **_probability_metrics(probabilities[known].astype(np.float64), true[known]),
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


def _probability_metrics(probabilities: NDArray[np.float64], true: Ints) -> dict[str, float]:
    if not len(true):
        return {}
    lines = np.arange(len(true))
    own = probabilities[lines, true]
    one_hot = np.zeros_like(probabilities)
    one_hot[lines, true] = 1
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == true
    by = np.argsort(confidence, kind="stable")
    bins = np.array_split(by, min(CALIBRATION_BINS, len(by)))
    gaps = [len(part) * abs(float((right[part] - confidence[part]).mean())) for part in bins]
    return {
        "mse": float(((probabilities - one_hot) ** 2).sum(axis=1).mean()),
        # The floor is float32's: a probability below it was a true zero.
        "log_loss": float(-np.log(np.maximum(own, 1e-38)).mean()),
        "ece": float(sum(gaps) / len(true)),
    }


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

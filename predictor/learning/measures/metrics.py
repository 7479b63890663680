"""Measures of lists of items.

Items are ranked over the full catalogue, never against a sample (Krichene and Rendle, 2020), and
ties count against the target: an item's rank is the number of items that score as high or higher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from predictor.learning.data import Targets
from predictor.models.history import NONE, UNKNOWN, Ints

Floats = NDArray[np.float32]

ItemScorer = Callable[[Targets, slice], Floats]
"""From the histories of some contexts to scores (rows, items): model and baselines alike."""

K = 10
STRATA = 8
"""Groups by popularity or history length: enough to see a trend, each large enough to measure."""
UNKNOWN_ITEM = -1
"""Stands for every item outside the catalogue in a pair."""
BATCH = 256
"""Contexts scored at once: bounds memory to BATCH rows of the catalogue."""


def batches(size: int, step: int = BATCH) -> list[slice]:
    """Slices that cover range(size)."""
    return [slice(begin, min(size, begin + step)) for begin in range(0, size, step)]


@dataclass(frozen=True)
class ItemHits:
    """What the K best items of each context hit: measures, plots and paired tests read it.

    Contexts without target items are left out; n are measured, m distinct target items with them.
    """

    context: Ints
    """(n,) ascending: which of the targets."""
    user: Ints
    """(n,) see `users`."""
    history_length: Ints
    """(n,) events before the target."""
    size: Ints
    """(n,) distinct target items."""
    hits: Ints
    """(n,) those of them whose rank is at most K."""
    ndcg: NDArray[np.float64]
    """(n,) with binary gains."""
    target_row: Ints
    """(m,) ascending: the row of the arrays above that a target item belongs to."""
    target_item: Ints
    """(m,) the item; UNKNOWN where no catalogue has it."""
    target_hit: NDArray[np.bool_]
    """(m,) whether its rank is at most K."""
    top: Ints
    """(n, K or more) the items that would be returned, best first; NONE where there are fewer."""
    top_score: Floats
    """(as top) their scores; -inf where there are fewer."""
    top_hit: NDArray[np.bool_]
    """(as top) whether they are target items. Among equal scores at the end of the list, one that
    is returned by chance counts here, but not in `hits`."""

    @property
    def share_of_best(self) -> NDArray[np.float64]:
        """(n,) hits over the most that K items can hit."""
        shares: NDArray[np.float64] = self.hits / np.minimum(self.size, K)
        return shares

    @property
    def recall(self) -> NDArray[np.float64]:
        """(n,) hits over target items."""
        shares: NDArray[np.float64] = self.hits / self.size
        return shares

    def metrics(self, warm: NDArray[np.bool_]) -> dict[str, float]:
        """The measures that `item_metrics` names."""
        if not len(self.context):
            return {"contexts": 0}
        known = self.target_item >= 0
        is_warm = known & warm[np.where(known, self.target_item, 0)]
        best = self.top[:, :K]
        listed = np.unique(best[best != NONE])
        share = self.share_of_best
        return {
            "hits_at_10": float(share.mean()),
            "hits_at_10_standard_error": float(share.std() / np.sqrt(len(share))),
            "recall_at_10": float(self.recall.mean()),
            "ndcg_at_10": float(self.ndcg.mean()),
            "coverage_at_10": float(len(listed) / len(warm)),
            "warm_recall_at_10": _mean(self.target_hit[is_warm]),
            "cold_recall_at_10": _mean(self.target_hit[~is_warm]),
            "warm_targets": int(is_warm.sum()),
            "cold_targets": int((~is_warm).sum()),
            "contexts": len(share),
        }


def _mean(hit: NDArray[np.bool_]) -> float:
    return float(hit.mean()) if len(hit) else 0.0


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
            cold_recall_at_10: share of single target items that were hit, by kind (an item that
            no catalogue has is a cold miss), with their numbers; contexts: baskets measured.
    """
    return item_hits(scorer, targets, exclude_history=exclude_history).metrics(warm)


def item_hits(
    scorer: ItemScorer, targets: Targets, *, exclude_history: bool, returned: int = K
) -> ItemHits:
    """Ranks the catalogue for every context; see item_metrics.

    Args:
        returned: length of `top`, at least K.
    """
    parts = [
        _batch_hits(scorer, targets, rows, returned, exclude_history=exclude_history)
        for rows in batches(len(targets))
    ]
    before = np.cumsum([0] + [len(part.context) for part in parts])
    for part, rows in zip(parts, before, strict=False):
        part.target_row[:] += rows
    names = [field.name for field in fields(ItemHits)]
    return ItemHits(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def _batch_hits(
    scorer: ItemScorer, targets: Targets, rows: slice, returned: int, *, exclude_history: bool
) -> ItemHits:
    scores = np.array(scorer(targets, rows), np.float32)
    had = history_items(targets, rows)
    pairs = _distinct_targets(targets, rows, scores.shape[1])
    if exclude_history:
        scores[had] = -np.inf
        pairs = pairs[~np.isin(pairs, _pair(*had, scores.shape[1]))]
    measured, row = np.unique(pairs // (scores.shape[1] + 1), return_inverse=True)
    item = pairs % (scores.shape[1] + 1) - 1
    item[item < 0] = UNKNOWN
    top, top_score = best_items(scores[measured], returned)
    rank = _pessimistic_ranks(scores[measured], top_score[:, K - 1], row, item)
    hit = rank <= K
    size = np.bincount(row, minlength=len(measured))
    gain = np.bincount(row, np.where(hit, 1 / np.log2(1 + rank), 0.0), minlength=len(measured))
    ideal = np.cumsum(1 / np.log2(np.arange(2, K + 2)))[np.minimum(size, K) - 1]
    top_pairs = _pair(np.repeat(measured, returned), top.ravel(), scores.shape[1])
    return ItemHits(
        context=measured + rows.start,
        user=users(targets, rows)[measured],
        history_length=(targets.end - targets.begin)[rows][measured],
        size=size,
        hits=np.bincount(row, hit, minlength=len(measured)).astype(np.int64),
        ndcg=gain / ideal,
        target_row=row,
        target_item=item,
        target_hit=hit,
        top=top,
        top_score=top_score,
        top_hit=np.isin(top_pairs, pairs).reshape(top.shape) & (top != NONE),
    )


def _pair(row: Ints, item: Ints, items: int) -> Ints:
    """One number for a row and an item, which may be UNKNOWN."""
    pairs: Ints = row * (items + 1) + np.where(item >= 0, item, UNKNOWN_ITEM) + 1
    return pairs


def _distinct_targets(targets: Targets, rows: slice, items: int) -> Ints:
    """Pairs (row within `rows`, item), each once, ascending."""
    begin, end = np.searchsorted(targets.row, [rows.start, rows.stop])
    row, item = targets.row[begin:end] - rows.start, targets.item[begin:end]
    chosen = item != NONE
    return np.unique(_pair(row[chosen], item[chosen], items))


def users(targets: Targets, rows: slice = slice(None)) -> Ints:
    """(rows,) the user in targets.events; a number of its own where there is no history."""
    begin = targets.begin[rows]
    some = targets.end[rows] > begin
    user = targets.events.user[np.where(some, begin, 0)]
    found: Ints = np.where(some, user, -1 - np.arange(len(targets))[rows])
    return found


def history_items(targets: Targets, rows: slice) -> tuple[Ints, Ints]:
    """(row within `rows`, item) of every event of the histories that has an item."""
    whole = len(targets.events)
    lengths = targets.lengths(whole)[rows]
    item = targets.events.item[targets.positions(rows, whole)]
    row = np.repeat(np.arange(len(lengths)), lengths)
    return row[item >= 0], item[item >= 0]


def best_items(scores: Floats, k: int) -> tuple[Ints, Floats]:
    """The k best items of each row (rows, k), best first, and their scores.

    Where a row has fewer with a finite score: NONE and -inf.
    """
    kept = min(k, scores.shape[1])
    # From the front: where most scores are equal and low, the other end takes 20 times as long.
    most = max(kept - 1, 0)
    some = np.argpartition(-scores, most, axis=1)[:, :kept] if kept else np.zeros((len(scores), 0))
    some = some.astype(np.int64)
    values = np.take_along_axis(scores, some, axis=1)
    by = np.argsort(-values, axis=1, kind="stable")
    items, best = np.full((len(scores), k), NONE), np.full((len(scores), k), -np.inf, np.float32)
    best[:, :kept] = np.take_along_axis(values, by, axis=1)
    items[:, :kept] = np.take_along_axis(some, by, axis=1)
    items[~np.isfinite(best)] = NONE
    best[~np.isfinite(best)] = -np.inf
    return items, best


def _pessimistic_ranks(scores: Floats, threshold: Floats, row: Ints, item: Ints) -> Ints:
    """Rank from 1 of each (row, item); below the threshold (rows,) it may be any above K."""
    ranks = np.full(len(row), scores.shape[1] + K, np.int64)
    own = np.where(item >= 0, scores[row, np.maximum(item, 0)], -np.inf)
    near = np.flatnonzero((own >= threshold[row]) & np.isfinite(own))
    for chosen in (near[part] for part in batches(len(near))):
        ranks[chosen] = (scores[row[chosen]] >= own[chosen, None]).sum(axis=1)
    return ranks


def ranked_candidates(row: Ints, item: Ints, score: Floats, items: int) -> ItemScorer:
    """A scorer from scored candidates: everything else is below them all and never hit.

    Args:
        row: (candidates,) ascending: the context.
        item: (candidates,) each once a context.
        score: (candidates,).
        items: size of the catalogue.
    """

    def dense(targets: Targets, rows: slice) -> Floats:
        scores = np.full((rows.stop - rows.start, items), -np.inf, np.float32)
        begin, end = np.searchsorted(row, [rows.start, rows.stop])
        scores[row[begin:end] - rows.start, item[begin:end]] = score[begin:end]
        return scores

    return dense


def calibration_ratio(probabilities: Floats, hits: ItemHits) -> float | None:
    """Predicted over observed hits among the K best items; None without a hit.

    Args:
        probabilities: (n, K or more) that each of hits.top is a target; anything where it is NONE.
    """
    observed = int(hits.top_hit[:, :K].sum())
    predicted = float(probabilities[:, :K][hits.top[:, :K] != NONE].sum(dtype=np.float64))
    return predicted / observed if observed else None


@dataclass(frozen=True)
class Stratum:
    """A group of target items or contexts with what was found of it."""

    low: int
    """Least value in it."""
    high: int
    """Largest value in it."""
    recall: float
    standard_error: float
    count: int


def recall_by_popularity(hits: ItemHits, popularity: Ints) -> list[Stratum]:
    """Share of target items that were hit, by the events (items,) that they have in training."""
    known = hits.target_item >= 0
    events = np.where(known, popularity[np.where(known, hits.target_item, 0)], 0)
    return _strata(events, hits.target_hit.astype(np.float64))


def recall_by_history(hits: ItemHits) -> list[Stratum]:
    """Mean over contexts of hits over min(K, target items), by events of history."""
    return _strata(hits.history_length, hits.share_of_best)


def _strata(values: Ints, found: NDArray[np.float64]) -> list[Stratum]:
    """Zero by itself, then up to STRATA groups of about the same size; equal values together."""
    if not len(values):
        return []
    some = np.sort(values[values > 0])
    cuts = some[(len(some) * np.arange(STRATA)) // STRATA] if len(some) else some
    group = np.searchsorted(np.unique(cuts), values, side="right")
    out = []
    for code in np.unique(group):
        inside, own = values[group == code], found[group == code]
        error = float(own.std() / np.sqrt(len(own)))
        out.append(
            Stratum(int(inside.min()), int(inside.max()), float(own.mean()), error, len(own))
        )
    return out

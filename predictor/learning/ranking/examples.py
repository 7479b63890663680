"""Examples for the ranker: candidates of contexts, their features, and which of them are hits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Targets
from predictor.learning.measures.metrics import BATCH, K, batches
from predictor.models.history import Histories, Ints
from predictor.models.ranking.candidates import Recipe, candidates
from predictor.models.ranking.features import FeatureGroups, features
from predictor.models.ranking.pairs import ITEMS, Pairs
from predictor.models.ranking.tables import Tables

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ModelOutputs:
    """What a sequence model says about some contexts; it must not have learned from them."""

    queries: Vectors
    """(contexts, dims)."""
    items: Vectors
    """(items, dims) item vectors in the model's space."""

    def subset(self, chosen: NDArray[np.bool_]) -> ModelOutputs:
        """Some of the contexts."""
        return ModelOutputs(self.queries[chosen], self.items)


@dataclass(frozen=True)
class Examples:
    """Candidates of some contexts."""

    pairs: Pairs
    """Their rows are contexts."""
    table: Floats
    """(pairs, features)."""
    label: NDArray[np.bool_]
    """(pairs,) whether the item is a target."""
    model: Floats
    """(pairs,) model scores; NaN without a model."""
    targets: Ints
    """(contexts,) distinct items to be hit; contexts without any do not count."""

    def subset(self, chosen: NDArray[np.bool_]) -> Examples:
        """Some of the pairs; contexts keep their numbers."""
        return replace(
            self,
            pairs=self.pairs.chosen(chosen),
            table=self.table[chosen],
            label=self.label[chosen],
            model=self.model[chosen],
        )

    def sample(self, negatives: int, seed: int) -> Examples:
        """Only contexts with a hit among the candidates, and of each at most as many that are none.

        Which ones is drawn by the seed.
        """
        draw = np.random.default_rng(seed).random(len(self.pairs)) + self.label
        hits = np.bincount(self.pairs.row, self.label, len(self.targets))[self.pairs.row]
        return self.subset((self.pairs.rank(draw) < hits + negatives) & (hits > 0))


def examples(
    tables: Tables,
    recipe: Recipe,
    groups: FeatureGroups,
    targets: Targets,
    model: ModelOutputs | None,
    *,
    negatives: int | None = None,
    seed: int = 0,
) -> Examples:
    """The candidates of every context with their features.

    Args:
        negatives: keep only contexts with a hit among the candidates and, of each, as many
            candidates that are no hit, drawn by the seed; None: keep all.
    """
    parts = []
    for at, rows in enumerate(batches(len(targets))):
        part = _batch(tables, recipe, groups, targets, rows, model)
        parts.append(part if negatives is None else part.sample(negatives, seed + at))
    return Examples(
        Pairs(
            np.concatenate([part.pairs.row + at * BATCH for at, part in enumerate(parts)]),
            np.concatenate([part.pairs.item for part in parts]),
        ),
        np.concatenate([part.table for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.model for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )


def _batch(
    tables: Tables,
    recipe: Recipe,
    groups: FeatureGroups,
    targets: Targets,
    rows: slice,
    model: ModelOutputs | None,
) -> Examples:
    histories = targets.histories(rows)
    wanted = wanted_pairs(targets, rows, histories, repeats=groups.repeats)
    found = searched(model, recipe.searched, rows, histories, repeats=groups.repeats)
    pairs = candidates(tables, recipe, histories, found, repeats=groups.repeats)
    scores = np.full(len(pairs), np.nan, np.float32)
    if model is not None:
        query = model.queries[rows][pairs.row]
        scores = np.einsum("nd,nd->n", query, model.items[pairs.item])
    table = features(tables, histories, pairs, scores, lambda item: _vectors(model, item), groups)
    count = np.bincount(wanted.row, minlength=len(histories))
    return Examples(pairs, table, pairs.within(wanted), scores, count)


def _vectors(model: ModelOutputs | None, item: Ints) -> Vectors:
    return np.zeros((len(item), 1), np.float32) if model is None else model.items[item]


def wanted_pairs(targets: Targets, rows: slice, histories: Histories, *, repeats: bool) -> Pairs:
    """Distinct targets; without repeats, those that the history lacks.

    A target outside the catalogue is the item ITEMS - 2, which no candidate is.
    """
    begin, end = np.searchsorted(targets.row, [rows.start, rows.stop])
    row, item = targets.row[begin:end] - rows.start, targets.item[begin:end]
    pairs = Pairs.of(row, np.where(item == -2, ITEMS - 2, item))
    return pairs if repeats else pairs - Pairs.of(histories.row, histories.item)


def searched(
    model: ModelOutputs | None, count: int, rows: slice, histories: Histories, *, repeats: bool
) -> Pairs:
    """The best items of the model's space: what Search gives."""
    nothing = np.zeros(0, np.int64)
    if model is None or not count:
        return Pairs(nothing, nothing)
    scores = model.queries[rows] @ model.items.T
    if not repeats:
        some = histories.item >= 0
        scores[histories.row[some], histories.item[some]] = -np.inf
    count = min(count, scores.shape[1])
    best = np.argpartition(scores, -count, axis=1)[:, -count:]
    row = np.repeat(np.arange(len(best)), count)
    finite = np.isfinite(scores[row, best.ravel()])
    return Pairs.of(row[finite], best.ravel()[finite])


def measure(found: Examples, scores: Floats) -> dict[str, float]:
    """hits@K over min(K, basket) and NDCG@K, as `metrics.item_metrics` defines them.

    Args:
        found: all candidates of its contexts.
        scores: (pairs,).
    """
    share, ndcg = per_context(found, scores)
    some = found.targets > 0
    return {
        "hits_at_10": float(share[some].mean()),
        "ndcg_at_10": float(ndcg[some].mean()),
        "contexts": int(some.sum()),
    }


def per_context(found: Examples, scores: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(contexts,) hits over the most possible, and NDCG. Ties count against the target."""
    contexts = len(found.targets)
    pairs = found.pairs
    values = np.nan_to_num(scores, nan=-np.inf)
    by = np.lexsort((-values, pairs.row))
    # Equal scores share the place of the last of them.
    value, row = values[by], pairs.row
    last = np.ones(len(by), np.bool_)
    last[:-1] = (row[1:] != row[:-1]) | (value[1:] != value[:-1])
    ends = np.flatnonzero(last)
    rank = ends[np.searchsorted(ends, np.arange(len(by)))] - pairs.first_of_row
    hit = found.label[by] & (rank < K)
    hits = np.bincount(row, hit, contexts)
    gain = np.bincount(row, np.where(hit, 1 / np.log2(rank + 2.0), 0.0), contexts)
    ideal = np.cumsum(1 / np.log2(np.arange(2, K + 2)))
    most = np.clip(found.targets, 1, K)
    return hits / most, gain / ideal[most - 1]

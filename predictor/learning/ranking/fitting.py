"""Fits the ranker: boosted trees over the candidates of contexts, strictly before their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightgbm
import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Events, Targets
from predictor.learning.ranking.examples import (
    Examples,
    Floats,
    ModelOutputs,
    examples,
    measure,
)
from predictor.learning.ranking.tables import TextTable, fit_tables, fit_texts
from predictor.learning.splits import SplitKind, first_baskets_from
from predictor.models.history import Ints
from predictor.models.ranking.candidates import Recipe
from predictor.models.ranking.features import FeatureGroups, feature_names
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.ranker import NewItems, Ranker, columns_of_new

CUTS = 6
"""Earlier dates to learn from, where there are times and repeats."""
CUT_SHARE = 1 / 12
"""Of the time that training covers: between two such dates. A year of groceries: four weeks."""
FOLDS = 2
MOST_CANDIDATES = 4_500_000
"""Candidates of the contexts of a part, at most: 2 GB of features."""
OWN = 200
"""Own items that are candidates where some are bought again."""
LEAST_CONTEXTS = 200
"""Contexts with a hit among the candidates; with fewer there is nothing to learn an order from."""
LEAST_VARIANCE = 1e-9
"""Added to that of what is read of new items: what is the same for all has no weight."""
SEARCHED = Recipe(searched=120, own=0, popular=10, related=60)
"""Where items hardly repeat: most candidates are the model's."""
REPEATED = Recipe(searched=0, own=400, popular=150, related=100)
"""Where they do: most are the user's own."""


@dataclass(frozen=True)
class FitOptions:
    """How the trees are fitted."""

    rounds: int
    learning_rate: float
    leaves: int
    min_leaf: int
    """Candidates in a leaf, at least."""
    negatives: int
    """Candidates of a context that are no hit, at most."""
    features: float
    """Share of the features that a tree may read."""
    bagging: float
    """Share of the candidates that a tree learns from."""


ONCE = FitOptions(
    rounds=200,
    learning_rate=0.05,
    leaves=12,
    min_leaf=300,
    negatives=100,
    features=0.5,
    bagging=1.0,
)
"""Where items hardly repeat. Chosen on the validation part of Amazon Beauty."""
AGAIN = FitOptions(
    rounds=220,
    learning_rate=0.05,
    leaves=15,
    min_leaf=200,
    negatives=60,
    features=0.2,
    bagging=0.5,
)
"""Where they do. Chosen on the validation part of a year of grocery baskets."""


@dataclass(frozen=True)
class FittedRanker:
    """A ranker and what it is worth."""

    ranker: Ranker
    validation: dict[str, float]
    """hits_at_10, ndcg_at_10, contexts on contexts that the measured trees did not learn from."""
    search: dict[str, float] | None
    """The same of the model's order alone; None where the trees did not read a model."""
    targets: Targets
    """The contexts that were measured."""
    pairs: Pairs
    """Their candidates: (context, item)."""
    scores: Floats
    """(pairs,) by trees that did not learn from the context."""


def fit_ranker(
    train: Events,
    validation: Targets,
    text_vectors: Vectors,
    *,
    kind: SplitKind,
    horizon: int,
    repeats: bool,
    seed: int,
    model: ModelOutputs | None = None,
    popularity: bool = True,
) -> FittedRanker | None:
    """Fits a ranker and measures it where it has not learned.

    With times and repeats it learns from the users' next baskets after several earlier dates, each
    with the statistics of that date, is measured on the validation part, and then learns from that
    too; its tables are then of all events before the test part. Personal features carry such
    data, and a model that has learned from those baskets would look better than it is: it is not
    read. Else it learns from the validation part alone, which the model has not seen, and is
    measured by cross-fitting over contexts.

    Args:
        train: the training part.
        validation: the validation part.
        text_vectors: (items, cols) of the items' texts; zero where an item has none.
        kind: of the split.
        horizon: of the split, in microseconds.
        repeats: whether items of the history may be answered.
        model: its outputs for the validation part.
        popularity: whether to read how popular an item is.

    Returns:
        None where there is too little to learn from.
    """
    if not train.has_items or not (validation.item >= 0).any():
        return None
    groups = FeatureGroups(
        has_times=train.has_times, repeats=repeats, popularity=popularity, model=model is not None
    )
    texts = fit_texts(text_vectors, seed)
    if repeats and kind == "time":
        return _from_dates(train, validation, texts, replace(groups, model=False), horizon, seed)
    return _from_validation(train, validation, texts, groups, model, kind, seed)


def _from_dates(
    train: Events,
    validation: Targets,
    texts: TextTable,
    groups: FeatureGroups,
    horizon: int,
    seed: int,
) -> FittedRanker | None:
    """Learns from several dates before the validation part."""
    options, recipe = AGAIN, REPEATED
    begin, end = int(train.timestamp.min()), _end(train)
    parts: list[Examples] = []
    for number in range(1, CUTS + 1):
        cut = end - int(number * (end - begin) * CUT_SHARE)
        targets = _some(first_baskets_from(train, cut, horizon), recipe, seed + number)
        tables = fit_tables(train.subset(train.timestamp < cut), texts, cut)
        found = examples(
            tables, recipe, groups, targets, None, negatives=options.negatives, seed=seed + number
        )
        parts.append(found)
    if sum(len(_sizes(part.pairs)) for part in parts) < LEAST_CONTEXTS:
        return None
    trees = fit_trees(parts, groups, options, seed)
    tables = fit_tables(train, texts, end)
    judged = _some(validation, recipe, seed)
    held = examples(tables, recipe, groups, judged, None)
    scores, pairs = predict(trees, held), held.pairs
    figures = measure(held, scores)
    parts.append(held.sample(options.negatives, seed))
    del held
    trees = fit_trees(parts, groups, options, seed)
    known = validation.events
    tables = fit_tables(known, texts, _end(known))
    ranker = Ranker(tables, recipe, groups, trees.model_to_string())
    return FittedRanker(ranker, figures, None, judged, pairs, scores)


def _from_validation(
    train: Events,
    validation: Targets,
    texts: TextTable,
    groups: FeatureGroups,
    model: ModelOutputs | None,
    kind: SplitKind,
    seed: int,
) -> FittedRanker | None:
    """Learns from the validation part, by cross-fitting where it is measured."""
    options, recipe = ONCE, replace(SEARCHED, own=OWN if groups.repeats else 0)
    known = train
    if kind == "leave-one-out":
        # In the test part the last basket of a history is one that the tables do not know (it was
        # the validation's target). So it must be here, or the ranker learns to trust its
        # neighbours too much.
        known = train.subset(~_last_baskets(train))
    tables = fit_tables(known, texts, _end(known))
    targets, chosen = some_contexts(validation, recipe, seed)
    if model is not None:
        model = model.subset(chosen)
    held = examples(tables, recipe, groups, targets, model)
    fold = np.random.default_rng(seed).integers(0, FOLDS, len(targets))
    held_fold = fold[held.pairs.row]
    shown = held.sample(options.negatives, seed)
    if len(_sizes(shown.pairs)) < LEAST_CONTEXTS:
        return None
    scores = np.zeros(len(held.pairs), np.float32)
    for number in range(FOLDS):
        trees = fit_trees([shown.subset(fold[shown.pairs.row] != number)], groups, options, seed)
        scores[held_fold == number] = predict(trees, held.subset(held_fold == number))
    new_items = NewItems(0.0, 0.0)
    if model is not None:
        read, new = held.table[:, columns_of_new(groups)], tables.new(held.pairs.item)
        new_items = fit_new_items(held.pairs, scores, read, ~new)
        scores = new_items.place(held.pairs, scores, read, new)
    figures = measure(held, scores)
    search = None if model is None else measure(held, held.model)
    trees = fit_trees([shown], groups, options, seed)
    known = validation.events if kind in ("time", "every") else train
    tables = fit_tables(known, texts, _end(known))
    ranker = Ranker(tables, recipe, groups, trees.model_to_string(), new_items)
    return FittedRanker(ranker, figures, search, targets, held.pairs, scores)


def fit_new_items(pairs: Pairs, scores: Floats, read: Floats, old: NDArray[np.bool_]) -> NewItems:
    """Least squares of the trees' scores, all numbers less their means over the history.

    Args:
        pairs: candidates.
        scores: (pairs,) by trees that did not learn from the context.
        read: (pairs, READ_OF_NEW).
        old: (pairs,) the candidates that somebody had.
    """
    pairs, values = pairs.chosen(old), np.column_stack([read, scores])[old].astype(np.float64)
    count = pairs.per_row(np.ones(len(pairs)), np.add)
    for col in values.T:
        col -= pairs.per_row(col, np.add) / count
    products = values.T @ values + LEAST_VARIANCE * (1 + len(pairs)) * np.eye(values.shape[1])
    weights = np.linalg.solve(products[:-1, :-1], products[:-1, -1])
    return NewItems(*weights.tolist())


def _end(events: Events) -> int:
    return int(events.timestamp.max(initial=-1)) + 1


def _last_baskets(events: Events) -> NDArray[np.bool_]:
    """(events,) whether an event is of its user's last basket."""
    some = np.diff(events.first_of_user) > 0
    last = np.zeros(len(events.user_ids), np.int64)
    last[some] = events.basket[events.first_of_user[1:][some] - 1]
    masked: NDArray[np.bool_] = events.basket == last[events.user]
    return masked


def _some(targets: Targets, recipe: Recipe, seed: int) -> Targets:
    return some_contexts(targets, recipe, seed)[0]


def some_contexts(targets: Targets, recipe: Recipe, seed: int) -> tuple[Targets, NDArray[np.bool_]]:
    """The contexts, or as many of them, drawn by the seed, as MOST_CANDIDATES allows."""
    most = MOST_CANDIDATES // sum(vars(recipe).values())
    chosen = np.ones(len(targets), np.bool_)
    if len(targets) > most:
        chosen[:] = False
        chosen[np.random.default_rng(seed).permutation(len(targets))[:most]] = True
    return targets.subset(chosen), chosen


def fit_trees(
    parts: Sequence[Examples], groups: FeatureGroups, options: FitOptions, seed: int
) -> lightgbm.Booster:
    """Boosted trees over the contexts of all parts; the same for the same seed."""
    data = lightgbm.Dataset(
        np.concatenate([part.table for part in parts]),
        np.concatenate([part.label for part in parts]).astype(np.int32),
        group=np.concatenate([_sizes(part.pairs) for part in parts]),
        feature_name=list(feature_names(groups)),
        params={"max_bin": 63, "verbose": -1, "num_threads": 1},
    )
    parameters = {
        "objective": "lambdarank",
        "learning_rate": options.learning_rate,
        "num_leaves": options.leaves,
        "min_data_in_leaf": options.min_leaf,
        "feature_fraction": options.features,
        "bagging_fraction": options.bagging,
        "bagging_freq": 1,
        "lambdarank_truncation_level": 30,
        "max_bin": 63,
        "num_threads": 1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }
    return lightgbm.train(parameters, data, options.rounds)


def predict(trees: lightgbm.Booster, found: Examples) -> Floats:
    """(pairs,) scores."""
    return np.asarray(trees.predict(found.table, raw_score=True, num_threads=1), np.float32)


def _sizes(pairs: Pairs) -> Ints:
    begin = np.unique(pairs.first_of_row)
    return np.diff(np.append(begin, len(pairs)))

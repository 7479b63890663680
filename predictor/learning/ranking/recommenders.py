"""Fits the classic recommenders, and what each is worth in a blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from implicit.als import AlternatingLeastSquares
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits

from predictor.learning.data import Events
from predictor.learning.measures.answers import Answers
from predictor.learning.measures.baselines import histories_of
from predictor.learning.measures.metrics import batches, item_metrics
from predictor.learning.ranking.examples import wanted_pairs
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.recommender import RECOMMENDERS, Factors, Recommender

Doubles = NDArray[np.float64]

NEIGHBOURS = (30, 100, 300)
"""In user_knn; validation chooses."""

FACTORS = 128
REGULARISATION = 0.05
ITERATIONS = 15

ALPHAS = (1.0, 10.0, 40.0)
"""Of which validation chooses one: how much more an event counts than none (Hu et al. take 40)."""

SHRINKAGE = 1e-3
"""Of the weights of a blend, against methods that say the same."""

LEAST_WEIGHT = 0.01
"""Of the largest: a method that counts less is left out."""


@dataclass(frozen=True)
class FittedRecommender:
    """A recommender and what validation says of it."""

    recommender: Recommender
    validation: dict[str, float]
    """Its item_metrics. A blend's few weights were learned from these targets."""
    search: dict[str, float]
    """The same of the order of Search."""
    alone: dict[str, dict[str, float]]
    """The same of each of a blend's methods alone."""


def fit_recommender(name: str, train: Events, answers: Answers, seed: int) -> FittedRecommender:
    """Fits on the training part; what there is to choose, the validation targets choose.

    Args:
        name: one of RECOMMENDERS.
        train: the training part.
        answers: the version's, without a second stage, for the validation targets.
        seed: of the factorisation's start.
    """
    methods = RECOMMENDERS[name]
    had = histories_of(train)
    repeats = not answers.exclude_history
    whole = Recommender(dict.fromkeys(methods, 1.0), had, None, repeats)
    alone = {}
    for method in methods:
        one = replace(whole, weights={method: 1.0})
        tried = [one]
        if method == "matrix_factorisation":
            tried = [replace(one, factors=factorise(had, alpha, seed)) for alpha in ALPHAS]
        elif method == "user_knn":
            tried = [replace(one, neighbours=count) for count in NEIGHBOURS]
        best, alone[method] = _best(tried, answers)
        whole = replace(best, weights=whole.weights)
    search = _measured(None, answers)
    if len(methods) == 1:
        return FittedRecommender(whole, alone[methods[0]], search, {})
    whole = replace(whole, weights=blend(whole, answers))
    if "matrix_factorisation" not in whole.weights:
        whole = replace(whole, factors=None)
    return FittedRecommender(whole, _measured(whole, answers), search, alone)


def factorise(had: sparse.csr_matrix, alpha: float, seed: int) -> Factors:
    """Weighted alternating least squares, by the library `implicit`."""
    with threadpool_limits(1, "blas"):  # its products are small: threads would wait for one another
        model = AlternatingLeastSquares(
            FACTORS, regularization=REGULARISATION, alpha=alpha, iterations=ITERATIONS,
            random_state=seed, num_threads=1, use_gpu=False,
        )  # fmt: skip
        model.fit(had, show_progress=False)
    return Factors(np.ascontiguousarray(model.item_factors), alpha, REGULARISATION)


def _best(tried: Sequence[Recommender], answers: Answers) -> tuple[Recommender, dict[str, float]]:
    """The one with the largest NDCG, of equal ones the first, and its item_metrics."""
    measured = [_measured(one, answers) for one in tried]
    at = int(np.argmax([metrics["ndcg_at_10"] for metrics in measured]))
    return tried[at], measured[at]


def _measured(recommender: Recommender | None, answers: Answers) -> dict[str, float]:
    answers = replace(answers, version=replace(answers.version, ranker=recommender))
    return item_metrics(
        answers.item_scorer, answers.targets, np.ones(len(answers.numbers), np.bool_),
        exclude_history=answers.exclude_history,
    )  # fmt: skip


def blend(recommender: Recommender, answers: Answers) -> dict[str, float]:
    """Weights of the methods, none negative, under which what users did next is most likely.

    A conditional logit (McFadden, 1974) over the candidates of each history: the probability of an
    item is the softmax of the weighted scores.

    Args:
        recommender: its candidates, with its weights.
        answers: of the targets to learn from.
    """
    methods = tuple(recommender.weights)
    if not len(answers.targets):
        return dict(recommender.weights)
    row, table, hit = _candidates(recommender, answers)
    if not len(row):
        return dict(recommender.weights)
    begin = np.flatnonzero(np.diff(row, prepend=-1))
    hits = np.add.reduceat(hit, begin)
    group = np.repeat(np.arange(len(begin)), np.diff(np.append(begin, len(row))))
    share = hit / hits[group]
    wanted = share @ table

    def loss(weights: Doubles) -> tuple[float, Doubles]:
        scores = table @ weights
        scores -= np.maximum.reduceat(scores, begin)[group]
        odds = np.exp(scores)
        total = np.add.reduceat(odds, begin)
        value = np.log(total).sum() - share @ scores
        gradient = (odds / total[group]) @ table - wanted
        penalty = SHRINKAGE * len(begin) * weights
        return float(value + penalty @ weights / 2), gradient + penalty

    start = np.ones(len(methods))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(methods)).x
    if not found.max() > 0:  # nothing tells targets from others
        return dict(recommender.weights)
    return {
        method: float(weight)
        for method, weight in zip(methods, found, strict=True)
        if weight >= LEAST_WEIGHT * found.max()
    }


def _candidates(
    recommender: Recommender, answers: Answers
) -> tuple[NDArray[np.int64], Doubles, Doubles]:
    """Of contexts with a target among the candidates: context (n,), each method's scores
    (n, methods), and whether the candidate is a target (n,)."""
    alone = [replace(recommender, weights={method: 1.0}) for method in recommender.weights]
    rows, tables, labels = [], [], []
    for batch in batches(len(answers.targets)):
        histories, pairs, model_scores = answers.candidates(recommender, batch)
        wanted = wanted_pairs(answers.numbered, batch, histories, repeats=recommender.repeats)
        hit = pairs.within(wanted)
        some = np.isin(pairs.row, pairs.row[hit])
        pairs = Pairs(pairs.row[some], pairs.item[some])
        columns = [
            one.score(histories, pairs, model_scores[some], answers.vectors) for one in alone
        ]
        rows.append(pairs.row + batch.start)
        tables.append(np.stack(columns, axis=1).astype(np.float64))
        labels.append(hit[some].astype(np.float64))
    return np.concatenate(rows), np.concatenate(tables), np.concatenate(labels)

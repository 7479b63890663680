"""Fits the classic recommenders, and what each is worth in a blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from implicit.als import AlternatingLeastSquares
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits

from predictor.learning.data import Events
from predictor.learning.measures.answers import Answers
from predictor.learning.measures.baselines import histories_of
from predictor.learning.measures.metrics import K, batches, item_metrics
from predictor.learning.ranking.examples import wanted_pairs
from predictor.models.ranking.recommender import RECOMMENDERS, Factors, Recommender

Doubles = NDArray[np.float64]

NEIGHBOURS = (30, 100, 300)
"""In user_knn; validation chooses."""

FACTORS = 128
REGULARISATION = 0.05
ITERATIONS = 15

ALPHAS = (1.0, 10.0, 40.0)
"""Of which validation chooses one: how much more an event counts than none (Hu et al. take 40)."""

CONTEXTS = 5_000
"""Of the validation part at most, drawn at random: to choose so little, some of many will do."""

STEPS = (0.0, 0.25, 0.5, 0.7, 1.4, 2.0, 4.0)
"""By which a weight is tried to be multiplied; one of zero, as a share of the largest."""

LEAST_GAIN = 5e-4
"""NDCG that a blend gives up to read fewer methods."""

LEAST_WEIGHT = 1e-3
"""Of the largest; a smaller one is none."""


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
        seed: of the factorisation's start, and of the contexts that are drawn.
    """
    drawn = np.random.default_rng(seed).permutation(len(answers.targets)) < CONTEXTS
    answers = answers if drawn.all() else answers.subset(drawn)
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
    """Weights of the methods, the largest 1, with the largest NDCG@10.

    Coordinate ascent (Metzler and Croft, 2007, "Linear feature-based models for information
    retrieval") from equal weights, and from the method that is best alone. Methods that are hardly
    worth anything beside the others are left out.

    Args:
        recommender: its candidates, with its weights.
        answers: of the targets to learn from.
    """
    lists = _Lists.of(recommender, answers)
    methods = tuple(recommender.weights)
    alone = np.eye(len(methods))
    if not max(map(lists.ndcg, alone)) > 0:  # nothing tells targets from others
        return dict(recommender.weights)
    starts = np.ones(len(methods)), max(alone, key=lists.ndcg)
    found = max((_ascend(lists, start) for start in starts), key=lists.ndcg)
    least = lists.ndcg(found) - LEAST_GAIN
    for at in np.argsort(found, kind="stable")[:-1]:
        without = np.where(np.arange(len(found)) == at, 0.0, found)
        if lists.ndcg(without) > least:
            found = without
    return {
        method: float(weight)
        for method, weight in zip(methods, found / found.max(), strict=True)
        if weight > 0
    }


def _ascend(lists: _Lists, weights: Doubles) -> Doubles:
    """Changes one weight after the other for the better, until none can be."""
    best, before = lists.ndcg(weights), -1.0
    while best > before:
        before = best
        for at in range(len(weights)):
            unit = weights[at] or weights.max()
            for step in STEPS:
                tried = weights.copy()
                tried[at] = unit * step
                tried[tried < LEAST_WEIGHT * tried.max()] = 0.0
                value = lists.ndcg(tried)
                if value > best and tried.any():
                    best, weights = value, tried
    return weights


@dataclass(frozen=True)
class _Lists:
    """Candidates of some contexts with a target among them, padded to the longest list."""

    scores: NDArray[np.float32]
    """(contexts, most, methods) of each method."""
    padding: NDArray[np.bool_]
    """(contexts, most)."""
    hit: NDArray[np.bool_]
    """(contexts, most) whether the candidate is a target."""
    ideal: Doubles
    """(contexts,) the discounted gain of a perfect list."""

    @classmethod
    def of(cls, recommender: Recommender, answers: Answers) -> _Lists:
        """The lists that the recommender orders for the targets of the answers."""
        alone = [replace(recommender, weights={method: 1.0}) for method in recommender.weights]
        lists: list[tuple[NDArray[np.float32], NDArray[np.bool_], int]] = []
        for batch in batches(len(answers.targets)):
            histories, pairs, model_scores = answers.candidates(recommender, batch)
            wanted = wanted_pairs(answers.numbered, batch, histories, repeats=recommender.repeats)
            hit = pairs.within(wanted)
            columns = [one.score(histories, pairs, model_scores, answers.vectors) for one in alone]
            table, sizes = np.stack(columns, axis=1), np.bincount(wanted.row, minlength=1)
            for row in np.unique(pairs.row[hit]):
                part = slice(*np.searchsorted(pairs.row, [row, row + 1]))
                lists.append((table[part], hit[part], int(sizes[row])))
        return cls._padded(lists, len(alone))

    @classmethod
    def _padded(
        cls, lists: Sequence[tuple[NDArray[np.float32], NDArray[np.bool_], int]], methods: int
    ) -> _Lists:
        most = max((len(hit) for _, hit, _ in lists), default=0)
        most = max(most, len(_DISCOUNTS))
        scores = np.zeros((len(lists), most, methods), np.float32)
        hits = np.zeros((len(lists), most), np.bool_)
        padding = np.ones_like(hits)
        for at, (table, hit, _) in enumerate(lists):
            part = at, slice(len(hit))
            scores[part], hits[part], padding[part] = table, hit, False
        gains = np.cumsum(_DISCOUNTS)
        ideal = gains[[min(size, len(gains)) - 1 for _, _, size in lists]] if lists else gains[:0]
        return cls(scores, padding, hits, ideal)

    def ndcg(self, weights: Doubles) -> float:
        """NDCG@10 of the lists in the order of the weighted scores; 0 without any."""
        if not len(self.ideal):
            return 0.0
        blended = self.scores @ weights.astype(np.float32)
        blended[self.padding] = -np.inf
        top = np.argpartition(-blended, len(_DISCOUNTS) - 1, axis=1)[:, : len(_DISCOUNTS)]
        order = np.argsort(-np.take_along_axis(blended, top, axis=1), axis=1, kind="stable")
        hit = np.take_along_axis(self.hit, np.take_along_axis(top, order, axis=1), axis=1)
        return float((hit @ _DISCOUNTS / self.ideal).mean())


_DISCOUNTS = 1 / np.log2(np.arange(2, K + 2))

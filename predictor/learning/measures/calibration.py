"""Fits what turns scores into probabilities, on validation targets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from foretell.errors import InvalidArgumentError
from predictor.learning.data import Events, Targets
from predictor.learning.measures.baselines import markov
from predictor.learning.measures.metrics import Floats, ItemHits, K, item_hits
from predictor.learning.splits import Protocol, split
from predictor.models.calibration import ItemCalibration, TypeCalibration, log_partition, softmax
from predictor.models.history import Ints

FACTOR = (-3.0, 3.0)
"""Logarithms of the least and largest scale: beyond a factor of 20 either way the
probabilities say nothing or everything."""

SHRINKAGE = 20.0
"""Lines that it takes to move a type's bias, or the logarithm of a scale, by about one: rare
types stay where they were, and a few lucky lines make nothing certain."""

PINNED = 0.5
"""Most that the log odds are moved after the fit: a few hits of a small sample are no proof."""


def fit_type_calibration(logits: Floats, true: Ints) -> TypeCalibration:
    """The calibration under which the true types are most likely.

    The biases catch up with shares of types that have moved since training.

    Args:
        logits: (lines, types); the logarithms where a model gives probabilities.
        true: (lines,) negative where training never saw the type: passed over.
    """
    known = true >= 0
    logits, true = logits[known], true[known]
    if not len(true):
        return TypeCalibration(biases=(0.0,) * logits.shape[1])
    scale, biases = vector_scaling(logits, true)
    return TypeCalibration(temperature=1 / scale, biases=tuple((biases / scale).tolist()))


def vector_scaling(scores: Floats, true: Ints) -> tuple[float, NDArray[np.float64]]:
    """The scale and the biases (types,) of softmax(scores * scale + biases) under which the true
    types are most likely (Guo et al., 2017, "On calibration of modern neural networks").

    Args:
        scores: (lines, types).
        true: (lines,).
    """
    wide = scores.astype(np.float64)
    lines = np.arange(len(true))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Regularised negative log likelihood and its gradient; the scale is exp(first)."""
        scale, biases = np.exp(parameters[0]), parameters[1:]
        error = softmax(wide * scale + biases).astype(np.float64)
        value = -np.log(np.maximum(error[lines, true], 1e-38)).sum()
        error[lines, true] -= 1
        gradient = np.append((error * wide).sum() * scale, error.sum(axis=0))
        return value + SHRINKAGE / 2 * (parameters**2).sum(), gradient + SHRINKAGE * parameters

    bounds = [FACTOR] + [(None, None)] * scores.shape[1]
    start = np.zeros(scores.shape[1] + 1)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(best[0])), best[1:]


def fit_item_calibration(hits: ItemHits, decline: float = 1.0) -> ItemCalibration:
    """Logistic regression of "is a target" on what the calibration looks at.

    The K best of every list weigh one each, those behind them (K / rank)^2, as all of them
    together matter about as much as the K; of these every tenth stands for ten. Parameters are
    drawn to a plain softmax as SHRINKAGE lines would. Last the intercept moves, by at most
    PINNED, so that among the K best as many hits are predicted as there are.

    Args:
        hits: of the validation targets, with CANDIDATES returned items; of a ranker that was
            fitted on the same targets, cross-fitted.
        decline: see `decline`; the odds are divided by it.
    """
    columns, weights = _columns(hits.top_score.shape[1])
    scores = hits.top_score.astype(np.float64)
    level = log_partition(scores)
    scores, came = scores[:, columns], hits.top_hit[:, columns]
    some = np.isfinite(scores)
    if not came.any():
        return ItemCalibration()
    middle = float(level.mean())
    ranks = np.broadcast_to(np.log(columns + 1.0), scores.shape)
    levels = np.broadcast_to(level, scores.shape)
    inputs = np.stack(
        [np.ones(int(some.sum())), (scores - level)[some], levels[some] - middle, ranks[some]]
    )
    hit, weight = came[some].astype(np.float64), np.broadcast_to(weights, scores.shape)[some]
    parameters = _logistic(inputs, hit, weight)
    parameters[0] += _pin(parameters @ inputs, hit * (weight == 1), weight == 1)
    intercept, score, by_level, log_rank = parameters.tolist()
    return ItemCalibration(
        intercept=intercept - by_level * middle - float(np.log(decline)),
        score=score,
        log_partition=by_level,
        log_rank=log_rank,
    )


def _pin(odds: NDArray[np.float64], hit: NDArray[np.float64], best: NDArray[np.bool_]) -> float:
    """What to add to the log odds so that the sum of probabilities is that of the hits."""

    def excess(shift: float) -> float:
        return float(expit(odds[best] + shift).sum() - hit.sum())

    if excess(-PINNED) >= 0:
        return -PINNED
    return PINNED if excess(PINNED) <= 0 else float(brentq(excess, -PINNED, PINNED))


def _columns(listed: int) -> tuple[Ints, NDArray[np.float64]]:
    """Places in a list to fit on, and their weights: see fit_item_calibration."""
    deep = np.arange(K, listed, 10)
    weights = np.concatenate([np.ones(min(K, listed)), 10 * (K / (deep + 1.0)) ** 2])
    return np.concatenate([np.arange(min(K, listed)), deep]), weights


def _logistic(
    inputs: NDArray[np.float64], came: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(4,) parameters of a logistic regression on inputs (4, lines)."""
    softmax_ = np.array([0.0, 1.0, 0.0, 0.0])
    # A list has one level for all its lines, so that K of them say no more than one.
    ridge = SHRINKAGE * np.array([1.0, 1.0, K, 1.0])

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        odds = parameters @ inputs
        away = parameters - softmax_
        value = (weights * (np.logaddexp(0, odds) - came * odds)).sum()
        error = weights * (expit(odds) - came)
        return value + (ridge * away**2).sum() / 2, inputs @ error + ridge * away

    bounds = [(None, None), (0, None), (None, None), (None, 0)]
    found: NDArray[np.float64] = minimize(
        loss, softmax_, jac=True, method="L-BFGS-B", bounds=bounds
    ).x
    return found


def decline(train: Events, validation: Targets, *, exclude_history: bool) -> float:
    """How many times rarer hits become when users have gone one basket beyond the training.

    A calibration is fitted right behind the training part, but predictions are asked for later
    and later. A Markov chain without users' last training baskets predicts these and then the
    validation baskets: the quotient of its hits is the estimate, drawn to 1 as far as it is noise.
    """
    try:
        last = split(train, Protocol(split="leave-one-out")).test
    except InvalidArgumentError:
        return 1.0
    first = np.full(len(train.user_ids), len(train))
    np.minimum.at(first, train.user[last.end], last.end)
    chain = markov(train.subset(np.arange(len(train)) < first[train.user]))
    near, far = (
        item_hits(chain, targets, exclude_history=exclude_history).share_of_best
        for targets in (last, validation)
    )
    if not near.sum() or not far.sum():
        return 1.0
    change = float(np.log(near.mean() / far.mean()))
    noise = sum((part.std() / part.mean()) ** 2 / len(part) for part in (near, far))
    # The share of the change that is no noise, as James and Stein would keep.
    return float(np.exp(change * max(0.0, 1 - noise / max(change**2, 1e-12))))

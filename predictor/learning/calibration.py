"""Fits what turns scores into probabilities, on validation targets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar  # type: ignore[import-untyped]

from predictor.learning.data import Targets
from predictor.learning.evaluation import Space
from predictor.learning.metrics import Floats, batches
from predictor.models.history import Ints
from predictor.models.model_dir import softmax
from predictor.models.sequence import Outputs

CANDIDATES = 200
"""Best items over which a probability is given: about what a caller may want to choose from."""

FACTOR = (-3.0, 3.0)
"""Logarithms of the least and largest temperature: beyond a factor of 20 either way the
probabilities say nothing or everything."""

SHRINKAGE = 20.0
"""Lines that it takes to move a type's bias, or the logarithm of a temperature, by about one: rare
types stay where they were, and a few lucky lines make nothing certain."""


def type_calibration(found: Outputs, targets: Targets) -> tuple[float, NDArray[np.float32]]:
    """Temperature and biases (types,) under which the true types are most likely.

    The probabilities are softmax((logits + biases) / temperature): vector scaling with one scale
    (Guo et al., 2017). The biases catch up with shares of types that have moved since training.
    """
    some = targets.type >= 0
    logits, true = found.type_logits[targets.row[some]], targets.type[some]
    types = logits.shape[1]
    if not len(true):
        return 1.0, np.zeros(types, np.float32)
    lines = np.arange(len(true))

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Regularised negative log likelihood and its gradient; the scale is exp(first)."""
        scale, biases = float(np.exp(parameters[0])), parameters[1:]
        probabilities = softmax(logits * np.float32(scale) + biases.astype(np.float32))
        own = probabilities[lines, true]
        value = -np.log(np.maximum(own, 1e-38)).sum() + SHRINKAGE / 2 * (parameters**2).sum()
        error = probabilities.astype(np.float64)
        error[lines, true] -= 1
        of_scale = (error * logits).sum() * scale + SHRINKAGE * parameters[0]
        return value, np.append(of_scale, error.sum(axis=0) + SHRINKAGE * biases)

    bounds = [FACTOR] + [(None, None)] * types
    best = minimize(loss, np.zeros(types + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    temperature = float(np.exp(-best[0]))
    return temperature, (best[1:] * temperature).astype(np.float32)


def item_temperature(
    found: Outputs, space: Space, targets: Targets, *, exclude_history: bool
) -> float:
    """The temperature at which the true items are most likely, of those among the CANDIDATES
    best: their probabilities are softmax(scores / temperature) over these.
    """
    scores, column = [], []
    for rows in batches(len(targets)):
        best, row, place = _candidates(found, space, targets, rows, exclude_history)
        scores.append(best[row])
        column.append(place)
    if not sum(map(len, column)):
        return 1.0
    return _temperature(np.concatenate(scores), np.concatenate(column))


def _candidates(
    found: Outputs, space: Space, targets: Targets, rows: slice, exclude_history: bool
) -> tuple[Floats, Ints, Ints]:
    """The best scores of each context, and (row, column) of the targets among them."""
    scores = found.queries[rows] @ space.items.T
    if exclude_history:
        whole = len(targets.events)
        items = targets.events.item[targets.positions(rows, whole)]
        row_of = np.repeat(np.arange(len(scores)), targets.lengths(whole)[rows])
        scores[row_of[items >= 0], items[items >= 0]] = -1e9
    k = min(CANDIDATES, scores.shape[1])
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    begin, end = np.searchsorted(targets.row, [rows.start, rows.stop])
    row, item = targets.row[begin:end] - rows.start, targets.item[begin:end]
    line, place = np.nonzero(best[row] == item[:, None])
    return np.take_along_axis(scores, best, axis=1), row[line], place


def _temperature(logits: Floats, true: Ints) -> float:
    """Minimises the regularised negative log likelihood of softmax(logits / temperature)."""
    lines = np.arange(len(true))

    def loss(log_temperature: float) -> float:
        own = softmax(logits, float(np.exp(log_temperature)))[lines, true]
        value = -np.log(np.maximum(own, 1e-38)).sum() + SHRINKAGE / 2 * log_temperature**2
        return float(value)

    return float(np.exp(minimize_scalar(loss, bounds=FACTOR, method="bounded").x))

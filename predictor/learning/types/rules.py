"""Fits the rule that makes probabilities, and one type to name, of the trees' scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from predictor.learning.measures.calibration import vector_scaling
from predictor.models.history import Ints
from predictor.models.types.models import Rule
from predictor.models.types.tables import Floats

FOLDS = 5

POWERS = np.arange(1, 13) * 0.05
"""Of types' shares in the weights of the decision; 1 would be balanced accuracy's."""


STANDARD_ERRORS = 2.0
"""By which accuracy + macro-F1 must gain from weights, over users."""

DRAWS = 200
"""Of users with replacement, for the standard error."""


def plain(types: int) -> Rule:
    """The trees' own probabilities, and the most probable type."""
    return Rule(1.0, (0.0,) * types, (1.0,) * types)


def fit_rule(scores: Floats, true: Ints, user: Ints, seed: int) -> tuple[Rule, Floats, Ints]:
    """The rule, and honest answers: those of rules that were fitted on other users' lines.

    Calibration is kept only if it is better than none on other users' lines; weights, which are
    at the mercy of the few lines of the rare types, only if they are so by STANDARD_ERRORS.

    Args:
        scores: (lines, types) of the trees.
        true: (lines,) the type that came.
        user: (lines,) whose lines they are.
        seed: of the division of users.

    Returns:
        the rule; probabilities (lines, types) and choices (lines,).
    """
    types = scores.shape[1]
    own, user = np.unique(user, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(len(own))[user] % FOLDS
    rules = [plain(types)] * FOLDS
    calibrated = [calibrate(scores[fold != k], true[fold != k]) for k in range(FOLDS)]
    keep_scale = log_loss(crossed(calibrated, scores, fold), true) < log_loss(
        crossed(rules, scores, fold), true
    )
    if keep_scale:
        rules = calibrated
    probabilities = crossed(rules, scores, fold)
    weighted = [
        weigh(rule, rule.probabilities(scores[fold != k]), true[fold != k])
        for k, rule in enumerate(rules)
    ]
    before = probabilities.argmax(axis=1)
    after = np.empty_like(before)
    for k, rule in enumerate(weighted):
        after[fold == k] = rule.choose(probabilities[fold == k])
    gain, error = quality_gain(after, before, true, user, types, seed)
    keep_weights = gain > STANDARD_ERRORS * error
    rule = calibrate(scores, true) if keep_scale else plain(types)
    if keep_weights:
        rule = weigh(rule, rule.probabilities(scores), true)
    return rule, probabilities, after if keep_weights else before


def crossed(rules: Sequence[Rule], scores: Floats, fold: Ints) -> Floats:
    """Probabilities of each fold by its rule."""
    out = np.empty(scores.shape, np.float32)
    for k, rule in enumerate(rules):
        out[fold == k] = rule.probabilities(scores[fold == k])
    return out


def log_loss(probabilities: Floats, true: Ints) -> float:
    """Mean of -log of the true types' probabilities."""
    own = probabilities[np.arange(len(true)), true]
    return float(-np.log(np.maximum(own, 1e-38)).mean())


def calibrate(scores: Floats, true: Ints) -> Rule:
    """Scale and biases under which the true types are most likely."""
    scale, biases = vector_scaling(scores, true)
    return Rule(scale, tuple(biases.tolist()), (1.0,) * scores.shape[1])


def weigh(rule: Rule, probabilities: Floats, true: Ints) -> Rule:
    """The rule with the weights of the largest macro-F1 that cost no accuracy.

    A type's weight is its share ** -power (Menon et al., 2021, "Long-tail learning via logit
    adjustment"): one number to choose. A weight of its own for every type gained more macro-F1
    on the lines it was fitted on, and less on those of other users.
    """
    if not len(true):
        return rule
    types = probabilities.shape[1]
    counts = np.bincount(true, minlength=types) + 1.0
    accuracy, best = quality(probabilities.argmax(axis=1), true, types)
    chosen = np.ones(types)
    for power in POWERS:
        weights = (counts / counts.max()) ** -power
        right, found = quality((probabilities * weights).argmax(axis=1), true, types)
        if found > best and right >= accuracy:
            best, chosen = found, weights
    return Rule(rule.scale, rule.biases, tuple(map(float, chosen)))


def quality_gain(
    after: Ints, before: Ints, true: Ints, user: Ints, types: int, seed: int
) -> tuple[float, float]:
    """Gain of `after` over `before` in accuracy + macro-F1, and its standard error.

    The error is that of a paired bootstrap over users.
    """
    users = int(user.max()) + 1
    rng = np.random.default_rng(seed)
    times = [np.bincount(rng.integers(0, users, users), minlength=users) for _ in range(DRAWS)]
    gains = []
    for drawn in [np.ones(users), *times]:
        ours, theirs = (
            sum(_quality(_confusion(chosen, true, types, drawn[user])))
            for chosen in (after, before)
        )
        gains.append(ours - theirs)
    return gains[0], float(np.std(gains[1:]))


def quality(chosen: Ints, true: Ints, types: int) -> tuple[float, float]:
    """Accuracy and macro-F1 (over types that occur or are chosen)."""
    return _quality(_confusion(chosen, true, types, np.ones(len(true))))


def _confusion(
    chosen: Ints, true: Ints, types: int, weights: NDArray[np.number]
) -> NDArray[np.float64]:
    counts = np.bincount(true * types + chosen, weights, types * types).astype(np.float64)
    return counts.reshape(types, types)


def _quality(confusion: NDArray[np.float64]) -> tuple[float, float]:
    right = np.diagonal(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)
    scores = 2 * right[either > 0] / either[either > 0]
    return float(right.sum() / confusion.sum()), float(scores.mean())

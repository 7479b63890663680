"""Calibration and weights on scores whose truth is known."""

from __future__ import annotations

import numpy as np

from predictor.learning.types.rules import calibrate, fit_rule, plain, quality, quality_gain, weigh
from predictor.models.history import Ints
from predictor.models.types.tables import Floats


def drawn(sharpness: float, size: int = 4_000) -> tuple[Floats, Ints, Ints]:
    """Scores that are the true logits times `sharpness`, types, and users."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(size, 3)) * 1.5 + [1.5, 0, -1.5]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    true = (rng.random((size, 1)) > shares.cumsum(axis=1)).sum(axis=1)
    return (logits * sharpness).astype(np.float32), true, rng.integers(0, 50, size)


def test_scale_and_biases_are_found() -> None:
    scores, true, _ = drawn(3.0)
    rule = calibrate(scores + np.array([0, 0, 1], np.float32), true)
    assert abs(rule.scale - 1 / 3) < 0.03
    assert abs(rule.biases[2] - rule.biases[0] + 1 / 3) < 0.15


def test_calibration_is_kept_where_it_helps_other_users() -> None:
    scores, true, user = drawn(3.0)
    rule, probabilities, _ = fit_rule(scores, true, user, 0)
    assert rule.scale < 0.5
    confidence = probabilities.max(axis=1).mean()
    assert abs(confidence - (probabilities.argmax(axis=1) == true).mean()) < 0.02
    scores, true, user = drawn(1.0)
    rule, _, _ = fit_rule(scores, true, user, 0)
    assert abs(rule.scale - 1) < 0.1


def test_weights_gain_f1_without_losing_accuracy() -> None:
    scores, true, _ = drawn(1.0)
    rule = plain(3)
    too_rare = rule.probabilities(scores - np.array([0, 0, 1.5], np.float32))
    weighted = weigh(rule, too_rare, true)
    before = quality(rule.choose(too_rare), true, 3)
    after = quality(weighted.choose(too_rare), true, 3)
    assert after[1] > before[1] + 0.01
    assert after[0] >= before[0]
    assert weighted.weights[2] > weighted.weights[0]


def test_weights_are_kept_only_beyond_the_noise_over_users() -> None:
    scores, true, user = drawn(1.0)
    twisted = np.array([0, 0, 1.5], np.float32)
    before = (scores - twisted).argmax(axis=1)
    gain, error = quality_gain(scores.argmax(axis=1), before, true, user, 3, 0)
    assert gain > 4 * error > 0
    assert quality_gain(before, before, true, user, 3, 0) == (0, 0)
    # After calibration nothing is left to gain but noise.
    assert fit_rule(scores - twisted, true, user, 0)[0].weights == (1, 1, 1)


def test_one_user_changes_nothing() -> None:
    scores, true, _ = drawn(3.0, 200)
    rule, probabilities, choices = fit_rule(scores, true, np.zeros(200, np.int64), 0)
    assert rule == plain(3)
    assert choices.tolist() == probabilities.argmax(axis=1).tolist()


def test_quality_is_accuracy_and_macro_f1() -> None:
    found = quality(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), 3)
    assert found == (0.75, (2 * 2 / 5 + 2 / 3) / 2)

"""Measures of types against scikit-learn where it has the same, and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score, roc_auc_score

from predictor.learning.measures.metrics import Floats
from predictor.learning.measures.type_metrics import (
    equal_mass_bins,
    roc_auc,
    type_metrics,
)
from predictor.models.history import UNKNOWN


@pytest.fixture
def predicted() -> tuple[Floats, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 300).astype(np.float32)
    cumulated = probabilities.cumsum(axis=1)
    true = (rng.random((300, 1)) > cumulated).sum(axis=1).clip(max=2)
    return probabilities, true.astype(np.int64)


def test_type_metrics_agree_with_scikit_learn(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted
    metrics = type_metrics(probabilities, true, ["a", "b", "c"])
    guess = probabilities.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx((guess == true).mean())
    assert metrics["precision"] == pytest.approx(precision_score(true, guess, average="macro"))
    assert metrics["recall"] == pytest.approx(recall_score(true, guess, average="macro"))
    assert metrics["f1"] == pytest.approx(f1_score(true, guess, average="macro"))
    assert metrics["log_loss"] == pytest.approx(log_loss(true, probabilities), rel=1e-5)
    areas = [roc_auc_score(true == code, probabilities[:, code]) for code in range(3)]
    assert metrics["roc_auc"] == pytest.approx(np.mean(areas))
    one_hot = np.eye(3)[true]
    assert metrics["mse"] == pytest.approx(((probabilities - one_hot) ** 2).sum(1).mean())
    assert np.sum(metrics["confusion_matrix"]) == 300
    assert metrics["confusion_matrix"][1][2] == ((true == 1) & (guess == 2)).sum()


def test_calibration_error_sees_overconfidence(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted  # the truth was drawn from them
    honest = type_metrics(probabilities, true, ["a", "b", "c"])["ece"]
    sharp = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    assert type_metrics(sharp, true, ["a", "b", "c"])["ece"] > 2 * honest


def test_a_type_that_training_never_saw_is_wrong_but_has_no_probability(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted
    known = type_metrics(probabilities, true, ["a", "b", "c"])
    doubled = np.concatenate([true, np.full(300, UNKNOWN)])
    metrics = type_metrics(np.tile(probabilities, (2, 1)), doubled, ["a", "b", "c"])
    assert metrics["accuracy"] == pytest.approx(known["accuracy"] / 2)
    assert metrics["log_loss"] == pytest.approx(known["log_loss"])
    assert metrics["unknown_types"] == 300


def test_roc_auc_of_ties_is_a_half_and_of_one_class_none() -> None:
    positive = np.array([True, False, True])
    assert roc_auc(np.ones(3, np.float32), positive) == pytest.approx(0.5)
    assert roc_auc(np.ones(3, np.float32), np.ones(3, np.bool_)) is None


def test_a_decision_rule_of_its_own_changes_no_probability(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted
    plain = type_metrics(probabilities, true, ["a", "b", "c"])
    always = type_metrics(probabilities, true, ["a", "b", "c"], np.full(300, 2))
    assert always["accuracy"] == pytest.approx((true == 2).mean())
    assert np.sum(always["confusion_matrix"], axis=0).tolist() == [0, 0, 300]
    for name in ("roc_auc", "mse", "log_loss", "ece"):
        assert always[name] == plain[name]


def test_the_calibration_error_of_known_bins() -> None:
    # Fifteen bins of two lines; those with a confidence up to 0.7 are right, the others wrong.
    confidence = np.repeat(np.linspace(0.56, 0.84, 15), 2)
    probabilities = np.stack([confidence, 1 - confidence], axis=1).astype(np.float32)
    true = (confidence > 0.71).astype(np.int64)
    expected = np.where(true == 0, 1 - confidence, confidence).mean()
    assert type_metrics(probabilities, true, ["a", "b"])["ece"] == pytest.approx(expected)


def test_the_same_probability_for_all_is_one_bin() -> None:
    probabilities = np.tile(np.array([0.8, 0.2], np.float32), (30, 1))
    true = np.repeat([0, 1], [20, 10])
    assert type_metrics(probabilities, true, ["a", "b"])["ece"] == pytest.approx(0.8 - 20 / 30)


def test_bins_hold_about_the_same_number_in_order() -> None:
    values = np.array([0.3, 0.1, 0.2, 0.9, 0.5, 0.4, 0.7])
    assert equal_mass_bins(values, 3).tolist() == [0, 0, 0, 2, 1, 1, 2]
    assert (
        np.bincount(equal_mass_bins(np.random.default_rng(0).random(150), 15)).tolist() == [10] * 15
    )
    assert equal_mass_bins(np.array([0.5, 0.1, 0.5, 0.5, 0.9, 0.5]), 3).tolist() == [
        1,
        0,
        1,
        1,
        2,
        1,
    ]

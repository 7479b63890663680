"""Plots: the curves are right, and any number of types gives a picture."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from predictor.learning import plots
from predictor.learning.fitting import Epoch

PNG = b"\x89PNG\r\n"


def test_roc_points_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, 300).astype(np.float32)  # with ties
    positive = rng.random(300) < scores / 25
    false_rate, true_rate = plots.roc_points(scores, positive)
    expected = roc_curve(positive, scores, drop_intermediate=False)
    assert false_rate == pytest.approx(expected[0])
    assert true_rate == pytest.approx(expected[1])


@pytest.mark.parametrize("types", [1, 2, 40])
def test_every_plot_is_a_picture(types: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"type {n}" for n in range(types)]
    probabilities = rng.dirichlet(np.ones(types), 200).astype(np.float32)
    true = rng.integers(0, types, 200)
    true[:3] = -2
    confusion = rng.integers(0, 9, (types, types))
    assert plots.roc_curves(probabilities, true, names).startswith(PNG)
    assert plots.confusion_matrix(confusion, names).startswith(PNG)


@pytest.mark.parametrize("item_loss", [0.0, 2.5])
def test_training_curve(item_loss: float) -> None:
    curve = [Epoch(n, item_loss, 1 / n, {"type_accuracy": 0.5}, 0.5, 1.0) for n in (1, 2)]
    assert plots.training_curve(curve).startswith(PNG)

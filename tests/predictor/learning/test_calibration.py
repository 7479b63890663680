"""Probabilities that were bent on purpose come back straight."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.calibration import item_temperature, type_calibration
from predictor.learning.data import Targets, to_events
from predictor.learning.evaluation import Space
from predictor.learning.metrics import Floats
from predictor.models.history import NONE, Ints
from predictor.models.version import softmax
from predictor.models.sequence import Outputs


def targets(item: Ints, type_: Ints, items: int = 1) -> Targets:
    """A context with one line for each; the user's only event is item 0."""
    one = np.zeros(1, np.int64)
    columns = EventColumns(["u"], ["a", "b", "c"], ["0"], [], one, one, one, one - 1, one)
    events = to_events(columns, [str(n) for n in range(items)])
    lines = len(item)
    ones = np.ones(lines, np.int64)
    return Targets(events, ones * 0, ones, np.arange(lines), item, type_, ones)


def drawn(logits: Floats, seed: int) -> Ints:
    """A true class for each row of logits."""
    cumulated = softmax(logits).cumsum(axis=1)
    draws = np.random.default_rng(seed).random((len(logits), 1))
    true: Ints = (draws > cumulated).sum(axis=1).clip(max=logits.shape[1] - 1)
    return true


def test_type_calibration_finds_scale_and_shift() -> None:
    logits = np.random.default_rng(0).standard_normal((20_000, 3)).astype(np.float32)
    true = drawn(logits, 1)
    bent = logits * 3 - np.array([0, 2, 0], np.float32)
    none = np.full(len(true), NONE)
    found = Outputs(bent, np.zeros((len(true), 2), np.float32))
    temperature, biases = type_calibration(found, targets(none, true))
    assert temperature == pytest.approx(3, rel=0.1)
    straight = softmax(bent + biases, temperature)
    assert np.abs(straight - softmax(logits)).max() < 0.03


def test_a_type_that_hardly_comes_keeps_its_bias() -> None:
    logits = np.zeros((40, 3), np.float32)
    true = np.repeat([0, 1], 20)
    _, biases = type_calibration(Outputs(logits, logits), targets(true * 0 + NONE, true))
    assert biases[2] < biases[0]
    assert np.ptp(biases) < 1.5  # the likelihood alone would send it to minus infinity


def test_a_few_lucky_lines_make_nothing_certain() -> None:
    logits = np.tile(np.array([1, 0, 0], np.float32), (10, 1))
    true = np.zeros(10, np.int64)  # right each time: the likelihood alone would want certainty
    temperature, biases = type_calibration(Outputs(logits, logits), targets(true + NONE, true))
    assert softmax(logits + biases, temperature)[0, 0] < 0.9


def test_without_targets_nothing_is_changed() -> None:
    none = np.full(3, NONE)
    found = Outputs(np.ones((3, 3), np.float32), np.ones((3, 2), np.float32))
    temperature, biases = type_calibration(found, targets(none, none))
    assert (temperature, biases.tolist()) == (1.0, [0, 0, 0])
    space = Space(np.ones((1, 2), np.float32), np.zeros((0, 2), np.float32))
    assert item_temperature(found, space, targets(none, none), exclude_history=False) == 1.0


@pytest.mark.parametrize("items", [30, 400])
def test_item_temperature(items: int) -> None:
    rng = np.random.default_rng(0)
    space = Space(rng.standard_normal((items, 8)).astype(np.float32), np.zeros((0, 8), np.float32))
    queries = rng.standard_normal((4_000, 8)).astype(np.float32)
    true = drawn(queries @ space.items.T, 1)
    found = Outputs(np.zeros((len(true), 3), np.float32), queries * 2)
    asked = targets(true, np.full(len(true), NONE), items)
    temperature = item_temperature(found, space, asked, exclude_history=False)
    assert temperature == pytest.approx(2, rel=0.1)

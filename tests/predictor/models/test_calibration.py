"""Probabilities from scores: order is kept, lists of any shape are read alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from predictor.models.calibration import CANDIDATES, ItemCalibration, TypeCalibration

SCORES = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30)
CALIBRATIONS = st.builds(
    ItemCalibration,
    intercept=st.floats(-5, 5),
    score=st.floats(0, 3),
    log_partition=st.floats(-1, 1),
    log_rank=st.floats(-2, 0),
)


@given(SCORES, CALIBRATIONS)
def test_a_higher_score_never_gets_a_lower_probability(
    scores: list[float], calibration: ItemCalibration
) -> None:
    ordered = np.sort(np.array(scores, np.float32))
    found = calibration.probabilities(ordered)
    assert (np.diff(found) >= -1e-7).all()
    assert ((found >= 0) & (found <= 1)).all()


@given(SCORES, CALIBRATIONS, st.integers(0, 40))
def test_neither_order_nor_places_without_an_item_matter(
    scores: list[float], calibration: ItemCalibration, empty: int
) -> None:
    row = np.array(scores, np.float32)
    found = calibration.probabilities(row)
    by = np.random.default_rng(0).permutation(len(row))
    assert calibration.probabilities(row[by]) == pytest.approx(found[by])
    padded = np.concatenate([row, np.full(empty, -np.inf, np.float32)])
    both = calibration.probabilities(np.stack([padded, padded[::-1]]))
    assert both[0, : len(row)] == pytest.approx(found)
    assert both[1, empty:] == pytest.approx(found[::-1])
    assert not both[0, len(row) :].any()


@given(CALIBRATIONS)
def test_it_is_json(calibration: ItemCalibration) -> None:
    assert ItemCalibration.model_validate_json(calibration.model_dump_json()) == calibration


def test_by_default_it_is_about_a_softmax() -> None:
    scores = np.array([2.0, 1.0, -3.0], np.float32)
    share = np.exp(scores) / np.exp(scores).sum()
    # The odds are the shares.
    assert ItemCalibration().probabilities(scores) == pytest.approx(share / (1 + share))


def test_other_items_are_judged_by_the_candidates() -> None:
    calibration = ItemCalibration(intercept=-1, score=0.8, log_partition=0.1, log_rank=-0.5)
    candidates = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    found = calibration.probabilities(candidates)
    some = calibration.probabilities(candidates[:, 4:7], candidates)
    assert some == pytest.approx(found[:, 4:7])
    worse = calibration.probabilities(np.full((3, 1), -9, np.float32), candidates)
    assert (worse[:, 0] < found.min(axis=1)).all()


def test_what_lies_behind_the_candidates_does_not_change_the_level() -> None:
    scores = np.linspace(3, 0, CANDIDATES + 100, dtype=np.float32)
    calibration = ItemCalibration(log_partition=0.5)
    found = calibration.probabilities(scores)
    assert found[:10] == pytest.approx(calibration.probabilities(scores[:CANDIDATES])[:10])


def test_lists_without_items() -> None:
    assert ItemCalibration().probabilities(np.zeros((2, 0), np.float32)).shape == (2, 0)
    assert ItemCalibration().probabilities(np.zeros(0, np.float32)).shape == (0,)
    nothing = np.full((1, 3), -np.inf, np.float32)
    assert ItemCalibration().probabilities(nothing).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    "fields",
    [{"score": -0.1}, {"log_rank": 0.1}, {"intercept": float("nan")}, {"slope": 1.0}],
)
def test_numbers_that_turn_the_order_around_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ItemCalibration(**fields)


def test_type_probabilities_are_shifted_and_flattened() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], np.float32))
    plain = TypeCalibration(biases=(0, 0, 0)).probabilities(logits)
    assert plain == pytest.approx(np.exp(logits))
    bent = TypeCalibration(temperature=2, biases=(0, 1, 0)).probabilities(logits)
    expected = np.sqrt(np.exp(logits) * np.array([1, np.e, 1]))
    assert bent == pytest.approx(expected / expected.sum(axis=1, keepdims=True), rel=1e-5)
    with pytest.raises(ValidationError):
        TypeCalibration(temperature=0, biases=(0,))

"""Probabilities that were bent on purpose come back straight."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.measures.calibration import (
    decline,
    fit_item_calibration,
    fit_type_calibration,
)
from predictor.learning.measures.metrics import Floats, ItemHits, K, calibration_ratio
from predictor.learning.measures.type_metrics import type_metrics
from predictor.learning.splits import Protocol, split
from predictor.models.calibration import CANDIDATES, ItemCalibration, softmax
from predictor.models.history import NONE, UNKNOWN, Ints

Doubles = NDArray[np.float64]


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
    found = fit_type_calibration(bent, true)
    assert found.temperature == pytest.approx(3, rel=0.1)
    straight = found.probabilities(bent)
    assert np.abs(straight - softmax(logits)).max() < 0.03
    assert type_metrics(straight, true, "abc")["ece"] < 0.02
    assert type_metrics(softmax(bent), true, "abc")["ece"] > 0.1


def test_types_that_training_never_saw_are_passed_over() -> None:
    logits = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
    true = drawn(logits, 1)
    with_unknown = fit_type_calibration(
        np.concatenate([logits, logits]), np.concatenate([true, np.full(500, UNKNOWN)])
    )
    assert with_unknown == fit_type_calibration(logits, true)


def test_a_type_that_hardly_comes_keeps_its_bias() -> None:
    biases = fit_type_calibration(np.zeros((40, 3), np.float32), np.repeat([0, 1], 20)).biases
    assert biases[2] < biases[0]
    assert np.ptp(biases) < 1.5  # the likelihood alone would send it to minus infinity


def test_a_few_lucky_lines_make_nothing_certain() -> None:
    logits = np.tile(np.array([1, 0, 0], np.float32), (10, 1))
    true = np.zeros(10, np.int64)  # right each time: the likelihood alone would want certainty
    assert fit_type_calibration(logits, true).probabilities(logits)[0, 0] < 0.9


def test_without_targets_nothing_is_changed() -> None:
    found = fit_type_calibration(np.ones((3, 3), np.float32), np.full(3, NONE))
    assert (found.temperature, found.biases) == (1.0, (0, 0, 0))
    assert fit_item_calibration(lists(np.zeros((3, 200)), np.zeros((3, 200)))) == ItemCalibration()


def lists(
    scores: Floats | NDArray[np.float64], probability: Floats | NDArray[np.float64], seed: int = 0
) -> ItemHits:
    """Lists with these scores, best first, whose items are targets with this probability."""
    count = len(scores)
    came = np.random.default_rng(seed).random(scores.shape) < probability
    nothing = np.zeros(count, np.int64)
    return ItemHits(
        context=np.arange(count), user=np.arange(count), history_length=nothing + 3,
        size=came.sum(axis=1), hits=came[:, :K].sum(axis=1), ndcg=np.zeros(count),
        target_row=nothing, target_item=nothing, target_hit=np.zeros(count, np.bool_),
        top=np.broadcast_to(np.arange(scores.shape[1]), scores.shape),
        top_score=scores.astype(np.float32), top_hit=came,
    )  # fmt: skip


def bent_lists(count: int, seed: int) -> tuple[ItemHits, Floats]:
    """Lists of a calibration's own, and its probabilities."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.gumbel(size=(count, CANDIDATES)), axis=1) + rng.normal(size=(count, 1))
    truth = ItemCalibration(intercept=1.0, score=1.3, log_partition=0.3, log_rank=-0.4)
    likely = truth.probabilities(scores.astype(np.float32))
    return lists(scores, likely, seed), likely


def test_item_calibration_finds_what_made_the_hits() -> None:
    hits, _ = bent_lists(4_000, 0)
    found = fit_item_calibration(hits)
    others, truth = bent_lists(2_000, 1)
    likely = found.probabilities(others.top_score)
    assert np.abs(likely - truth)[:, :50].mean() < 0.01
    ratio = calibration_ratio(likely, others)
    assert ratio == pytest.approx(1, abs=0.08)


def test_on_its_own_lists_as_many_hits_are_predicted_as_there_are() -> None:
    # Rare, common, rare again: no logistic regression follows that.
    place = np.arange(CANDIDATES)
    likely = np.select([place < 5, place < K], [0.15, 0.25], 0.02)
    scores = np.linspace(3, 0, CANDIDATES)
    hits = lists(np.tile(scores, (900, 1)), np.tile(likely, (900, 1)))
    found = fit_item_calibration(hits)
    ratio = calibration_ratio(found.probabilities(hits.top_score), hits)
    assert ratio == pytest.approx(1, abs=0.01)
    rarer = fit_item_calibration(hits, decline=1.2)
    ratio = calibration_ratio(rarer.probabilities(hits.top_score), hits)
    assert ratio is not None
    assert 1 / 1.2 < ratio < 0.9  # odds are divided, probabilities a little less


def test_a_few_lucky_lists_prove_nothing() -> None:
    scores = np.tile(np.linspace(1, 0, CANDIDATES), (3, 1))
    certain = lists(scores, np.tile((np.arange(CANDIDATES) < K) * 1.0, (3, 1)))
    found = fit_item_calibration(certain).probabilities(certain.top_score)
    assert found[0, 0] < 0.9


def test_short_lists_are_calibrated_too() -> None:
    scores = np.full((500, CANDIDATES), -np.inf)
    scores[:, :4] = [3, 2, 1, 0]
    hits = lists(scores, np.where(np.isfinite(scores), 0.3, 0))
    hits.top.setflags(write=False)
    found = fit_item_calibration(hits).probabilities(hits.top_score)
    assert found[:, :4].mean() == pytest.approx(0.3, abs=0.05)


def chains(users: int, broken: float) -> Events:
    """Users who walk along one circle of items; a share of their last step leads elsewhere."""
    rng = np.random.default_rng(0)
    walks = (rng.integers(0, 40, (users, 1)) + np.arange(6)) % 40
    lost = rng.random(users) < broken
    walks[lost, -1] = rng.integers(0, 40, lost.sum())
    user = np.repeat(np.arange(users), 6)
    nothing = np.zeros(len(user), np.int64)
    return to_events(
        EventColumns(
            [f"u{n}" for n in range(users)], ["view"], [f"i{n}" for n in range(40)], [],
            user, nothing, walks.ravel(), nothing - 1, None,
        ),
        [f"i{n}" for n in range(40)],
    )  # fmt: skip


@pytest.mark.parametrize(("broken", "expected"), [(0.0, 1.0), (0.5, 1.9)])
def test_decline_sees_hits_get_rarer(broken: float, expected: float) -> None:
    part = split(chains(600, broken), Protocol(split="leave-one-out"))
    # What is test there is validation here: all steps before it are whole.
    train, validation = part.test.events.subset(keep_before(part.test.events)), part.test
    found = decline(train, validation, exclude_history=False)
    assert found == pytest.approx(expected, rel=0.25)


def keep_before(events: Events) -> NDArray[np.bool_]:
    """All but everybody's last event."""
    last = np.zeros(len(events), np.bool_)
    last[events.first_of_user[1:] - 1] = True
    return ~last


def test_decline_of_too_little_data_is_none() -> None:
    events = chains(2, 0.0)
    part = split(events, Protocol(split="leave-one-out"))
    assert decline(part.train.subset(part.train.user < 0), part.test, exclude_history=False) == 1.0

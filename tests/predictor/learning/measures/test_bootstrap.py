"""Intervals hold what they promise, and a difference is found where there is one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from predictor.learning.measures import bootstrap
from predictor.learning.measures.bootstrap import (
    Difference,
    Doubles,
    Measure,
    calibration_error,
    holm,
    macro_f1,
    macro_roc_auc,
    mean,
    resample,
)
from predictor.learning.measures.metrics import Floats
from predictor.learning.measures.type_metrics import calibration_gaps, type_metrics
from predictor.models.history import UNKNOWN, Ints


def difference(a: Measure, b: Measure, users: Ints, seed: int = 0) -> Difference:
    found = resample({"a": a, "b": b}, users, seed)
    return found["a"].minus(found["b"])


def gain(a: Doubles, b: Doubles, users: Ints, seed: int = 0) -> Difference:
    return difference(mean(a), mean(b), users, seed)


def test_the_interval_of_independent_cases_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(size=4_000)
    a = b + rng.normal(0.1, 1, size=4_000)
    value, low, high, _ = gain(a, b, np.arange(4_000))
    error = (a - b).std() / np.sqrt(4_000)
    assert value == pytest.approx((a - b).mean())
    assert low == pytest.approx(value - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(value + 1.96 * error, abs=0.2 * error)


def test_intervals_hold_the_truth_19_times_of_20() -> None:
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(60), 10)
    held, surprised, trials = 0, 0, 300
    for trial in range(trials):
        # Cases of one user are alike: as if independent, the interval would hold it half the time.
        own = rng.normal(size=60)[users] + rng.normal(size=600)
        found = resample({0: mean(own), 1: mean(np.zeros(600))}, users, trial, draws=400)
        low, high = found[0].interval
        held += low <= 0 <= high
        surprised += found[0].minus(found[1]).p <= 0.05
    assert 0.91 < held / trials < 0.98
    assert 0.02 < surprised / trials < 0.09


def test_cases_of_one_user_are_drawn_together() -> None:
    # A hundred copies of each of twenty users tell as much as twenty users.
    own = np.random.default_rng(1).normal(size=20)
    once = gain(own, np.zeros(20), np.arange(20), 5)
    often = gain(np.repeat(own, 100), np.zeros(2_000), np.repeat(np.arange(20), 100), 5)
    assert often == pytest.approx(once)


def test_a_user_weighs_as_many_cases_as_they_have() -> None:
    found = gain(np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4), np.array([7, 9, 9, 9]))
    assert found[:3] == (0.25, 0.0, 1.0)


def test_pairing_takes_out_what_both_have_in_common() -> None:
    b = np.random.default_rng(2).normal(0, 100, size=500)
    value, low, high, p = gain(b + 0.5, b, np.arange(500))
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert p < 0.01


def test_the_same_answers_are_not_told_apart() -> None:
    true = np.arange(60) % 3
    same = macro_f1(true, true, 3)
    assert difference(same, same, np.arange(60) // 6) == (0, 0, 0, 1)


@pytest.mark.parametrize(("users", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625)])
def test_a_few_users_prove_nothing(users: int, least: float) -> None:
    assert gain(np.ones(50), np.zeros(50), np.arange(50) % users).p == least


def test_draws_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = gain(np.arange(30.0), np.zeros(30), np.arange(30), 3)
    monkeypatch.setattr(bootstrap, "CELLS", 100)
    assert gain(np.arange(30.0), np.zeros(30), np.arange(30), 3) == pytest.approx(at_once)


@pytest.mark.parametrize("size", [0, 2])
def test_cases_that_cannot_be_paired_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        gain(np.zeros(size), np.zeros(size), np.zeros(3, np.int64))


def test_nothing_is_not_resampled() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        resample({}, np.zeros(0, np.int64), 0)


def test_only_what_is_counted_makes_the_mean() -> None:
    values, counted = np.array([1.0, np.nan, 3.0]), np.array([True, False, True])
    assert resample({0: mean(values, counted)}, np.arange(3), 0)[0].value == 2


def test_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    true = rng.choice(4, size=900, p=[0.6, 0.25, 0.1, 0.05])
    a = np.where(rng.random(900) < 0.6, true, rng.integers(4, size=900))
    b = np.where(rng.random(900) < 0.4, true, rng.integers(4, size=900))
    users = rng.integers(90, size=900)
    value, low, high, p = difference(macro_f1(a, true, 4), macro_f1(b, true, 4), users)
    f1 = partial(f1_score, true, average="macro")
    assert value == pytest.approx(f1(a) - f1(b))
    assert 0 < low < value < high
    assert p < 0.01


@given(st.integers(0, 99))
def test_macro_f1_is_that_of_the_tables(seed: int) -> None:
    """Also of types that never come, or that training never saw."""
    rng = np.random.default_rng(seed)
    true, predicted = rng.choice([UNKNOWN, 0, 1, 2], 12), rng.integers(4, size=12)
    own = np.eye(5, dtype=np.float32)[predicted]
    expected = type_metrics(own, true, list("abcde"))["f1"]
    found = resample({0: macro_f1(predicted, true, 5)}, np.arange(12), 0, draws=3)
    assert found[0].value == pytest.approx(expected)


def typed(seed: int, cases: int, users: int, *, rounded: int) -> tuple[Floats, Ints, Ints]:
    """Probabilities, with ties if they are rounded, and what came: of three types, one of them
    rare, or none of these."""
    rng = np.random.default_rng(seed)
    true = rng.choice(3, size=cases, p=[0.5, 0.475, 0.025])
    made = rng.random((cases, 3)) + 0.5 * np.eye(3)[true]
    made = (made / made.sum(axis=1, keepdims=True)).round(rounded).astype(np.float32)
    true[rng.random(cases) < 0.05] = UNKNOWN
    return made, true, rng.integers(users, size=cases) * 7


def copies(users: Ints, draws: int, seed: int) -> list[Ints]:
    """Cases by number, of a draw one after the other and as often as their users were drawn."""
    names = np.unique(users)
    drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    return [
        np.concatenate([np.flatnonzero(users == names[user]) for user in some]) for some in drawn
    ]


@given(st.integers(0, 30), st.sampled_from([1, 6]), st.sampled_from([3, 40]))
def test_areas_of_draws_are_those_of_copied_cases(seed: int, rounded: int, drawn: int) -> None:
    """Whether sums are kept sparse or not; also of draws in which a type does not come."""
    made, true, users = typed(seed, 60, drawn, rounded=rounded)
    measure = macro_roc_auc(made, true)
    found = resample({0: measure}, users, 5, draws=4)[0]
    names = list("abc")
    assert found.value == pytest.approx(type_metrics(made, true, names)["roc_auc"])
    for own, cases in zip(found.draws, copies(users, 4, 5), strict=True):
        expected = type_metrics(made[cases], true[cases], names)["roc_auc"]
        assert own == pytest.approx(expected)


def test_the_area_needs_few_sums_where_little_is_to_be_told_apart() -> None:
    made, true, _ = typed(0, 5_000, 1, rounded=6)
    rare = int((true == 2).sum())
    two = macro_roc_auc(made[:, [0, 2]], np.where(true == 2, 1, UNKNOWN))
    assert two.cases.shape[1] <= 2 * (2 * rare + 1) + 2


def test_where_no_type_is_to_be_told_from_another_the_area_is_a_half() -> None:
    measure = macro_roc_auc(np.array([[0.9, 0.1], [0.2, 0.8]], np.float32), np.array([0, 1]))
    found = resample({0: measure}, np.arange(2), 0, draws=50)[0]
    assert found.value == 1
    assert set(found.draws) == {0.5, 1}


def test_calibration_errors_of_draws_are_those_of_copied_cases() -> None:
    """Moved to the error that was measured: noise makes those of draws larger."""
    made, true, users = typed(1, 400, 50, rounded=6)
    found = resample({0: calibration_error(made, true)}, users, 5, draws=30)[0]
    assert found.value == pytest.approx(type_metrics(made, true, list("abc"))["ece"])
    gap, group = (np.zeros(len(true)), np.zeros(len(true), np.int64))
    gap[true >= 0], group[true >= 0] = calibration_gaps(made[true >= 0], true[true >= 0])
    plain = []
    for cases in copies(users, 30, 5):
        some = cases[true[cases] >= 0]
        plain.append(np.abs(np.bincount(group[some], gap[some])).sum() / len(some))
    assert np.mean(plain) > found.value
    assert found.draws - found.value == pytest.approx(np.array(plain) - np.mean(plain))


def test_a_calibration_error_of_nothing_is_none() -> None:
    measure = calibration_error(np.zeros((2, 3), np.float32), np.full(2, UNKNOWN))
    assert resample({0: measure}, np.arange(2), 0)[0].interval == (0, 0)


def test_wide_measures_are_drawn_less_often_where_they_cost_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, true, users = typed(2, 300, 60, rounded=6)
    measures = {"area": macro_roc_auc(made, true), "hits": mean(true == 0)}
    whole = resample(measures, users, 3)
    assert [len(found.draws) for found in whole.values()] == [2_000, 2_000]
    monkeypatch.setattr(bootstrap, "WORK", 1_000_000)
    monkeypatch.setattr(bootstrap, "CELLS", 20_000)
    few = resample(measures, users, 3)
    drawn = len(few["area"].draws)
    assert 200 < drawn < 2_000
    assert few["area"].draws == pytest.approx(whole["area"].draws[:drawn])
    assert few["hits"].draws == pytest.approx(whole["hits"].draws)
    paired = few["area"].minus(few["hits"])  # by the draws of both
    assert paired.value == pytest.approx(few["area"].value - few["hits"].value)
    assert (paired.low, paired.high) == pytest.approx(
        tuple(np.quantile(few["area"].draws - few["hits"].draws[:drawn], [0.025, 0.975]))
    )
    monkeypatch.setattr(bootstrap, "WORK", 1)
    assert len(resample(measures, users, 3)["area"].draws) == 200


def test_several_tests_are_held_to_more() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}

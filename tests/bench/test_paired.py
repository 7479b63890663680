from functools import partial

import numpy as np
import pytest
from sklearn.metrics import f1_score

from bench.paired import paired_bootstrap, paired_macro_f1


def test_the_interval_of_independent_cases_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(size=4_000)
    a = b + rng.normal(0.1, 1, size=4_000)
    mean, low, high = paired_bootstrap(a, b, np.arange(4_000), 1)
    error = (a - b).std() / np.sqrt(4_000)
    assert mean == pytest.approx((a - b).mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_cases_of_one_user_are_drawn_together() -> None:
    # A hundred copies of each of twenty users tell as much as twenty users.
    rng = np.random.default_rng(1)
    gain = rng.normal(size=20)
    once = paired_bootstrap(gain, np.zeros(20), np.arange(20), 5)
    often = paired_bootstrap(
        np.repeat(gain, 100), np.zeros(2_000), np.repeat(np.arange(20), 100), 5
    )
    assert often == pytest.approx(once)


def test_a_user_weighs_as_many_cases_as_they_have() -> None:
    a, b = np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4)
    mean, low, high = paired_bootstrap(a, b, np.array([7, 9, 9, 9]), 0)
    assert (mean, low, high) == (0.25, 0.0, 1.0)


def test_pairing_takes_out_what_both_have_in_common() -> None:
    rng = np.random.default_rng(2)
    b = rng.normal(0, 100, size=500)
    mean, low, high = paired_bootstrap(b + 0.5, b, np.arange(500), 0)
    assert mean == pytest.approx(0.5)
    assert (low, high) == pytest.approx((0.5, 0.5))


def test_draws_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, groups = np.arange(30.0), np.zeros(30), np.arange(30)
    at_once = paired_bootstrap(a, b, groups, 3)
    monkeypatch.setattr("bench.paired.CELLS", 100)
    assert paired_bootstrap(a, b, groups, 3) == at_once


@pytest.mark.parametrize("size", [0, 2])
def test_cases_that_cannot_be_paired_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap(np.zeros(size), np.zeros(size), np.zeros(3, np.int64), 0)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    true = rng.choice(4, size=900, p=[0.6, 0.25, 0.1, 0.05])
    a = np.where(rng.random(900) < 0.6, true, rng.integers(4, size=900))
    b = np.where(rng.random(900) < 0.4, true, rng.integers(4, size=900))
    mean, low, high = paired_macro_f1(a, b, true, rng.integers(90, size=900), 0)
    f1 = partial(f1_score, true, average="macro")
    assert mean == pytest.approx(f1(a) - f1(b))
    assert 0 < low < mean < high


def test_the_same_answers_have_no_difference_in_f1() -> None:
    true = np.arange(60) % 3
    assert paired_macro_f1(true, true, true, np.arange(60) // 6, 0) == (0, 0, 0)

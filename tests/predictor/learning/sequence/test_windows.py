"""Training windows: every basket once, from its past alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.sequence.windows import FIRST_WEIGHT, LATE_HALF_LIFE, Windows
from predictor.models.history import hours_of_week


def random_events(seed: int) -> Events:
    """Few and many events a user, baskets of one to six lines, some larger than a window."""
    rng = np.random.default_rng(seed)
    user, time = [], []
    for number, baskets in enumerate([1, 2, 7, 30, 90]):
        for basket in range(baskets):
            size = 25 if basket == 3 else int(rng.integers(1, 7))
            user += [number] * size
            time += [basket * 3_600_000_000] * size
    count = len(user)
    return to_events(
        EventColumns(
            [f"u{n}" for n in range(5)], ["x"], [str(n) for n in range(count)], [],
            np.array(user), np.zeros(count, np.int64), np.arange(count),
            np.full(count, -1), np.array(time),
        )
    )  # fmt: skip


def first_basket(events: Events) -> NDArray[np.bool_]:
    """Whether an event is of its user's first basket."""
    first: NDArray[np.bool_] = events.basket == events.basket[events.first_of_user[events.user]]
    return first


@pytest.mark.parametrize("length", [1, 8, 20, 1_000])
@pytest.mark.parametrize("seed", range(3))
def test_every_basket_is_learned_once_from_the_last_event_before_it(length: int, seed: int) -> None:
    events = random_events(seed)
    windows = Windows(events, length)
    seen = []
    for batch in windows.epoch(40, 400, np.random.default_rng(seed)):
        time = batch.item.shape[1]
        assert (np.diff(batch.row) >= 0).all()
        assert (batch.context < 0).sum() <= 1  # the empty history is there once
        for context, at in enumerate(batch.context):
            lines = batch.line_item[batch.row == context]
            if at < 0:  # the first baskets of some users
                assert set(lines) <= set(np.flatnonzero(first_basket(events)).tolist())
                seen += lines.tolist()
                continue
            first = int(lines.min())  # items are numbered like events
            seen += lines.tolist()
            basket = int(events.basket[first])
            assert lines.tolist() == list(
                range(events.first_of_basket[basket], events.first_of_basket[basket + 1])
            )
            window, offset = divmod(int(at), time)
            history = batch.item[window, : offset + 1]
            assert history[-1] == first - 1
            assert events.user[history[-1]] == events.user[first]
            whole = first - events.first_of_user[events.user[first]]
            assert len(history) >= min(whole, length // 2)
            assert history.tolist() == list(range(first - len(history), first))
    assert sorted(seen) == list(range(len(events)))


def test_gaps_begin_anew_in_each_window() -> None:
    batch = next(Windows(random_events(0), 8).epoch(10**6, 10**6, np.random.default_rng(0)))
    assert (batch.gap[:, 0] == 0).all()
    real = batch.item[:, 1:] >= 0
    assert set(np.unique(batch.gap[:, 1:][real])) == {1, 2 + 11}  # an hour is 2**11 s and more


def test_weights_divide_a_basket_by_a_power_of_its_size() -> None:
    events = random_events(0)
    for power, expected in ((1.0, 1.0), (0.0, 1 / 25), (0.5, 1 / 5)):
        batch = next(Windows(events, 1_000, power).epoch(10**6, 10**6, np.random.default_rng(0)))
        sizes = np.bincount(batch.row)
        of_25 = batch.weight[np.isin(batch.row, np.flatnonzero(sizes[1:] == 25) + 1)]
        assert of_25 == pytest.approx(expected)


def test_steps_is_the_number_of_batches() -> None:
    windows = Windows(random_events(0), 20)
    batches = list(windows.epoch(40, 400, np.random.default_rng(0)))
    assert windows.steps(40, 400) == pytest.approx(len(batches), abs=2)
    assert all(batch.item.size <= 400 + 20 * 20 for batch in batches)


def test_a_batch_of_windows_within_one_basket_is_passed_over() -> None:
    count = 40  # events of one user at one instant, as programs and floods of them have
    zeros, none = np.zeros(count, np.int64), np.full(count, -1)
    columns = EventColumns(["u"], ["x"], ["i"], [], zeros, zeros, zeros, none, zeros)
    windows = Windows(to_events(columns), 8)
    assert len(windows) > 1
    batches = list(windows.epoch(1, 1, np.random.default_rng(0)))
    assert [len(batch.context) for batch in batches] == [1]
    assert len(batches[0].line_item) == count


def test_log_gaps_are_those_to_the_basket_that_follows() -> None:
    batch = next(Windows(random_events(0), 20).epoch(10**6, 10**6, np.random.default_rng(0)))
    assert len(batch.log_gap) == len(batch.context)
    assert np.isnan(batch.log_gap[batch.context < 0]).all()
    assert batch.log_gap[batch.context >= 0] == pytest.approx(np.log(3_600))


def test_without_times_there_is_no_gap() -> None:
    events = replace(random_events(0), has_times=False)
    batch = next(Windows(events, 20).epoch(10**6, 10**6, np.random.default_rng(0)))
    assert np.isnan(batch.log_gap).all()
    assert (batch.gap == 0).all()
    assert (batch.hour == 0).all()


def test_hours_are_those_of_the_events() -> None:
    events = random_events(0)
    batch = next(Windows(events, 20).epoch(10**6, 10**6, np.random.default_rng(0)))
    real = batch.item >= 0  # each event is an item of its own
    assert (batch.hour[real] == hours_of_week(events.timestamp[batch.item[real]])).all()
    assert len(np.unique(batch.hour[real])) > 24


def test_late_baskets_count_more() -> None:
    events = random_events(0)
    batch = Windows(events, 1_000, 0.5, 2.0).batch(np.array([2]))  # the user of seven baskets
    by_basket = [batch.weight[batch.row == row] for row in range(7)]
    late = 1 + 2 * 0.5 ** (np.arange(6, -1, -1) / LATE_HALF_LIFE)
    late[0] *= FIRST_WEIGHT
    sums = [weights.sum() / len(weights) ** 0.5 for weights in by_basket]
    assert sums == pytest.approx(late.tolist())

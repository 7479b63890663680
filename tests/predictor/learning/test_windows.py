"""Training windows: every basket once, from its past alone."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.windows import Windows


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


@pytest.mark.parametrize("length", [1, 8, 20, 1_000])
@pytest.mark.parametrize("seed", range(3))
def test_every_basket_is_learned_once_from_the_last_event_before_it(length: int, seed: int) -> None:
    events = random_events(seed)
    windows = Windows(events, length)
    seen = []
    for batch in windows.epoch(40, 400, np.random.default_rng(seed)):
        time = batch.item.shape[1]
        for context, at in enumerate(batch.context):
            lines = batch.line_item[batch.row == context]
            first = int(lines.min())  # items are numbered like events
            seen += lines.tolist()
            basket = int(events.basket[first])
            assert lines.tolist() == list(
                range(events.first_of_basket[basket], events.first_of_basket[basket + 1])
            )
            if at < 0:
                assert first == events.first_of_user[events.user[first]]
                continue
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
        of_25 = batch.weight[np.isin(batch.row, np.flatnonzero(sizes == 25))]
        assert of_25 == pytest.approx(expected)


def test_steps_is_the_number_of_batches() -> None:
    windows = Windows(random_events(0), 20)
    batches = list(windows.epoch(40, 400, np.random.default_rng(0)))
    assert windows.steps(40, 400) == pytest.approx(len(batches), abs=2)
    assert all(batch.item.size <= 400 + 20 * 20 for batch in batches)

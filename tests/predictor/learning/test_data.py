"""Histories, baskets and splits against a plain Python reading of the same rules."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Target
from predictor.learning.data import Events, Targets, history_of, ragged, repeat_share, to_events
from predictor.learning.splits import Protocol, SplitKind, default_split, split
from predictor.models.history import NONE, UNKNOWN, asked_at


def events_of(
    rows: list[tuple[str, str, str, int]], catalogue: list[str] | None = None, *, timed: bool = True
) -> Events:
    """Events from (user, type, item, second); items "" are none."""
    users = list(dict.fromkeys(user for user, _, _, _ in rows))
    types = list(dict.fromkeys(kind for _, kind, _, _ in rows))
    items = list(dict.fromkeys(item for _, _, item, _ in rows if item))
    return to_events(
        EventColumns(
            users,
            types,
            items,
            [],
            np.array([users.index(row[0]) for row in rows], np.int64),
            np.array([types.index(row[1]) for row in rows], np.int64),
            np.array([items.index(row[2]) if row[2] else -1 for row in rows], np.int64),
            np.full(len(rows), -1, np.int64),
            np.array([row[3] for row in rows], np.int64) * 1_000_000 if timed else None,
        ),
        catalogue,
    )


def random_events(seed: int, rows: int = 300, *, timed: bool = True) -> Events:
    """Rows of several users in random order, with baskets."""
    rng = np.random.default_rng(seed)
    return events_of(
        [
            (
                f"u{rng.integers(12)}",
                f"t{rng.integers(3)}",
                f"i{rng.integers(9)}",
                int(rng.integers(60)),
            )
            for _ in range(rows)
        ],
        timed=timed,
    )


def histories(targets: Targets) -> list[list[int]]:
    """Row numbers of each context's history."""
    return [list(range(begin, end)) for begin, end in zip(targets.begin, targets.end, strict=True)]


def test_events_are_sorted_by_user_time_and_file_order() -> None:
    events = events_of(
        [("a", "x", "1", 5), ("b", "x", "2", 1), ("a", "y", "3", 2), ("a", "z", "4", 5)]
    )
    names = [events.item_ids[item] for item in events.item]
    assert names == ["3", "1", "4", "2"]
    assert events.first_of_user.tolist() == [0, 3, 4]
    assert events.first_of_basket.tolist() == [0, 1, 3, 4]
    assert events.basket.tolist() == [0, 1, 1, 2]


def test_without_timestamps_the_order_is_the_time_and_each_row_a_basket() -> None:
    events = events_of([("a", "x", "1", 9), ("a", "x", "2", 1)], timed=False)
    assert [events.item_ids[item] for item in events.item] == ["1", "2"]
    assert len(events.first_of_basket) == 3


def test_items_are_looked_up_in_the_catalogue() -> None:
    events = events_of(
        [("a", "x", "1", 1), ("a", "x", "", 2), ("a", "x", "9", 3)], catalogue=["5", "1"]
    )
    assert events.item.tolist() == [1, NONE, UNKNOWN]
    assert events.item_ids == ("5", "1")


@pytest.mark.parametrize("kind", ["time", "leave-one-out", "random", "every"])
@pytest.mark.parametrize("seed", range(5))
def test_no_history_holds_a_target_or_anything_later(kind: SplitKind, seed: int) -> None:
    events = random_events(seed)
    part = split(events, Protocol(kind, 0.2, seed))
    for targets in (part.validation, part.test):
        found = targets.events
        lines = np.flatnonzero(np.isin(targets.row, np.arange(len(targets))))
        assert len(lines) == len(targets.row)
        for row, history in enumerate(histories(targets)):
            user = {int(found.user[at]) for at in history}
            assert len(user) <= 1
            if targets.end[row] < len(found):
                # The first event behind the history begins a new basket or another user.
                assert targets.end[row] in found.first_of_basket


@pytest.mark.parametrize("seed", range(5))
def test_time_split_is_the_first_basket_from_the_cut_on(seed: int) -> None:
    events = random_events(seed)
    part = split(events, Protocol("time", 0.2, seed))
    cut = np.sort(events.timestamp)[int(len(events) * 0.8)]
    expected = {}
    for user in np.unique(events.user):
        own = np.flatnonzero(events.user == user)
        later = own[events.timestamp[own] >= cut]
        if len(later):
            first = events.timestamp[later].min()
            basket = later[events.timestamp[later] == first]
            expected[user] = (
                sorted(events.item[basket].tolist()),
                int((events.timestamp[own] < cut).sum()),
            )
    assert len(part.test) == len(expected)
    for row in range(len(part.test)):
        user = events.user[part.test.end[row]]
        items = sorted(part.test.item[part.test.row == row].tolist())
        assert (items, part.test.end[row] - part.test.begin[row]) == expected[user]
    validation_begin = min(part.validation.events.timestamp[part.validation.end])
    assert part.train.timestamp.max() < validation_begin < cut
    assert part.validation.events.timestamp.max() < cut


def test_leave_one_out_takes_the_last_two_baskets() -> None:
    events = events_of(
        [
            *[("a", "x", str(n), n) for n in range(4)],
            ("a", "x", "7", 3),
            ("b", "x", "8", 1),
            ("b", "x", "9", 2),
            ("c", "x", "5", 1),
        ]
    )
    part = split(events, Protocol("leave-one-out", 0.2, 0))
    ids = events.item_ids
    assert [[ids[i] for i in part.test.item[part.test.row == r]] for r in (0, 1)] == [
        ["3", "7"],
        ["9"],
    ]
    assert [ids[i] for i in part.validation.item] == ["2"]
    assert sorted(ids[i] for i in part.train.item) == ["0", "1", "5", "8"]


def test_random_split_holds_rows_out_and_keeps_true_histories() -> None:
    events = random_events(1, 2_000, timed=False)
    part = split(events, Protocol("random", 0.2, 42))
    assert len(part.test.row) / len(events) == pytest.approx(0.2, abs=0.03)
    used = len(part.train) + len(part.validation.row) + len(part.test.row)
    assert used == len(events)
    # In the test every earlier row of the user counts, other held-out rows among them.
    assert len(part.test.events) == len(events)
    whole = part.test.end - part.test.begin
    position = part.test.end - events.first_of_user[events.user[part.test.end]]
    assert np.array_equal(whole, position)
    again = split(events, Protocol("random", 0.2, 42))
    assert np.array_equal(again.test.end, part.test.end)


def test_every_event_from_the_cut_on_is_a_target_from_its_true_history() -> None:
    events = random_events(4)
    part = split(events, Protocol("every", 0.2, 1))
    cut = np.sort(events.timestamp)[int(len(events) * 0.8)]
    assert len(part.test.row) == (events.timestamp >= cut).sum()
    assert part.validation.events.timestamp.max() < cut
    assert np.array_equal(part.test.as_of, part.test.last_times())
    histories_ = part.test.histories(slice(0, len(part.test)))
    assert np.array_equal(histories_.lengths, part.test.end - part.test.begin)


def test_instants_and_horizon_of_a_time_split() -> None:
    events = random_events(5)
    part = split(events, Protocol("time", test_from=50_000_000, validation_from=40_000_000, seed=1))
    assert (
        part.train.timestamp.max()
        < 40_000_000
        <= part.validation.events.timestamp[part.validation.end].min()
    )
    assert part.validation.events.timestamp.max() < 50_000_000
    away = part.test.as_of - part.test.last_times()
    assert part.horizon > 0
    assert away.min() >= 0
    assert away.max() <= part.horizon
    assert part.test.as_of.max() <= 50_000_000
    late = asked_at(np.array([90, 5]), np.array([10, 9]), 20)
    assert late.tolist() == [30, 9]


@pytest.mark.parametrize("kind", ["time", "leave-one-out", "every"])
def test_held_out_items_stay_in_the_test_alone(kind: SplitKind) -> None:
    events = random_events(6)
    part = split(events, Protocol(kind, 0.2, 3, hold_out=0.3))
    held_out = np.flatnonzero(part.held_out)
    assert len(held_out) == round(0.3 * len(events.item_ids))
    assert not np.isin(part.train.item, held_out).any()
    assert not np.isin(part.validation.item, held_out).any()
    assert not np.isin(part.validation.events.item, held_out).any()
    plain = split(events, Protocol(kind, 0.2, 3))
    assert np.array_equal(part.test.item, plain.test.item)
    assert np.array_equal(part.test.end, plain.test.end)
    assert np.isin(part.test.item, held_out).any()


def test_given_targets_have_all_events_as_history() -> None:
    events = random_events(3)
    wanted = [
        Target("u1", "i3", "t0"),
        Target("nobody", "i1", ""),
        Target("u1", "no such item", "no such type"),
    ]
    part = split(events, Protocol("time", 0.2, 42), wanted)
    of_u1 = events.user == events.user_ids.index("u1")
    assert part.test.end[0] - part.test.begin[0] == of_u1.sum()
    assert part.test.end[1] == part.test.begin[1]
    assert part.test.row.tolist() == [0, 0, 1]
    assert part.test.item[1] == UNKNOWN
    assert part.test.type[1:].tolist() == [UNKNOWN, NONE]
    validation = len(part.validation.events)
    assert validation == len(events)


def test_types_that_training_lacks_become_unknown() -> None:
    events = events_of([("a", "x", "1", 1), ("a", "y", "1", 2), ("a", "z", "1", 3)])
    recoded = events.with_types(["z", "x"])
    assert recoded.type.tolist() == [1, UNKNOWN, 0]
    assert recoded.with_types(["x"]).type.tolist() == [0, UNKNOWN, UNKNOWN]


def test_history_of_is_cut_to_its_last_events_and_marks_unknown_types() -> None:
    events = events_of([("a", t, "1", n) for n, t in enumerate("xxyxy")]).with_types(["x"])
    targets = Targets(
        events,
        np.array([0]),
        np.array([5]),
        np.array([0]),
        np.array([0]),
        np.array([0]),
        np.array([9]),
    )
    batch = history_of(
        targets, slice(0, 1), 3, np.ones((1, 2), np.float32), np.zeros((0, 2), np.float32)
    )
    assert batch.lengths.tolist() == [3]
    assert batch.types.tolist() == [1, 0, 1]
    assert batch.known.all()


@pytest.mark.parametrize(("rows", "share"), [([("a", "x", "1", 1), ("b", "y", "1", 1)], 0.2)])
def test_a_split_without_anything_to_train_on_says_so(
    rows: list[tuple[str, str, str, int]], share: float
) -> None:
    with pytest.raises(InvalidArgumentError, match="2 events of 2 users"):
        split(events_of(rows), Protocol("time", share, 42))


def test_no_events_are_an_error() -> None:
    with pytest.raises(InvalidArgumentError, match="no events"):
        events_of([])


def test_repeat_share_counts_items_of_earlier_baskets_only() -> None:
    events = events_of(
        [
            ("a", "x", "1", 1),
            ("a", "x", "1", 1),  # twice in one basket: no repeat
            ("a", "x", "1", 2),
            ("a", "x", "2", 2),
            ("b", "x", "1", 5),
        ]
    )
    assert repeat_share(events) == pytest.approx(0.5)


def test_default_split_follows_the_columns() -> None:
    assert default_split(random_events(0)) == "time"
    assert default_split(random_events(0, timed=False)) == "leave-one-out"
    assert default_split(events_of([("a", "x", "", 1)])) == "random"


def test_ragged() -> None:
    numbers: NDArray[np.int64] = ragged(np.array([5, 0, 2]), np.array([2, 0, 3]))
    assert numbers.tolist() == [5, 6, 2, 3, 4]

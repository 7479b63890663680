"""No fold sees what it is measured on, whatever the events are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning.data import Events, Targets, to_events
from predictor.learning.search.folds import Fold, FoldKind, default_folds, make_folds
from predictor.learning.splits import SPLITS, Protocol, Split, SplitKind, split

Row = tuple[int, int, int, int]


def events_of(rows: list[Row], *, times: bool = True) -> Events:
    """Of (user, type, item, time); the text number is the row's, so that rows can be told apart."""
    user, type_, item, time = np.array(rows, np.int64).T
    number = np.arange(len(rows))
    return to_events(
        EventColumns(
            [f"u{n}" for n in range(12)], ["a", "b", "c"], [f"i{n}" for n in range(5)],
            [f"row {n}" for n in number], user, type_, item, number, time if times else None,
        )
    )  # fmt: skip


rows_of_events = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 2), st.integers(-1, 4), st.integers(0, 40)),
    min_size=12, max_size=80,
)  # fmt: skip


def folds_of(final: Split, protocol: Protocol, kind: FoldKind, count: int) -> list[Fold]:
    try:
        return make_folds(final, protocol, kind, count)
    except InvalidArgumentError as error:
        if error.reason != "TOO_FEW_EVENTS":
            raise
        reject()


def divided(events: Events, protocol: Protocol) -> Split:
    try:
        return split(events, protocol)
    except InvalidArgumentError:
        reject()


def baskets(targets: Targets) -> Events:
    """The events that are to be predicted."""
    events = targets.events
    return events.subset(np.isin(events.basket, events.basket[targets.end]))


@settings(max_examples=60)
@given(rows_of_events, st.integers(1, 4), st.sampled_from(SPLITS))
def test_time_folds_train_on_nothing_from_their_cut_on(
    rows: list[Row], count: int, kind: SplitKind
) -> None:
    protocol = Protocol(split=kind)
    final = divided(events_of(rows), protocol)
    folds = folds_of(final, protocol, "time", count)
    assert len(folds) == count
    allowed = set(final.validation.events.text.tolist())
    before = -1
    for fold in folds:
        train, measured = fold.part.train, baskets(fold.part.validation)
        # What is trained on holds all that earlier folds were measured on.
        assert before <= train.timestamp.max() < measured.timestamp.min()
        before = measured.timestamp.max()
        assert {*train.text.tolist(), *measured.text.tolist()} <= allowed
        assert len(fold.part.test) == 0


@settings(max_examples=60)
@given(rows_of_events, st.integers(2, 4), st.integers(0, 3), st.booleans())
def test_user_folds_train_on_other_users_alone(
    rows: list[Row], count: int, seed: int, times: bool
) -> None:
    protocol = Protocol(seed=seed)
    events = events_of(rows, times=times)
    final = divided(events, protocol)
    folds = folds_of(final, protocol, "user", count)
    rest = final.validation.events
    measured: list[int] = []
    for fold in folds:
        train, targets = fold.part.train, fold.part.validation
        users = targets.events.user[targets.end].tolist()
        assert not set(users) & set(train.user.tolist())
        measured += users
        for user, end in zip(users, targets.end, strict=True):
            # The history is whole: all that the user did before their last basket.
            own = rest.timestamp[rest.user == user]
            last = targets.events.timestamp[end]
            assert last == own.max()
            history = targets.events.timestamp[targets.begin[users.index(user)] : end]
            assert history.tolist() == own[own < last].tolist()
    assert len(measured) == len(set(measured))
    repeat = folds_of(final, protocol, "user", count)
    assert [fold.name for fold in repeat] == [fold.name for fold in folds]


def test_the_last_time_fold_is_the_division_of_train() -> None:
    rng = np.random.default_rng(0)
    rows = [(int(rng.integers(12)), 0, int(rng.integers(5)), n // 3) for n in range(240)]
    for protocol in (Protocol(), Protocol(validation_from=40), Protocol(split="every")):
        final = split(events_of(rows), protocol)
        last = make_folds(final, protocol, "time", 3)[-1].part
        assert last.train.text.tolist() == final.train.text.tolist()
        assert last.horizon == final.horizon
        for name in ("begin", "end", "row", "item", "as_of"):
            own, other = getattr(last.validation, name), getattr(final.validation, name)
            assert own.tolist() == other.tolist()


def test_folds_know_the_types_of_their_own_training() -> None:
    rows = [(n % 6, 2 if n == 20 else n % 2, n % 5, n) for n in range(60)]
    protocol = Protocol()
    first, *_, last = make_folds(split(events_of(rows), protocol), protocol, "time", 3)
    assert first.part.train.behavior_types == ("a", "b", "c")[: 2 + (20 in first.part.train.text)]
    assert last.part.train.behavior_types == ("a", "b", "c")


def test_what_cannot_be_folded_is_told() -> None:
    rows = [(n % 3, n % 2, n % 5, n) for n in range(60)]
    protocol = Protocol()
    final = split(events_of(rows), protocol)
    assert default_folds(events_of(rows)) == "time"
    assert default_folds(events_of(rows, times=False)) == "user"
    with pytest.raises(InvalidArgumentError, match="two folds at least"):
        make_folds(final, protocol, "user", 1)
    with pytest.raises(InvalidArgumentError, match="3 users do not give 40 folds"):
        make_folds(final, protocol, "user", 40)
    with pytest.raises(InvalidArgumentError, match="do not give 30 folds"):
        make_folds(final, protocol, "time", 30)
    timeless = replace(protocol, split="leave-one-out")
    with pytest.raises(InvalidArgumentError, match="no timestamps"):
        make_folds(split(events_of(rows, times=False), timeless), timeless, "time", 2)

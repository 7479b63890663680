"""Type models on made histories where it is known what there is to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.splits import Protocol, Split, SplitKind, split
from predictor.learning.types import fitting as type_fitting
from predictor.learning.types.fitting import FittedTypes, fit_type_models, given_items
from predictor.learning.types.rules import log_loss
from predictor.learning.types.tables import item_types, own_counts
from predictor.models.history import Histories
from predictor.models.types.tables import ITEM_PRIOR, Floats

USERS, EACH, ITEMS, TYPES = 60, 40, 30, 3


def events_of(*, with_items: bool = True, timed: bool = True, types: int = TYPES) -> Events:
    """Each user has a favourite type for seven of ten events; an item of an even number is had by
    type 0, whoever has it, for eight of ten."""
    rng = np.random.default_rng(0)
    size = USERS * EACH
    user = np.repeat(np.arange(USERS), EACH)
    item = rng.integers(0, ITEMS, size)
    favourite = rng.integers(0, types, USERS)[user]
    type_ = np.where(rng.random(size) < 0.7, favourite, rng.integers(0, types, size))
    if with_items:
        type_ = np.where((item % 2 == 0) & (rng.random(size) < 0.8), 0, type_)
    seconds = np.tile(np.arange(EACH), USERS) * 100 + rng.integers(0, 90, size)
    return to_events(
        EventColumns(
            [f"u{n}" for n in range(USERS)], [f"t{n}" for n in range(types)],
            [f"i{n}" for n in range(ITEMS)] if with_items else [],
            [] if with_items else ["a", "b"],
            user, type_, item if with_items else np.full(size, -1),
            np.full(size, -1) if with_items else item % 2,
            seconds * 1_000_000 if timed else None,
        )
    )  # fmt: skip


def vectors_of(events: Events) -> Floats:
    """Vectors of items that say whether their number is even, and more."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(len(events.item_ids), 8)).astype(np.float32)
    if len(vectors):
        vectors[:, 0] += 4 * (np.arange(len(vectors)) % 2)
    return vectors


def fitted(kind: SplitKind = "every", *, refit: bool = True, **made: bool) -> FittedTypes:
    events = events_of(**made)
    part = split(events, Protocol(kind))
    return fit_type_models(part, vectors_of(events), 1, refit=refit)


def log_loss_of_shares(part: Split) -> float:
    shares = np.bincount(part.train.type, minlength=TYPES) / len(part.train)
    return float(-np.log(shares[part.validation.type]).mean())


@pytest.fixture(scope="module")
def found() -> FittedTypes:
    return fitted()


def test_users_and_items_are_learnt(found: FittedTypes) -> None:
    assert found.next_type is not None
    assert found.item_type is not None
    alone = log_loss_of_shares(split(events_of(), Protocol("every")))
    next_type, item_type = found.report["next_type"], found.report["item_type"]
    assert next_type["log_loss"] < alone - 0.05
    assert item_type["log_loss"] < next_type["log_loss"] - 0.1
    assert item_type["ece"] < 0.1
    assert {"accuracy", "f1", "rounds"} <= item_type.keys()


def test_lines_of_targets_are_answered_from_whole_histories(found: FittedTypes) -> None:
    assert found.item_type is not None
    targets = split(events_of(), Protocol("every")).test
    answers = given_items(found.item_type, targets)
    whole = slice(0, len(targets))
    row, item = targets.row, targets.item
    alike = found.item_type.predict(targets.histories(whole), row, item)
    np.testing.assert_array_equal(answers, alike)
    measured = log_loss(answers, targets.type)
    assert measured < found.report["item_type"]["log_loss"] + 0.1


def test_the_same_seed_gives_the_same_files(found: FittedTypes) -> None:
    again = fitted()
    for one, other in ((found.next_type, again.next_type), (found.item_type, again.item_type)):
        assert one is not None
        assert other is not None
        assert one.files() == other.files()


def test_a_second_fit_knows_the_validation_part(found: FittedTypes) -> None:
    first, second = fitted(refit=False), found
    assert first.report == second.report
    assert first.next_type is not None
    assert second.next_type is not None
    assert second.next_type.table.counts.sum() > first.next_type.table.counts.sum()
    assert second.next_type.rule == first.next_type.rule


@pytest.mark.parametrize("kind", ["every", "leave-one-out", "random"])
def test_without_items_there_is_one_model(kind: SplitKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_fitting, "LEAST_VALIDATION_LINES", 50)
    found = fitted(kind, with_items=False)
    assert found.item_type is None
    assert found.next_type is not None
    assert not found.next_type.table.has_items


def test_without_times_they_are_not_read() -> None:
    found = fitted("random", timed=False)
    assert found.next_type is not None
    one = np.array([1, 1, 0])
    histories = Histories(one, one, np.array([1, 2, 3]), np.array([3]), np.array([3]))
    later = Histories(one, one, np.array([1, 9, 10**9]), np.array([3]), np.array([10**9]))
    np.testing.assert_array_equal(
        found.next_type.predict(histories), found.next_type.predict(later)
    )


def test_one_type_or_too_little_gives_none() -> None:
    events = events_of(types=1)
    assert fit_type_models(split(events, Protocol("every")), vectors_of(events), 1) == FittedTypes()
    events = events_of()
    few = events.subset(events.user < 10)
    assert fit_type_models(split(few, Protocol("every")), vectors_of(few), 1) == FittedTypes()


def test_large_data_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_fitting, "MOST_LINES", 700)
    seen: list[int] = []
    trees = type_fitting._trees

    def counted(learn: type_fitting._Table, *others: Any) -> tuple[str, int, Floats]:
        seen.append(len(learn.true))
        return trees(learn, *others)

    monkeypatch.setattr(type_fitting, "_trees", counted)
    assert fitted().next_type is not None
    assert max(seen) == 700
    monkeypatch.setattr(type_fitting, "MOST_EVENTS", 5_000)
    seen.clear()
    assert fitted().next_type is None  # about 250 lines are too few


def test_a_target_cannot_be_read_off_its_items_counts() -> None:
    events = events_of()
    table, own = item_types(events, vectors_of(events)), own_counts(events)
    at = 17
    mine = (events.user == events.user[at]) & (events.item == events.item[at])
    others = (events.user != events.user[at]) & (events.item == events.item[at])
    assert own[at].tolist() == np.bincount(events.type[mine], minlength=TYPES).tolist()
    seen = table.seen(events.item[at : at + 1], own[at : at + 1])
    counts = np.bincount(events.type[others], minlength=TYPES)
    usual = table.usual[events.item[at]]
    shares = (counts + ITEM_PRIOR * usual) / (counts.sum() + ITEM_PRIOR)
    np.testing.assert_allclose(seen.expected[0], shares, rtol=1e-4)


def test_texts_say_what_is_usual() -> None:
    events = events_of()
    usual = item_types(events, vectors_of(events)).usual
    np.testing.assert_allclose(usual.sum(axis=1), 1, rtol=1e-5)
    assert usual[::2, 0].min() > 0
    assert usual[::2, 0].mean() > usual[1::2, 0].mean()

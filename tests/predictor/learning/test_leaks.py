"""A version is measured only on what it has not learned from."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Target
from predictor.learning import training
from predictor.learning.data import to_events
from predictor.learning.leaks import check_one_division, check_unseen, division, trained_by
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models.version import EncoderConfig

USERS, EVENTS = 12, 10
SECOND = 1_000_000
BEGIN = 1_700_000_000 * SECOND
LINEAGE: dict[str, str | int] = {"events": "events.csv", "events_sha256": "a"}


def dataset(*, times: bool = True, **changes: Any) -> Dataset:
    """Users who do something every ten seconds or less, all at the same time."""
    rng = np.random.default_rng(0)
    size = USERS * EVENTS
    when = BEGIN + np.sort(rng.integers(0, 100, (USERS, EVENTS)), axis=1).ravel() * SECOND
    columns = EventColumns(
        [f"u{n}" for n in range(USERS)], ["view", "buy"], ["i0", "i1"], [],
        np.repeat(np.arange(USERS), EVENTS), np.arange(size) % 2, rng.integers(0, 2, size),
        np.full(size, -1), when if times else None,
    )  # fmt: skip
    given: dict[str, Any] = {"targets": None, "lineage": LINEAGE, **changes}
    return Dataset(
        to_events(columns), np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32),
        EncoderConfig(name="e", pooling="mean", cols=3), item_texts=["", ""],
        sentiment=np.zeros(3, np.float32), **given,
    )  # fmt: skip


def version(
    protocol: Protocol, data: Dataset | None = None, item_ids: tuple[str, ...] = ("i0", "i1")
) -> Any:
    """What a training would tell."""
    data = data or dataset()
    part = training.divide(data, protocol)
    told = training.describe(part, protocol, exclude_history=False)
    reports = {"metrics.json": {"protocol": told}, "lineage.json": {"data": data.lineage}}
    return SimpleNamespace(name="v", item_ids=item_ids, reports=reports)


def check(protocol: Protocol, data: Dataset | None = None, /, **versions: Any) -> dict[str, str]:
    data = data or dataset()
    return check_unseen(versions, data, training.divide(data, protocol), protocol)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Protocol("time"), Protocol("time", seed=1), True),
        (Protocol("time"), Protocol("time", validation_from=7), True),
        (Protocol("time"), Protocol("time", test_share=0.3), False),
        (Protocol("time", test_from=5), Protocol("time", 0.3, test_from=5), True),
        (Protocol("time", test_from=5), Protocol("time", test_from=6), False),
        (Protocol("time"), Protocol("every"), False),
        (Protocol("random"), Protocol("random", seed=1), False),
        (Protocol("leave-one-out"), Protocol("leave-one-out", 0.5, 1), True),
        (Protocol("time", hold_out=0.1), Protocol("time", hold_out=0.2), False),
        (Protocol("time", hold_out=0.1), Protocol("time", hold_out=0.1, seed=1), False),
    ],
)
def test_only_what_decides_the_test_part_makes_another_division(
    one: Protocol, other: Protocol, same: bool
) -> None:
    assert (division(one) == division(other)) is same


def test_a_protocol_is_read_back() -> None:
    protocol = Protocol("every", 0.4, 3, test_from=BEGIN + 70 * SECOND)
    assert trained_by(version(protocol)) == protocol


@pytest.mark.parametrize(
    "told", [None, [], {"split": "time"}, {**asdict(Protocol()), "split": "elsewhere"}]
)
def test_a_version_that_does_not_tell_its_protocol_is_refused(told: object) -> None:
    odd: Any = SimpleNamespace(name="odd", reports={"metrics.json": {"protocol": told}})
    with pytest.raises(InvalidArgumentError, match=r"version odd: .* does not say"):
        trained_by(odd)


def test_versions_of_several_divisions_are_named() -> None:
    early, late = version(Protocol("time", 0.4)), version(Protocol("time", 0.2))
    check_one_division({"a": early, "b": early})
    with pytest.raises(InvalidArgumentError, match=r"b was .*\(test_share 0.2\), but a .* 0.4"):
        check_one_division({"a": early, "b": late})


@given(st.integers(20, 95), st.integers(20, 95), st.sampled_from(["time", "every"]))
def test_who_has_seen_a_target_is_refused_and_nobody_else(own: int, here: int, kind: Any) -> None:
    data = dataset()
    trained, asked = (Protocol(kind, test_from=BEGIN + at * SECOND) for at in (own, here))
    try:
        known, part = training.divide(data, trained), training.divide(data, asked)
    except InvalidArgumentError:  # too little is left
        assume(False)
    # Read in another way than describe does: times of all lines that were learned or chosen from.
    validation = known.validation.events.timestamp[known.validation.end]
    seen = max(known.train.timestamp.max(), validation.max())
    unseen = seen < part.test.events.timestamp[part.test.end].min()
    found = version(trained, data)
    if own == here or unseen:
        assert set(check(asked, data, v=found)) == {"v"}
    else:
        with pytest.raises(InvalidArgumentError, match="v has learned from events up to 2023-11-"):
            check(asked, data, v=found)


def test_the_same_division_of_other_data_goes_by_times() -> None:
    protocol = Protocol("time", 0.3)
    other = version(protocol, dataset(lineage={"events_sha256": "b"}))
    assert "has learned from events up to" in check(protocol, v=other)["v"]
    del other.reports["metrics.json"]["protocol"]["last_validation_event"]
    with pytest.raises(InvalidArgumentError, match="does not say up to when"):
        check(protocol, v=other)


def test_without_times_only_the_same_division_may_be() -> None:
    data = dataset(times=False)
    own = Protocol("leave-one-out")
    assert check(own, data, v=version(own, data)) == {"v": "trained by this division of these data"}
    other = version(own, dataset(times=False, lineage={"events_sha256": "b"}))
    assert check(own, data, v=other)["v"].startswith("NOT CHECKED")
    with pytest.raises(InvalidArgumentError, match="v was trained with split random"):
        check(own, data, v=version(Protocol("random"), data))


def test_held_out_items_must_be_the_same() -> None:
    protocol = Protocol("time", 0.3, hold_out=0.5)
    cold = version(protocol)
    assert set(check(protocol, first=cold, second=cold)) == {"first", "second"}
    for warm in (version(Protocol("time", 0.3)), version(protocol, item_ids=("i1", "i0"))):
        with pytest.raises(InvalidArgumentError, match="second was not trained without the items"):
            check(protocol, first=cold, second=warm)


def test_targets_of_a_file_come_after_all_events() -> None:
    targets = [Target("u1", "i1", "buy")]
    data = dataset(targets=targets, lineage={**LINEAGE, "targets_sha256": "t"})
    trained = version(Protocol("time", 0.3))
    assert "before the test part" in check(Protocol("time", 0.2), data, v=trained)["v"]
    late = version(Protocol("time", 0.3))
    late.reports["metrics.json"]["protocol"]["last_event"] = "2033-01-01T00:00:00+00:00"
    with pytest.raises(InvalidArgumentError, match="events up to 2033-01-01"):
        check(Protocol("time", 0.2), data, v=late)

"""What a finding costs: shares by hand, and differences beside a set that never had the events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Target
from predictor.learning.data import to_events
from predictor.learning.measures.baselines import popular
from predictor.learning.measures.evaluation import measure_types
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.measures.type_baselines import decayed_shares
from predictor.learning.quality.costs import Changes, Cost, Costs, measure_costs
from predictor.learning.quality.inspection import Inspection, inspect
from predictor.learning.splits import Protocol, split

SECOND = 1_000_000
DAY = 86_400 * SECOND
BEGIN = 1_700_000_000 * SECOND
NOW = BEGIN + 1_000 * DAY
USERS, DAYS = 60, 10
CUT = BEGIN + 8 * DAY
PROTOCOL = Protocol(split="time", test_from=CUT, validation_from=BEGIN + 6 * DAY)
FLOOD = 300


def shop(seed: int = 0) -> EventColumns:
    """Users with one event a day; popular items come first, and users have a favourite type."""
    rng = np.random.default_rng(seed)
    user = np.tile(np.arange(USERS), DAYS)
    day = np.repeat(np.arange(DAYS), USERS)
    item = np.minimum(rng.geometric(0.1, len(user)) - 1, 39)
    kind = np.where(rng.random(len(user)) < 0.8, user % 3, rng.integers(0, 3, len(user)))
    time = BEGIN + day * DAY + (user * 7 + rng.integers(0, 7, len(user))) * SECOND
    return EventColumns(
        [f"u{n}" for n in range(USERS)], ["view", "cart", "buy"], [f"i{n}" for n in range(40)], [],
        user, kind, item, np.full(len(user), -1), time,
    )  # fmt: skip


def with_rows(columns: EventColumns, user: int, item: int, times: list[int]) -> EventColumns:
    """The same, and views of one item by one user at some times."""
    more = len(times)
    added = {
        "user": np.full(more, user), "behavior_type": np.zeros(more, np.int64),
        "item": np.full(more, item), "text": np.full(more, -1), "timestamp": np.array(times),
    }  # fmt: skip
    return replace(
        columns,
        **{name: np.append(getattr(columns, name), added[name]) for name in added},  # type: ignore[arg-type]
    )


def flooded() -> EventColumns:
    """The shop, and a second of u0 long before the cut, in which one rare item is seen often."""
    at = BEGIN + 2 * DAY + 40_000 * SECOND
    return with_rows(shop(), 0, 39, [at + n * 1_000 for n in range(FLOOD)])


def costs_of(columns: EventColumns, protocol: Protocol = PROTOCOL) -> tuple[Inspection, Costs]:
    found = inspect(columns, None, {}, NOW)
    return found, measure_costs(found, protocol, None)


def of(name: str, found: Inspection, costs: Costs) -> Cost:
    names = [finding.name for finding in found.findings]
    cost = costs.by_finding[names.index(name)]
    assert cost is not None
    return cost


def test_a_cost_is_the_difference_to_a_set_that_never_had_the_events() -> None:
    found, costs = costs_of(flooded())
    cost = of("bursts", found, costs)
    before = USERS * 6  # an event a day, until the validation part
    assert cost.train_share == pytest.approx(FLOOD / (FLOOD + before))
    assert cost.target_share == 0
    assert cost.contexts == USERS
    part = split(to_events(shop()), PROTOCOL)
    items = item_metrics(
        popular(part.train), part.test, np.ones(40, np.bool_), exclude_history=False
    )
    types = measure_types(decayed_shares(part.train), part.test)
    assert cost.without == {
        "popular NDCG@10": pytest.approx(items["ndcg_at_10"]),
        "decayed shares accuracy": pytest.approx(types["accuracy"]),
        "decayed shares log loss": pytest.approx(types["log_loss"]),
    }
    # One of the ten places of every list goes to an item that hardly anybody has.
    assert cost.ignored["popular NDCG@10"] < cost.without["popular NDCG@10"]


def test_the_targets_stay_and_those_of_the_finding_are_not_measured() -> None:
    at = CUT + 500 * SECOND  # in the first day of the test, behind u1's own event there
    found, costs = costs_of(with_rows(flooded(), 1, 39, [at] * FLOOD))
    cost = of("bursts", found, costs)
    assert cost.target_share == 0  # u1's first basket is another
    at = CUT - DAY + 600 * SECOND  # before it: the history of u1 gets longer, the targets stay
    found, costs = costs_of(with_rows(flooded(), 1, 39, [at] * FLOOD))
    assert of("bursts", found, costs).contexts == USERS
    columns = flooded()
    assert columns.timestamp is not None
    last = int(columns.timestamp[(columns.user == 1) & (columns.timestamp >= CUT)].min())
    found, costs = costs_of(with_rows(columns, 1, 39, [last + n for n in range(FLOOD)]))
    cost = of("bursts", found, costs)
    # The flood's first event is at the instant of u1's target, and so a line of it.
    assert cost.target_share == pytest.approx(2 / (USERS + 1))  # the second holds u1's own too
    assert cost.contexts == USERS - 1


def test_what_cleaning_does_to_the_targets_is_counted() -> None:
    columns = flooded()
    assert columns.timestamp is not None
    mine = (columns.user == 1) & (columns.timestamp >= CUT)
    last = int(columns.timestamp[mine].min())
    _, costs = costs_of(with_rows(columns, 1, 39, [last + n for n in range(FLOOD)]))
    assert costs.changes == Changes(
        lines=USERS + 1, lines_dropped=2, contexts=USERS, contexts_dropped=1,
        histories_changed=1, contexts_after=USERS,
    )  # fmt: skip
    _, costs = costs_of(shop())
    assert costs.changes is None


@pytest.mark.parametrize("kind", ["every", "random", "leave-one-out", "time"])
def test_shares_are_counted_in_every_division(kind: str) -> None:
    columns = flooded()
    protocol = Protocol(split=kind)  # type: ignore[arg-type]
    found, costs = costs_of(columns, protocol)
    cost = of("bursts", found, costs)
    # Counted anew: the flood's item is seen by no other.
    lone = replace(columns, item=np.where(found.droppable, 40, columns.item),
                   item_ids=[*columns.item_ids, "lone"])  # fmt: skip
    part = split(to_events(lone), protocol)
    assert cost.train_share == pytest.approx((part.train.item == 40).mean())
    assert cost.target_share == pytest.approx((part.test.item == 40).mean())


def test_targets_from_a_file_have_no_share_and_are_measured() -> None:
    found = inspect(flooded(), None, {}, NOW)
    targets = [Target(f"u{n}", f"i{n % 5}", "buy") for n in range(USERS)]
    costs = measure_costs(found, replace(PROTOCOL, test_from=None), targets)
    cost = of("bursts", found, costs)
    assert cost.target_share is None
    assert cost.contexts == USERS
    assert cost.without["decayed shares accuracy"] > 0
    assert costs.changes is None


def test_little_is_not_measured() -> None:
    flood = [BEGIN + 2 * DAY + 40_000 * SECOND] * 100
    few = of("bursts", *costs_of(with_rows(shop(), 0, 39, flood)))
    assert few.ignored
    # The same beside 240,000 other events of a user.
    others = with_rows(shop(), 0, 39, flood)
    spread = np.linspace(0, 6 * DAY, 240_000, endpoint=False)
    others = with_rows(others, 0, 1, (BEGIN + spread).astype(np.int64).tolist())
    few = of("bursts", *costs_of(others))
    assert 0 < few.train_share < 0.001
    assert few.ignored == {}


def test_data_that_cannot_be_divided_are_refused() -> None:
    columns = replace(shop(), timestamp=np.full(USERS * DAYS, BEGIN))
    with pytest.raises(InvalidArgumentError, match="time split"):
        costs_of(columns, Protocol(split="time"))

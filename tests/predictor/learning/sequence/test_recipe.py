"""What is derived from the data."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.sequence.recipe import FULL_SOFTMAX_ITEMS, FitConfig, Recipe, resolve


def events_of(items_of_users: list[list[int]], catalogue: int, *, times: bool = True) -> Events:
    user = np.repeat(np.arange(len(items_of_users)), [len(items) for items in items_of_users])
    item = np.concatenate([np.array(items, np.int64) for items in items_of_users])
    none = np.full(len(user), -1)
    time = np.arange(len(user)) * 1_000_000 if times else None
    users = [f"u{number}" for number in range(len(items_of_users))]
    return to_events(
        EventColumns(
            users, ["x"], [f"i{number}" for number in range(catalogue)], [], user, none + 1, item,
            none, time,
        )
    )  # fmt: skip


def test_the_caller_and_the_recipe_speak_of_the_same() -> None:
    names = [field.name for field in fields(FitConfig)]
    names.remove("features")  # of the classic models
    assert names == [field.name for field in fields(Recipe)]


def test_repeats_lead_to_traces() -> None:
    shop = resolve(FitConfig(), events_of([[0, 1, 0, 1, 0]] * 3, 5))
    other = resolve(FitConfig(), events_of([[0, 1, 2, 3, 4]] * 3, 5))
    assert (shop.traces, other.traces) == (True, False)


def test_what_is_said_stands() -> None:
    given = FitConfig(model_type="gru", dims=48, negatives=7, terms=False, dropout=0.0, seed=3)
    found = asdict(resolve(given, events_of([[0, 1, 2]], 5)))
    said = {name: value for name, value in asdict(given).items() if value is not None}
    assert {name: found[name] for name in said} == said


def test_history_length_follows_the_histories() -> None:
    short = resolve(FitConfig(), events_of([list(range(9))] * 3, 300))
    long = resolve(FitConfig(), events_of([list(range(90))] * 3, 300))
    assert short.history_length < long.history_length


def test_large_catalogues_are_sampled() -> None:
    small = resolve(FitConfig(), events_of([[0, 1, 2]], 5))
    large = resolve(FitConfig(), events_of([[0, 1, 2]], FULL_SOFTMAX_ITEMS + 1))
    assert small.negatives == 0
    assert large.negatives >= 256


def test_without_times_no_time_is_learned() -> None:
    assert resolve(FitConfig(), events_of([[0, 1, 2]], 5)).gap_weight > 0
    without = events_of([[0, 1, 2]], 5, times=False)
    assert resolve(FitConfig(), without).gap_weight == 0
    with pytest.raises(InvalidArgumentError, match="no timestamps") as caught:
        resolve(FitConfig(clock=True), without)
    assert caught.value.field == "clock"


def test_two_towers_share_many_dimensions_only() -> None:
    events = events_of([[0, 1, 2]], 5)
    found = [
        (recipe.towers, recipe.heads)
        for recipe in (resolve(FitConfig(dims=dims), events) for dims in (256, 64, 257))
    ]
    assert found == [(2, 2), (1, 2), (1, 1)]
    assert resolve(FitConfig(dims=8, towers=4), events).towers == 4


@pytest.mark.parametrize(
    ("dims", "hidden", "towers"), [(256, 256, 3), (9, 8, 2), (8, 9, 2), (8, 8, 0)]
)
def test_towers_share_evenly(dims: int, hidden: int, towers: int) -> None:
    config = FitConfig(dims=dims, hidden=hidden, towers=towers)
    with pytest.raises(InvalidArgumentError, match=f"^{towers} towers cannot share {dims} dims"):
        resolve(config, events_of([[0, 1, 2]], 5))

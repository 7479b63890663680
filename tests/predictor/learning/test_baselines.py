"""Baselines on histories where the answer can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.importing import EventColumns, Target
from predictor.learning.baselines import item_baselines
from predictor.learning.data import Events, given_targets, to_events
from predictor.learning.metrics import Floats, ItemScorer
from predictor.learning.type_baselines import type_baselines
from predictor.learning.type_metrics import TypeScorer

ROWS = [
    # user, second, item, type
    ("a", 1, 0, 0), ("a", 1, 1, 0), ("a", 2, 2, 1), ("a", 3, 0, 1),
    ("b", 1, 0, 0), ("b", 2, 2, 1), ("b", 3, 2, 1), ("b", 4, 3, 0),
]  # fmt: skip
"""Items 0: 3 events, 1: 1, 2: 3, 3: 1, 4: none."""


@pytest.fixture
def train() -> Events:
    users, seconds, items, types = (np.array(column) for column in zip(*ROWS, strict=True))
    return to_events(
        EventColumns(
            ["a", "b"], ["x", "y"], [str(n) for n in range(5)], [],
            (users == "b").astype(np.int64), types, items, np.full(len(ROWS), -1),
            seconds * 1_000_000,
        )
    )  # fmt: skip


def scores(scorer: ItemScorer | TypeScorer, train: Events, user: str) -> Floats:
    found: Floats = scorer(given_targets(train, [Target(user, "0", "x")]), slice(0, 1))[0]
    return found


def test_popular_counts_events(train: Events) -> None:
    assert scores(item_baselines(train)["popular"], train, "a").tolist() == [3, 1, 3, 1, 0]


def test_personal_frequency_counts_the_users_own_and_breaks_ties_by_popularity(
    train: Events,
) -> None:
    found = scores(item_baselines(train)["personal_frequency"], train, "a")
    assert found.argsort()[::-1].tolist()[:3] == [0, 2, 1]
    assert np.floor(found).tolist() == [2, 1, 1, 0, 0]


def test_markov_follows_the_last_basket(train: Events) -> None:
    scorer = item_baselines(train)["markov"]
    # Baskets with item 0 that have a next one: {0,1} -> {2} and {0} -> {2}.
    assert np.round(scores(scorer, train, "a"), 1).tolist() == [0, 0, 1, 0, 0]
    # Item 3 was never followed by anything: popularity orders.
    assert scores(scorer, train, "b").argmax() in (0, 2)
    assert scores(scorer, train, "b").max() < 0.1


def test_a_user_without_history_gets_what_is_popular(train: Events) -> None:
    for name, scorer in item_baselines(train).items():
        found = scores(scorer, train, "nobody")
        assert set(found.argsort()[-2:].tolist()) == {0, 2}, name
        assert found.argmin() == 4, name


def test_type_baselines_give_distributions(train: Events) -> None:
    for name, scorer in type_baselines(train).items():
        for user in ("a", "b", "nobody"):
            found = scores(scorer, train, user)
            assert found.sum() == pytest.approx(1), name
            assert found.min() > 0, name


def test_repeat_last_and_markov_look_at_the_last_type(train: Events) -> None:
    found = type_baselines(train)
    # Within training x -> y twice (of three lines), y -> y twice, y -> x once.
    assert scores(found["markov"], train, "a").tolist() == pytest.approx([2 / 5, 3 / 5])
    repeated = 2 / 5 + 1 / 35  # (2 of 5 + 1) / (5 + 2)
    assert scores(found["repeat_last"], train, "a")[1] == pytest.approx(repeated)
    assert scores(found["repeat_last"], train, "b")[0] == pytest.approx(repeated)
    assert scores(found["majority"], train, "a").tolist() == pytest.approx([0.5, 0.5])

"""Baselines on histories where the answer can be counted by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from foretell.importing import EventColumns, Target
from predictor.learning.data import Events, given_targets, to_events
from predictor.learning.measures import baselines
from predictor.learning.measures.baselines import item_baselines
from predictor.learning.measures.metrics import Floats, ItemScorer
from predictor.learning.measures.type_baselines import type_baselines
from predictor.learning.measures.type_metrics import TypeScorer

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


DAY = 86_400_000_000


def history(
    rows: Sequence[tuple[str, float, int]], *, times: bool = True, items: int = 6
) -> Events:
    """Events (user, day, item); without times in the order of the rows."""
    users = sorted({user for user, _, _ in rows})
    nothing = np.zeros(len(rows), np.int64)
    return to_events(
        EventColumns(
            users, ["x"], [str(n) for n in range(items)], [],
            np.array([users.index(user) for user, _, _ in rows]), nothing,
            np.array([item for _, _, item in rows]), nothing - 1,
            np.array([int(day * DAY) for _, day, _ in rows]) if times else None,
        ),
        [str(n) for n in range(items)],
    )  # fmt: skip


def order(scorer: ItemScorer, train: Events, user: str) -> list[int]:
    """Items, best first."""
    order_: list[int] = np.argsort(-scores(scorer, train, user), kind="stable").tolist()
    return order_


def test_recent_popular_counts_four_weeks() -> None:
    rows = [("a", day, 0) for day in range(5)] + [("a", 60, 1), ("b", 50, 1), ("b", 61, 2)]
    train = history(rows)
    found = scores(baselines.recent_popular(train), train, "a")
    assert np.floor(found).tolist() == [0, 2, 1, 0, 0, 0]
    assert found[0] > found[3]  # ties by popularity


def test_recent_popular_without_times_counts_everyones_last_events() -> None:
    rows = [("a", 0, n % 3) for n in range(19)] + [("a", 0, 4), ("b", 0, 5)]
    found = scores(baselines.recent_popular(history(rows, times=False)), history(rows), "a")
    assert np.floor(found).tolist() == [1, 0, 0, 0, 1, 1]


def test_decayed_frequency_forgets() -> None:
    # Item 0 three times a year ago, item 1 twice now; 2 and 3 are others', 3 more often.
    rows = [("a", 0, 0), ("a", 1, 0), ("a", 2, 0), ("a", 365, 1), ("a", 366, 1)]
    train = history([*rows, ("b", 1, 2), ("b", 2, 3), ("b", 3, 3)])
    assert order(baselines.personal_frequency(train), train, "a")[:4] == [0, 1, 3, 2]
    assert order(baselines.decayed_frequency(train), train, "a")[:4] == [1, 0, 3, 2]
    slow = baselines.decayed_frequency(train, days=5_000)
    assert order(slow, train, "a")[:4] == [0, 1, 3, 2]


def test_decayed_frequency_tells_weights_apart_that_float32_could_not() -> None:
    # Half-lives of a day: the oldest of 400 days weigh 2^-400.
    rows = [("a", day, item) for day, item in ((0, 0), (1, 1), (2, 2), (400, 3))]
    train = history(rows)
    assert order(baselines.decayed_frequency(train, days=1), train, "a")[:4] == [3, 2, 1, 0]


def test_decayed_frequency_without_times_counts_baskets() -> None:
    rows = [("a", 0, 0)] * 2 + [("a", 0, 1)] * 60 + [("a", 0, 2)]
    train = history(rows, times=False)
    found = baselines.decayed_frequency(train)
    assert order(found, train, "a")[:3] == [1, 2, 0]


def test_tifu_knn_borrows_from_similar_users() -> None:
    likes = [("a", 1, 0), ("a", 2, 1)]
    similar = [("b", 1, 0), ("b", 2, 1), ("b", 3, 2)]
    others = [("c", day, 3) for day in range(9)]
    train = history([*likes, *similar, *others])
    found = scores(baselines.tifu_knn(train), train, "a")
    # The own items lead; then what the similar user had, not what is popular.
    assert order(baselines.tifu_knn(train), train, "a")[:4] == [1, 0, 2, 3]
    assert found[3] < 1e-8


def test_tifu_knn_does_not_count_the_user_as_a_neighbour_of_their_own() -> None:
    train = history([("a", 1, 0), ("b", 1, 1)])
    assert scores(baselines.tifu_knn(train), train, "a")[0] == pytest.approx(1)


def test_item_knn_is_the_weighted_cosine() -> None:
    train = history([("a", 1, 0), ("a", 2, 1), ("b", 1, 0), ("b", 2, 1), ("b", 3, 2), ("c", 1, 3)])
    asked = history([("z", 1, 0)])
    found = scores(baselines.item_knn(train), asked, "z")
    root = np.sqrt([2.0, 3.0])  # of the items that a and b had
    largest = (1 / root).sum() / 2
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[2] == pytest.approx(1 / root[1] / np.sqrt(2) / largest, abs=1e-5)
    assert found[3] < 1e-5


def test_content_is_the_cosine_with_the_latest_text() -> None:
    vectors = np.array([[2, 0], [1, 1], [0, 3], [-1, 0], [0, 0], [5, 0]], np.float32)
    train = history([("a", 1, 2), ("a", 2, 0)])
    found = scores(baselines.content(train, vectors), train, "a")
    assert found == pytest.approx([1, np.sqrt(0.5), 0, -1, 0, 1], abs=1e-5)


def test_content_needs_texts() -> None:
    train = history([("a", 1, 0), ("b", 1, 1)])
    assert "content" not in item_baselines(train)
    assert "content" not in item_baselines(train, np.zeros((6, 3), np.float32))
    assert "content" in item_baselines(train, np.ones((6, 3), np.float32))


def test_many_contexts_score_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{rng.integers(9)}", int(day), int(rng.integers(6))) for day in range(200)]
    train = history(rows)
    vectors = rng.standard_normal((6, 4)).astype(np.float32)
    asked = given_targets(train, [Target(f"u{n}", "0", "x") for n in (3, 99, 0, 7)])
    for name, scorer in (item_baselines(train, vectors) | type_baselines(train)).items():
        together = scorer(asked, slice(0, 4))
        alone = [scorer(asked, slice(n, n + 1))[0] for n in range(4)]
        assert np.asarray(together) == pytest.approx(np.stack(alone), rel=1e-5, abs=1e-7), name


def test_decayed_shares_halve_every_four_events(train: Events) -> None:
    # The user a did x, x, y, y; from the last event back: ages 0 to 3.
    weights = np.exp2(-np.arange(4) / 4)
    own = np.array([weights[2:].sum(), weights[:2].sum()])
    prior = np.array([0.5, 0.5])
    expected = (own + prior) / (own.sum() + 1)
    assert scores(type_baselines(train)["decayed_shares"], train, "a") == pytest.approx(expected)
    assert scores(type_baselines(train)["decayed_shares"], train, "nobody") == pytest.approx(prior)

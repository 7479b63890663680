"""Measures of lists against small cases worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from foretell.importing import EventColumns
from predictor.learning.data import Targets, to_events
from predictor.learning.measures.metrics import (
    ItemScorer,
    best_items,
    calibration_ratio,
    item_hits,
    item_metrics,
    ranked_candidates,
    recall_by_history,
    recall_by_popularity,
)
from predictor.models.history import NONE, UNKNOWN

ITEMS = 20


def targets(baskets: list[list[int]], histories: list[list[int]] | None = None) -> Targets:
    """One context per basket, with a history of these items."""
    histories = histories or [[0] for _ in baskets]
    lengths = [len(history) for history in histories]
    user = np.repeat(np.arange(len(histories)), lengths)
    item = np.concatenate([np.array(history, np.int64) for history in histories])
    columns = EventColumns(
        [f"u{n}" for n in range(len(histories))], ["buy"], [f"i{n}" for n in range(ITEMS)], [],
        user, np.zeros_like(user), item, np.full_like(user, -1), None,
    )  # fmt: skip
    events = to_events(columns, [f"i{n}" for n in range(ITEMS)])
    sizes = [len(basket) for basket in baskets]
    lines = np.array([i for basket in baskets for i in basket], np.int64)
    return Targets(
        events,
        events.first_of_user[:-1],
        events.first_of_user[1:],
        np.repeat(np.arange(len(baskets)), sizes),
        lines,
        np.full(len(lines), -1),
        np.zeros(len(baskets), np.int64),
    )


def fixed(scores: list[list[float]]) -> ItemScorer:
    matrix = np.array(scores, np.float32)
    return lambda _, rows: matrix[rows]


WARM: NDArray[np.bool_] = np.ones(ITEMS, np.bool_)
FALLING = [float(ITEMS - n) for n in range(ITEMS)]
"""Item n has rank n + 1."""


def test_hits_recall_and_ndcg_of_a_basket() -> None:
    metrics = item_metrics(fixed([FALLING]), targets([[0, 2, 15, 2]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(2 / 3)  # a line that comes twice counts once
    assert metrics["recall_at_10"] == pytest.approx(2 / 3)
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert metrics["ndcg_at_10"] == pytest.approx((1 + 1 / 2) / ideal)
    assert metrics["coverage_at_10"] == pytest.approx(0.5)
    assert metrics["contexts"] == 1


def test_hits_divide_by_ten_where_a_basket_is_larger() -> None:
    metrics = item_metrics(
        fixed([FALLING]), targets([list(range(ITEMS))]), WARM, exclude_history=False
    )
    assert metrics["hits_at_10"] == pytest.approx(1.0)
    assert metrics["recall_at_10"] == pytest.approx(0.5)
    assert metrics["ndcg_at_10"] == pytest.approx(1.0)


def test_constant_scores_hit_nothing() -> None:
    metrics = item_metrics(fixed([[1.0] * ITEMS]), targets([[0, 1]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 0


def test_a_tie_counts_against_the_target() -> None:
    scores = [*FALLING[:9], *[5.0] * (ITEMS - 9)]  # nine above, eleven tied for rank ten
    metrics = item_metrics(fixed([scores]), targets([[9], [8]][:1]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 0
    metrics = item_metrics(fixed([scores]), targets([[8]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 1


def test_an_unknown_item_is_a_miss_and_counts_in_the_size() -> None:
    metrics = item_metrics(fixed([FALLING]), targets([[0, UNKNOWN]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(0.5)
    assert metrics["cold_targets"] == 1


def test_warm_and_cold_targets_are_told_apart() -> None:
    warm = WARM.copy()
    warm[[1, 15]] = False
    metrics = item_metrics(fixed([FALLING]), targets([[0, 1, 15, 16]]), warm, exclude_history=False)
    assert metrics["warm_recall_at_10"] == pytest.approx(0.5)
    assert metrics["cold_recall_at_10"] == pytest.approx(0.5)
    assert (metrics["warm_targets"], metrics["cold_targets"]) == (2, 2)


def test_excluded_history_is_neither_ranked_nor_a_target() -> None:
    asked = targets([[0, 10], [1]], [[0, 3], [1]])
    scorer = fixed([FALLING, FALLING])
    allowed = item_metrics(scorer, asked, WARM, exclude_history=False)
    assert allowed["contexts"] == 2
    metrics = item_metrics(scorer, asked, WARM, exclude_history=True)
    # Of the first basket item 10 is left, which two excluded items lift to rank nine.
    assert metrics["contexts"] == 1
    assert metrics["hits_at_10"] == 1


def test_more_contexts_than_a_batch() -> None:
    count = 600
    scorer: ItemScorer = lambda _, rows: np.tile(  # noqa: E731
        np.array(FALLING, np.float32), (rows.stop - rows.start, 1)
    )
    baskets = [[0] if n % 3 == 0 else [19] for n in range(count)]
    metrics = item_metrics(scorer, targets(baskets), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(1 / 3)
    assert metrics["contexts"] == count


def test_what_each_context_hit_is_kept() -> None:
    asked = targets([[0, 15], [], [19], [3, UNKNOWN]], [[0], [1, 2], [4, 4, 5], [6]])
    found = item_hits(fixed([FALLING] * 4), asked, exclude_history=False)
    assert found.context.tolist() == [0, 2, 3]  # the second has no target
    assert found.user.tolist() == [0, 2, 3]
    assert found.history_length.tolist() == [1, 3, 1]
    assert found.size.tolist() == [2, 1, 2]
    assert found.hits.tolist() == [1, 0, 1]
    assert found.share_of_best.tolist() == [0.5, 0, 0.5]
    hit = dict(zip(found.target_item.tolist(), found.target_hit.tolist(), strict=True))
    assert hit == {0: True, 15: False, 19: False, 3: True, UNKNOWN: False}
    assert found.target_row.tolist() == [0, 0, 1, 2, 2]
    assert found.top.tolist() == [list(range(10))] * 3
    assert found.top_score[0].tolist() == FALLING[:10]
    assert np.argwhere(found.top_hit).tolist() == [[0, 0], [2, 3]]


def test_longer_lists_change_no_measure() -> None:
    asked = targets([[0, 11], [12]])
    scorer = fixed([FALLING, FALLING])
    short = item_hits(scorer, asked, exclude_history=False)
    long = item_hits(scorer, asked, exclude_history=False, returned=15)
    assert long.metrics(WARM) == short.metrics(WARM)
    assert long.top.shape == (2, 15)
    assert np.argwhere(long.top_hit).tolist() == [[0, 0], [0, 11], [1, 12]]


def test_candidates_are_ranked_and_nothing_else_is_hit() -> None:
    asked = targets([[2, 3], [0], [1]])
    scorer = ranked_candidates(
        np.array([0, 0, 2]), np.array([3, 7, 1]), np.array([-5, 2, -9], np.float32), ITEMS
    )
    found = item_hits(scorer, asked, exclude_history=False)
    assert found.hits.tolist() == [1, 0, 1]
    assert found.top[:, :3].tolist() == [[7, 3, NONE], [NONE] * 3, [1, NONE, NONE]]
    assert found.metrics(WARM)["coverage_at_10"] == pytest.approx(3 / ITEMS)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_hits_are_those_of_a_plain_sort(data: st.DataObject) -> None:
    """Against the definition: an item's rank is how many score as high or higher."""
    item = st.integers(0, ITEMS - 1)
    baskets = data.draw(st.lists(st.lists(item, max_size=5), min_size=1, max_size=4))
    histories = [data.draw(st.lists(item, min_size=1, max_size=4)) for _ in baskets]
    level = st.sampled_from([-np.inf, 0.0, 1.0, 2.0, 3.0])
    scores = [data.draw(st.lists(level, min_size=ITEMS, max_size=ITEMS)) for _ in baskets]
    exclude = data.draw(st.booleans())
    found = item_hits(fixed(scores), targets(baskets, histories), exclude_history=exclude)
    measured = dict(zip(found.context.tolist(), found.hits.tolist(), strict=True))
    for context, (basket, history, row) in enumerate(zip(baskets, histories, scores, strict=True)):
        left = set(basket) - (set(history) if exclude else set())
        shown = [-np.inf if exclude and n in history else value for n, value in enumerate(row)]
        rank = {item: sum(other >= shown[item] for other in shown) for item in left}
        hit = sum(rank[item] <= 10 and np.isfinite(shown[item]) for item in left)
        assert measured.get(context) == (hit if left else None)


def test_the_best_items_of_few_and_of_none() -> None:
    scores = np.array([[1, 3, -np.inf], [-np.inf, -np.inf, 2]], np.float32)
    items, best = best_items(scores, 5)
    assert items.tolist() == [[1, 0, NONE, NONE, NONE], [2, NONE, NONE, NONE, NONE]]
    assert best[:, 0].tolist() == [3, 2]
    assert best_items(np.zeros((2, 0), np.float32), 3)[0].tolist() == [[NONE] * 3] * 2


def test_predicted_over_observed_hits_of_the_ten_returned() -> None:
    found = item_hits(
        fixed([FALLING, FALLING]), targets([[0, 1, 12], [2]]), exclude_history=False, returned=15
    )
    probabilities = np.full((2, 15), 0.2, np.float32)
    assert calibration_ratio(probabilities, found) == pytest.approx(4 / 3)
    missed = item_hits(fixed([FALLING]), targets([[19]]), exclude_history=False)
    assert calibration_ratio(np.ones((1, 10), np.float32), missed) is None


def test_recall_by_popularity_of_the_targets() -> None:
    asked = targets([[0, 1], [0, 15], [16, UNKNOWN]])
    found = item_hits(fixed([FALLING] * 3), asked, exclude_history=False)
    strata = recall_by_popularity(found, np.where(np.arange(ITEMS) < 2, 50, 3))
    assert [(s.low, s.high, s.count) for s in strata] == [(0, 0, 1), (3, 3, 2), (50, 50, 3)]
    assert [s.recall for s in strata] == [0, 0, 1]


def test_recall_by_the_length_of_the_history() -> None:
    histories = [[0] * (n + 1) for n in range(40)]
    baskets = [[0] if n < 20 else [19] for n in range(40)]
    found = item_hits(fixed([FALLING] * 40), targets(baskets, histories), exclude_history=False)
    strata = recall_by_history(found)
    assert [s.count for s in strata] == [5] * 8
    assert (strata[0].low, strata[-1].high) == (1, 40)
    assert [s.recall for s in strata] == [1] * 4 + [0] * 4
    assert all(a.high < b.low for a, b in pairwise(strata))

"""Pairs, and what a ranker's files may not be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import lightgbm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from foretell.vectors import Vectors
from predictor.models.history import Histories, Ints
from predictor.models.ranking.candidates import Recipe, candidates
from predictor.models.ranking.features import FeatureGroups, feature_names
from predictor.models.ranking.pairs import Groups, Pairs
from predictor.models.ranking.ranker import NEW_LIFT, NewItems, Ranker
from predictor.models.ranking.tables import KINDS, STATISTICS, Neighbours, Tables

GROUPS = FeatureGroups(has_times=True, repeats=True)
RECIPE = Recipe(searched=10, own=3, popular=2, related=1)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def tables(items: int = 6) -> Tables:
    rng = np.random.default_rng(0)
    item = np.full((items, 2), -1, np.int32)
    item[0] = [4, 5]
    share = np.zeros((items, 2), np.float32)
    share[0] = [0.1, 0.9]
    return Tables(
        rng.random((items, len(STATISTICS)), np.float32),
        {kind: Neighbours(item, share * 10, share) for kind in KINDS},
        rng.random((items, 4), np.float32).astype(np.float16),
        np.arange(items, dtype=np.int32),
        3.5,
        np.array([3, 2, 1], np.int32),
    )


@cache
def files() -> dict[str, bytes]:
    names = feature_names(GROUPS)
    rng = np.random.default_rng(0)
    table = rng.random((200, len(names)))
    data = lightgbm.Dataset(
        table, (table[:, 0] > 0.5).astype(int), feature_name=list(names), params={"verbose": -1}
    )
    trees = lightgbm.train({"objective": "binary", "verbose": -1, "num_threads": 1}, data, 3)
    return Ranker(tables(), RECIPE, GROUPS, trees.model_to_string(), NewItems(0.5, 2.0)).files()


def history() -> Histories:
    """Two users: one with items 1 1 0 and one that is unknown, one without events."""
    return Histories(ints(1, 1, 0, -2), ints(0, 0, 0, 0), ints(1, 2, 3, 3), ints(4, 0), ints(9, 0))


def test_pairs_are_sets() -> None:
    some = Pairs.of(ints(1, 0, 1, 0), ints(5, 7, 5, -1))
    assert list(zip(some.row.tolist(), some.item.tolist(), strict=True)) == [(0, 7), (1, 5)]
    both = some | Pairs.of(ints(0), ints(2))
    assert both.key.tolist() == sorted(both.key.tolist())
    assert (both - some).item.tolist() == [2]
    assert both.within(some).tolist() == [False, True, True]
    assert both.rank(np.array([1.0, 3.0, 2.0])).tolist() == [1, 0, 0]
    assert both.per_row(np.array([1.0, 3.0, 2.0]), np.add).tolist() == [4, 4, 2]


def test_groups_add_up() -> None:
    groups = Groups.of(ints(7, 3, 7, 7))
    assert groups.key.tolist() == [3, 7]
    assert groups.count.tolist() == [1, 3]
    assert groups.first.tolist() == [1, 0]
    assert groups.last.tolist() == [1, 3]
    assert groups.sum(np.array([[1.0], [2], [3], [4]])).ravel().tolist() == [2, 8]


def test_candidates_come_from_all_sources() -> None:
    nothing = Pairs(ints(), ints())
    found = candidates(tables(), RECIPE, history(), Pairs(ints(0), ints(9)), repeats=True)
    # Searched 9, own 0 and 1, popular 3 and 2, and of the neighbours of 0 the closer one.
    assert found.item[found.row == 0].tolist() == [0, 1, 2, 3, 5, 9]
    assert found.item[found.row == 1].tolist() == [2, 3]
    found = candidates(
        tables(), RECIPE, history(), nothing, repeats=False, denied=Pairs(ints(0, 1), ints(5, 2))
    )
    assert found.item[found.row == 0].tolist() == [2, 3]
    assert found.item[found.row == 1].tolist() == [3]


def test_files_load_to_the_same() -> None:
    ranker = Ranker.load(files())
    assert ranker.files() == files()
    pairs = ranker.candidates(history(), Pairs(ints(), ints()))
    scores = ranker.score(
        history(), pairs, np.full(len(pairs), np.nan, np.float32),
        lambda item: np.ones((len(item), 3), np.float32),
    )  # fmt: skip
    assert scores.dtype == np.float32
    assert scores.shape == (len(pairs),)


@pytest.mark.parametrize("name", ["ranker.json", "ranker.txt", "tables.safetensors"])
def test_a_missing_or_damaged_file_is_named(name: str) -> None:
    some = dict(files())
    del some[name]
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Ranker.load(some)
    with pytest.raises(ValueError, match=name):
        Ranker.load({**some, name: b"\xff nothing of the kind"})


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"searched": -1, "own": 1, "popular": 1, "related": 1}},
        {"recipe": {"searched": 1}},
        {"groups": {"has_times": 1, "repeats": True, "popularity": True, "model": True}},
        {"new_items": {"model_score": 1, "likeness": 1.0}},
        {"new_items": {"model_score": float("inf"), "likeness": 1.0}},
        {"new_items": {"model_score": float("nan"), "likeness": 1.0}},
        {"new_items": {"model_score": 1e7, "likeness": 1.0}},
        {"new_items": {"model_score": 1.0}},
        {"new_items": {"model_score": 1.0, "likeness": 1.0, "other": 1.0}},
        {"features": ["other"]},
        {"groups": {"has_times": False, "repeats": True, "popularity": True, "model": True}},
    ],
)
def test_odd_settings_are_refused(change: dict[str, object]) -> None:
    head = {**json.loads(files()["ranker.json"]), **change}
    with pytest.raises(ValueError, match=r"ranker\.json"):
        Ranker.load({**files(), "ranker.json": json.dumps(head).encode()})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("statistics", np.zeros((6, 2), np.float32), "statistics is"),
        ("statistics", np.full((6, len(STATISTICS)), np.nan, np.float32), "not finite"),
        ("category", np.full(6, -1, np.int32), "category has negative"),
        ("category", np.zeros(5, np.int32), "category is"),
        ("popular", np.array([6], np.int32), "popular names items outside"),
        ("next.item", np.full((6, 2), 6, np.int32), "next.item names items outside"),
        ("next.share", np.zeros((6, 3), np.float32), "next.share is"),
        ("more", np.zeros(1), "do not belong"),
    ],
)
def test_odd_tables_are_refused(name: str, value: np.ndarray, said: str) -> None:
    tensors = load(files()["tables.safetensors"]) | {name: value}
    with pytest.raises(ValueError, match=said):
        Ranker.load({**files(), "tables.safetensors": save(tensors)})


def placed(
    scores: Sequence[float],
    model: Sequence[float],
    likeness: Sequence[float],
    new: Sequence[bool],
    row: Sequence[int] | None = None,
) -> np.ndarray:
    """Scores of candidates, of one history unless it says otherwise; weights 2 and 4."""
    some = np.zeros(len(scores), np.int64) if row is None else np.array(row)
    read = np.array([model, likeness], np.float32).T
    return NewItems(2.0, 4.0).place(
        Pairs(some, np.arange(len(scores))), np.array(scores, np.float32), read, np.array(new)
    )


def test_a_new_item_scores_what_the_trees_would_give_to_an_old_one_like_it() -> None:
    # The old ones' means: the trees' 2, model 1, likeness .5. A new one's trees are not asked.
    new = [False, False, True, True]
    found = placed([1, 3, -50, -60], [0, 2, 2, 1], [0.25, 0.75, 0.5, 1], new)
    lifted = np.array([2 + 2 * 1 + 4 * 0, 2 + 2 * 0 + 4 * 0.5]) + NEW_LIFT
    assert found == pytest.approx([1, 3, *lifted])


def test_without_new_items_nothing_changes() -> None:
    scores = np.array([1, 2, 3], np.float32)
    assert np.array_equal(placed([1, 2, 3], [3, 1, 2], [0, 0, 0], [False] * 3), scores)


def test_what_cannot_be_compared_keeps_its_score() -> None:
    nan = float("nan")
    # Nothing is known of the first, new or old, but its trees' score.
    assert placed([1, 2, 3], [nan, 0, 0], [0, 0, 0], [True, False, False])[0] == 1
    found = placed([9, 2, 3], [nan, 0, 0], [0, 0, 0], [False, False, True])
    assert found == pytest.approx([9, 2, 2 + NEW_LIFT])
    # New ones alone: their order is that of the line.
    alone = placed([1, 2], [1, 0], [0, 0], [True, True])
    assert alone[0] > alone[1]


@given(st.data())
def test_histories_are_placed_apart_and_old_scores_stay(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    total = sum(sizes)
    numbers = st.lists(st.integers(-20, 20), min_size=total, max_size=total)
    scores, model, likeness = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    new = data.draw(st.lists(st.booleans(), min_size=total, max_size=total))
    row = np.repeat(np.arange(len(sizes)), sizes)
    together = placed(scores, model, likeness, new, row.tolist())
    assert np.array_equal(together[~np.array(new)], np.array(scores)[~np.array(new)])
    for number in range(len(sizes)):
        at = np.flatnonzero(row == number)
        own = [[values[i] for i in at] for values in (scores, model, likeness, new)]
        assert np.array_equal(placed(*own), together[at])  # type: ignore[arg-type]


def test_the_ranker_scores_a_new_item_by_model_and_likeness() -> None:
    ranker = Ranker.load(files())
    pairs = Pairs(ints(0, 0, 0), ints(2, 3, 99))  # 99 came after the tables
    model = np.array([1, 3, 2.5], np.float32)

    def vectors(item: Ints) -> Vectors:
        found: Vectors = np.eye(4, dtype=np.float32)[np.select([item == 99, item == 2], [1, 3], 0)]
        return found

    def scored(weights: NewItems) -> np.ndarray:
        return replace(ranker, new_items=weights).score(history(), pairs, model, vectors)

    plain = scored(NewItems(0.0, 0.0))
    assert plain[2] == pytest.approx(plain[:2].mean() + NEW_LIFT)
    found = scored(NewItems(0.5, 0.25))
    assert np.array_equal(found[:2], plain[:2])
    # Its model score is .5 above the others' mean; 3 is like the latest items (cosine 1), 2 and
    # the new one are not (0).
    assert found[2] - plain[2] == pytest.approx(0.5 * 0.5 - 0.25 * 0.5)

"""The map of items: near stays near, and groups have names."""

from __future__ import annotations

import numpy as np
import pytest

from foretell.vectors import Vectors
from predictor.learning.reports import item_map as module
from predictor.learning.reports.item_map import ItemMap, item_map
from predictor.models.history import Ints

WORDS = ("soap", "lipstick", "perfume", "shampoo", "razor", "towel", "mirror")


def clusters(each: int = 20) -> tuple[Vectors, Ints]:
    """Seven directions with a little noise, and which one each item has."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(7), each)
    vectors = np.eye(7, 16)[group] * 3 + 0.1 * rng.standard_normal((len(group), 16))
    return vectors.astype(np.float32), group


@pytest.fixture(scope="module")
def mapped() -> ItemMap:
    vectors, group = clusters()
    texts = [f"fine {WORDS[code]} {n % 5} of ours" for n, code in enumerate(group)]
    found = item_map(vectors, np.ones(len(vectors), np.int64), texts)
    assert found is not None
    return found


def test_neighbours_on_the_map_are_of_one_cluster(mapped: ItemMap) -> None:
    _, group = clusters()
    apart = np.linalg.norm(mapped.points[:, None] - mapped.points[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (group[apart.argmin(axis=1)] == group).mean() > 0.95


def test_groups_are_named_by_what_is_particular_to_them(mapped: ItemMap) -> None:
    assert sorted(mapped.names) == sorted(WORDS)
    _, group = clusters()
    named = [mapped.names[code] for code in mapped.group]
    assert named == [WORDS[code] for code in group]


def test_the_largest_categories_are_told_apart() -> None:
    vectors, group = clusters()
    categories = [f"c{code}" for code in group]
    categories[:25] = [f"rare {n}" for n in range(25)]  # c0, and a few of c1
    categories[139] = ""
    found = item_map(vectors, np.ones(140, np.int64), categories=categories)
    assert found is not None
    assert found.names[0] == "c2"
    assert len(found.names) == module.CATEGORIES + 1
    assert found.names[-1] == "other"
    assert found.names[found.group[139]] == "other"


def test_the_most_frequent_items_are_shown_and_those_without_a_vector_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_ITEMS", 30)
    vectors, group = clusters()
    vectors[0] = 0
    popularity = np.arange(140)[::-1].copy()
    found = item_map(vectors, popularity, categories=[str(code) for code in group])
    assert found is not None
    assert len(found.points) == 30  # items 1 to 30: 19 of the first cluster, 11 of the second
    assert np.bincount(found.group).tolist() == [19, 11]
    assert found.names == ("0", "1")


def test_too_few_items_have_no_map() -> None:
    assert item_map(np.ones((10, 4), np.float32), np.ones(10, np.int64)) is None
    assert item_map(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)) is None
    assert item_map(np.zeros((50, 4), np.float32), np.ones(50, np.int64)) is None

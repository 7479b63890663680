"""The items that the ranker orders: a few hundred of the catalogue for each history. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from predictor.models.history import Histories, Ints
from predictor.models.ranking.pairs import ITEMS, Groups, Pairs
from predictor.models.ranking.tables import Tables

RELATED_EVENTS = 50
"""Latest events whose neighbours are candidates."""
HALF_LIFE = 20.0
"""In events: by it older events of an item count less when only some of a user's items fit."""
RELATED_HALF_LIFE = 10.0


@dataclass(frozen=True)
class Recipe:
    """How many candidates come from where; what they share counts once."""

    searched: int
    """Best items of the model's Search."""
    own: int
    """The user's own items, the most and latest used ones."""
    popular: int
    related: int
    """Neighbours of the latest items."""


def candidates(
    tables: Tables,
    recipe: Recipe,
    histories: Histories,
    searched: Pairs,
    *,
    repeats: bool,
    denied: Pairs | None = None,
) -> Pairs:
    """The union of all sources.

    Args:
        searched: the model's Search hits, already cut to `recipe.searched` a history.
        repeats: whether items of the history are candidates.
        denied: pairs that are none.
    """
    some = histories.item >= 0
    row, item, age = histories.row[some], histories.item[some], histories.age[some]
    own = Pairs.of(row, item)
    found = searched | _related(tables, recipe.related, row, item, age)
    found |= _popular(tables, recipe.popular, len(histories))
    if repeats:
        found |= _most_used(row, item, age, recipe.own)
    else:
        found -= own
    return found if denied is None else found - denied


def _popular(tables: Tables, count: int, rows: int) -> Pairs:
    items = np.sort(tables.popular[:count]).astype(np.int64)
    return Pairs(np.repeat(np.arange(rows), len(items)), np.tile(items, rows))


def _most_used(row: Ints, item: Ints, age: Ints, count: int) -> Pairs:
    groups = Groups.of(row * ITEMS + item)
    pairs = Pairs(groups.key // ITEMS, groups.key % ITEMS)
    weight = groups.sum(1 / (1 + age / HALF_LIFE))
    return pairs.chosen(pairs.rank(weight) < count)


def _related(tables: Tables, count: int, row: Ints, item: Ints, age: Ints) -> Pairs:
    recent = (age < RELATED_EVENTS) & (item < tables.items)
    row, item, age = row[recent], item[recent], age[recent]
    weight = 0.5 ** (age / RELATED_HALF_LIFE)
    keys, sums = [], []
    for table in tables.neighbours.values():
        other = table.item[item]
        some = other >= 0
        keys.append((row[:, None] * ITEMS + other)[some])
        sums.append((table.share[item] * weight[:, None])[some])
    if not keys or not count:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    key, at = np.unique(np.concatenate(keys), return_inverse=True)
    pairs = Pairs(key // ITEMS, key % ITEMS)
    score = np.bincount(at, np.concatenate(sums), len(key))
    return pairs.chosen(pairs.rank(score) < count)

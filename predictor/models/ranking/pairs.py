"""Pairs of a history and an item, and sums over what is known of them. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor.models.history import Ints

Floats64 = NDArray[np.float64]

ITEMS = 1 << 40
"""More items than any catalogue has: `row * ITEMS + item` is one number for a pair."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of a history and an item; build them with `Pairs.of` unless they are in order."""

    row: Ints
    """(n,) ascending: the history."""
    item: Ints
    """(n,) index of the item, ascending within a history, each once."""

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def of(row: Ints, item: Ints) -> Pairs:
        """Puts pairs in order and drops doubles and negative items."""
        return Pairs._from(np.unique((row * ITEMS + item)[item >= 0]))

    @staticmethod
    def _from(key: Ints) -> Pairs:
        return Pairs(key // ITEMS, key % ITEMS)

    @cached_property
    def key(self) -> Ints:
        """(n,) ascending: one number for each pair."""
        key: Ints = self.row * ITEMS + self.item
        return key

    @cached_property
    def first_of_row(self) -> Ints:
        """(n,) where the pairs of the same history begin."""
        if not len(self):
            return np.zeros(0, np.int64)
        begin = np.flatnonzero(np.diff(self.row, prepend=-1))
        return np.repeat(begin, np.diff(np.append(begin, len(self))))

    def __or__(self, other: Pairs) -> Pairs:
        return Pairs._from(np.union1d(self.key, other.key))

    def __sub__(self, other: Pairs) -> Pairs:
        return self.chosen(~self.within(other))

    def chosen(self, mask: NDArray[np.bool_]) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.row[mask], self.item[mask])

    def within(self, other: Pairs) -> NDArray[np.bool_]:
        """(n,) which pairs `other` has too."""
        at = other.position(self.key)
        return at < len(other)

    def position(self, key: Ints) -> Ints:
        """Where each key is; `len(self)` where it is not."""
        return position(self.key, key)

    def rank(self, score: NDArray[Any]) -> Ints:
        """(n,) each pair's rank by score within its history, from 0; equal scores by item."""
        by = np.lexsort((-score, self.row))
        rank = np.empty(len(self), np.int64)
        rank[by] = np.arange(len(self)) - self.first_of_row
        return rank

    def per_row(self, score: NDArray[Any], reduce: np.ufunc) -> Floats64:
        """(n,) `reduce` (np.maximum, np.add) over the scores of the pair's history."""
        if not len(self):
            return np.zeros(0)
        begin = np.unique(self.first_of_row)
        values = reduce.reduceat(np.asarray(score, np.float64), begin)
        spread: Floats64 = np.repeat(values, np.diff(np.append(begin, len(self))))
        return spread


def position(keys: Ints, wanted: Ints) -> Ints:
    """Where in ascending `keys` each of `wanted` is; `len(keys)` where it is not."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    at = np.searchsorted(keys, wanted)
    found: Ints = np.where(keys[np.minimum(at, len(keys) - 1)] == wanted, at, len(keys))
    return found


@dataclass(frozen=True)
class Groups:
    """Events grouped by history and item (or category): the user's own counts of each."""

    key: Ints
    """(groups,) ascending."""
    order: Ints
    """(events,) by which events lie group by group, oldest first within a group."""
    begin: Ints
    """(groups,) where in `order` each group begins."""

    @staticmethod
    def of(key: Ints) -> Groups:
        """Groups events, which are in order of time, by a number for each."""
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        begin = np.flatnonzero(np.diff(ordered, prepend=-1))
        return Groups(ordered[begin], order, begin)

    @cached_property
    def count(self) -> Ints:
        """(groups,) events of each."""
        return np.diff(np.append(self.begin, len(self.order)))

    @property
    def last(self) -> Ints:
        """(groups,) the latest event of each."""
        latest: Ints = self.order[self.begin + self.count - 1]
        return latest

    @property
    def first(self) -> Ints:
        """(groups,) the oldest event of each."""
        oldest: Ints = self.order[self.begin]
        return oldest

    def sum(self, values: Floats64) -> Floats64:
        """(groups, cols) sums of (events, cols), one event after the other."""
        if not len(self.key):
            return np.zeros((0, *values.shape[1:]))
        sums: Floats64 = np.add.reduceat(values[self.order], self.begin, axis=0)
        return sums

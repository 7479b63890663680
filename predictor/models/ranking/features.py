"""What the ranker reads of a history and a candidate: one code path, training and serving alike.

Everything is vectorised over pairs of many histories; one live user is a batch of one. No feature
depends on another history of the batch. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.models.history import MICROSECONDS, NONE, Histories, Ints, starts
from predictor.models.ranking.pairs import ITEMS, Floats64, Groups, Pairs, position
from predictor.models.ranking.tables import KINDS, STATISTICS, Tables

DAY = 86_400 * MICROSECONDS
DAYS = (7.0, 15.0, 30.0, 60.0, 120.0, 240.0)
"""Half-lives of an event's weight in days."""
BASKETS = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
"""Half-lives in baskets of the user."""
RECENT = 10
"""Latest events whose texts and vectors are compared with a candidate's."""
RELATED = 50
"""Latest events whose neighbours are added up."""
RELATED_BASKETS = (1.0, 4.0)
"""Half-lives in baskets of an event's weight in such a sum."""
MODEL_RECENT = 3
"""Latest events whose vectors in the model's space are compared with a candidate's."""
TYPES = 3
"""Behavior types, the first ones of the version's, that an item's events are counted by."""
NEVER = 10_000.0
"""Stands for the days or baskets since something that never was."""

GetVectors = Callable[[Ints], Vectors]
Column = tuple[str, NDArray[np.generic]]


@dataclass(frozen=True)
class FeatureGroups:
    """Which groups of features a ranker has: those that its data cannot tell apart cost time."""

    has_times: bool
    repeats: bool
    """Whether a user's own items may be candidates: their counts."""
    popularity: bool = True
    model: bool = True


class Reader:
    """What the features of some histories have in common."""

    def __init__(self, tables: Tables, histories: Histories, *, has_times: bool) -> None:
        """Takes the events with an item; baskets are counted over all events."""
        self.tables = tables
        self.rows = len(histories)
        self.has_times = has_times
        new = np.ones(len(histories.item), np.bool_)
        new[1:] = (np.diff(histories.row) != 0) | (np.diff(histories.timestamp) != 0)
        basket = np.cumsum(new) - 1
        self.baskets = np.bincount(histories.row[new], minlength=self.rows)
        size = np.bincount(basket, minlength=1)
        last = np.cumsum(self.baskets) - 1
        some = histories.item != NONE
        self.row = histories.row[some]
        self.item = histories.item[some]
        self.type = histories.type[some]
        self.basket_size = size[basket][some]
        self.basket_age = (last[histories.row] - basket)[some].astype(np.float64)
        self.days = (histories.as_of[histories.row] - histories.timestamp)[some] / DAY
        self.lengths = np.bincount(self.row, minlength=self.rows)
        ends = np.cumsum(self.lengths)
        self.age = np.repeat(ends, self.lengths) - 1 - np.arange(len(self.item))
        first = starts(histories.lengths)
        some_events = histories.lengths > 0
        self.quiet = np.full(self.rows, NEVER)
        self.span = np.zeros(self.rows)
        at = np.cumsum(histories.lengths)[some_events] - 1
        times = histories.timestamp
        self.quiet[some_events] = (histories.as_of[some_events] - times[at]) / DAY
        self.span[some_events] = (times[at] - times[first[some_events]]) / DAY

    @cached_property
    def decays(self) -> Floats64:
        """(events, half-lives) weights by baskets and, with times, by days."""
        parts = [0.5 ** (self.basket_age[:, None] / np.array(BASKETS))]
        if self.has_times:
            parts.append(0.5 ** (self.days[:, None] / np.array(DAYS)))
        return np.concatenate(parts, axis=1)

    @property
    def decay_names(self) -> list[str]:
        """Of the columns of `decays`."""
        names = [f"{half_life:g}_baskets" for half_life in BASKETS]
        return names + [f"{half_life:g}_days" for half_life in DAYS] * self.has_times

    @cached_property
    def recent(self) -> Ints:
        """(rows, RECENT) items of the latest events, latest first; NONE where there are fewer."""
        table = np.full((self.rows, RECENT), NONE, np.int64)
        at = self.age < RECENT
        table[self.row[at], self.age[at]] = self.item[at]
        return table


def features(
    tables: Tables,
    histories: Histories,
    pairs: Pairs,
    model_scores: NDArray[np.float32],
    vectors: GetVectors,
    groups: FeatureGroups,
) -> NDArray[np.float32]:
    """(pairs, features), in the order of `feature_names`.

    Args:
        model_scores: (pairs,) query . item vector; NaN where there is none.
        vectors: item vectors in the model's space for indices, (n, dims).
    """
    columns = _columns(tables, histories, pairs, model_scores, vectors, groups)
    table = np.empty((len(pairs), len(columns)), np.float32)
    for at, (_, values) in enumerate(columns):
        table[:, at] = values
    return table


def feature_names(groups: FeatureGroups) -> tuple[str, ...]:
    """The names of the features."""
    nothing = np.zeros(0, np.int64)
    columns = _columns(
        Tables.empty(),
        Histories(nothing, nothing, nothing, nothing, nothing),
        Pairs(nothing, nothing),
        np.zeros(0, np.float32),
        lambda item: np.zeros((len(item), 1), np.float32),
        groups,
    )
    return tuple(name for name, _ in columns)


def _columns(
    tables: Tables,
    histories: Histories,
    pairs: Pairs,
    model_scores: NDArray[np.float32],
    vectors: GetVectors,
    groups: FeatureGroups,
) -> list[Column]:
    read = Reader(tables, histories, has_times=groups.has_times)
    columns: list[Column] = []
    if groups.model:
        columns += _model(read, pairs, model_scores, vectors)
    if groups.repeats:
        columns += _own(read, pairs)
    columns += _category(read, pairs)
    columns += _related(read, pairs)
    columns += _texts(read, pairs)
    columns += _statistics(read, pairs, popularity=groups.popularity)
    columns += _history(read, pairs)
    return columns


def _model(
    read: Reader, pairs: Pairs, scores: NDArray[np.float32], vectors: GetVectors
) -> Iterator[Column]:
    score = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    best = pairs.per_row(score, np.maximum)
    with np.errstate(invalid="ignore"):
        gap = best - score
    yield "model_score", scores
    yield "model_gap", np.where(np.isfinite(gap), gap, np.nan)
    yield "model_rank", np.where(np.isnan(scores), np.nan, np.log1p(pairs.rank(score)))
    recent = read.recent[:, :MODEL_RECENT]
    some = recent.ravel() != NONE
    known = some & (recent.ravel() >= 0)
    own = vectors(pairs.item)
    near = np.zeros((*recent.shape, own.shape[1]), np.float32)
    near.reshape(-1, own.shape[1])[known] = vectors(recent.ravel()[known])
    # Trees must not split between numbers that differ in what another machine rounds otherwise.
    cosine = np.round(_cosines(_unit(own), _unit(near), pairs.row), 4)
    yield "model_cosine_last", cosine[:, 0]
    yield "model_cosine_best", cosine.max(axis=1)
    yield "model_cosine_mean", cosine.mean(axis=1)


def _unit(vectors: Vectors) -> Vectors:
    norm = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    unit: Vectors = vectors / np.maximum(norm, np.float32(1e-6))
    return unit


def _cosines(own: Vectors, near: Vectors, row: Ints) -> NDArray[np.float32]:
    """(pairs, recent) products of pairs' vectors with those of the history's recent items."""
    products = np.empty((len(own), near.shape[1]), np.float32)
    for at in range(near.shape[1]):
        products[:, at] = np.einsum("nd,nd->n", own, near[row, at])
    return products


def _own(read: Reader, pairs: Pairs) -> Iterator[Column]:
    """The user's own events of the candidate."""
    # Unknown items share a number that no candidate has.
    groups = Groups.of(read.row * ITEMS + np.where(read.item < 0, ITEMS - 1, read.item))
    at = position(groups.key, pairs.key)
    sized = read.decays / read.basket_size[:, None]
    # What a basket or a day of the user weighs in all, so that counts become rates.
    of_baskets = _per_row(read, read.decays / read.basket_size[:, None])
    decayed = _lookup(groups.sum(np.concatenate([read.decays, sized], axis=1)), at)
    width = read.decays.shape[1]
    total = of_baskets[pairs.row]
    for col, name in enumerate(read.decay_names):
        yield f"own_{name}", decayed[:, col]
        yield f"own_sized_{name}", decayed[:, width + col]
        yield f"own_rate_{name}", decayed[:, col] / np.maximum(total[:, col], 1e-9)
    count = _lookup(groups.count, at)
    yield "own_events", count
    yield "own_share", count / np.maximum(read.lengths[pairs.row], 1)
    last = _lookup(read.basket_age[groups.last], at, NEVER)
    first = _lookup(read.basket_age[groups.first], at, NEVER)
    yield "own_last_baskets", last
    yield "own_last_size", _lookup(read.basket_size[groups.last], at)
    yield "own_gap_baskets", (first - last) / np.maximum(count - 1, 1)
    yield "own_due_baskets", last * np.maximum(count - 1, 1) / np.maximum(first - last, 1)
    for type_ in range(TYPES):
        of_type = groups.sum((read.type == type_).astype(np.float64))
        yield f"own_type_{type_}", _lookup(of_type, at)
    yield "own_last_type", _lookup(read.type[groups.last], at, -1)
    if read.has_times:
        yield from _own_days(read, pairs, groups, at, count)


def _own_days(
    read: Reader, pairs: Pairs, groups: Groups, at: Ints, count: Floats64
) -> Iterator[Column]:
    last = _lookup(read.days[groups.last], at, NEVER)
    first = _lookup(read.days[groups.first], at, NEVER)
    usual = read.tables.padded[read.tables.row(pairs.item), STATISTICS.index("gap_days")]
    shrunk = (first - last + 2 * usual) / np.maximum(count + 1, 1)
    yield "own_last_days", last
    yield "own_first_days", first
    yield "own_gap_days", (first - last) / np.maximum(count - 1, 1)
    yield "own_due_usual", last / np.maximum(usual, 1)
    yield "own_due_days", last / np.maximum(shrunk, 1)


def _per_row(read: Reader, values: Floats64) -> Floats64:
    """(rows, cols) sums over the events of each history."""
    sums = np.zeros((read.rows, values.shape[1]))
    some = read.lengths > 0
    if len(values):
        sums[some] = np.add.reduceat(values, starts(read.lengths)[some], axis=0)
    return sums


def _lookup(values: NDArray[np.generic], at: Ints, missing: float = 0.0) -> Floats64:
    """Values (pairs, ...) at positions; `missing` where the position is behind the end."""
    end = np.full((1, *values.shape[1:]), missing)
    found: Floats64 = np.concatenate([values, end])[at]
    return found


def _category(read: Reader, pairs: Pairs) -> Iterator[Column]:
    """The user's events of items with texts like the candidate's."""
    tables = read.tables
    category = tables.padded_category[tables.row(pairs.item)]
    groups = Groups.of(read.row * ITEMS + tables.padded_category[tables.row(read.item)])
    at = position(groups.key, pairs.row * ITEMS + category)
    at[category == 0] = len(groups.key)
    chosen = [1, 3, 5] + [8, 10] * read.has_times
    decayed = _lookup(groups.sum(read.decays[:, chosen]), at)
    names = read.decay_names
    for col, which in enumerate(chosen):
        yield f"category_{names[which]}", decayed[:, col]
    count = _lookup(groups.count, at)
    yield "category_share", count / np.maximum(read.lengths[pairs.row], 1)
    yield "category_last_baskets", _lookup(read.basket_age[groups.last], at, NEVER)


def _related(read: Reader, pairs: Pairs) -> Iterator[Column]:
    """Relations of the candidate to the latest items."""
    recent = (read.age < RELATED) & (read.item >= 0) & (read.item < read.tables.items)
    row, item, age = read.row[recent], read.item[recent], read.basket_age[recent]
    weights = [(f"{h:g}_baskets", 0.5 ** (age / h)) for h in RELATED_BASKETS]
    weights.append(("last", (age == 0).astype(np.float64)))
    for kind in KINDS:
        table = read.tables.neighbours[kind]
        other = table.item[item]
        key = row[:, None] * ITEMS + other
        at = pairs.position(key.ravel())
        # Pairs of items that are not related, and candidates that are no neighbour.
        found = np.flatnonzero((at < len(pairs)) & (other.ravel() >= 0))
        at, event = at[found], found // other.shape[1]
        weight = table.weight[item].ravel()[found].astype(np.float64)
        share = table.share[item].ravel()[found].astype(np.float64)
        for name, decay in weights:
            yield f"{kind}_share_{name}", np.bincount(at, share * decay[event], len(pairs))
        yield f"{kind}_count", np.bincount(at, weight * weights[1][1][event], len(pairs))
        yield f"{kind}_items", np.bincount(at, minlength=len(pairs))
        best = np.zeros(len(pairs))
        np.maximum.at(best, at, share)
        yield f"{kind}_best", best


def _texts(read: Reader, pairs: Pairs) -> Iterator[Column]:
    """Likeness of the candidate's text to those of the latest items."""
    tables = read.tables
    near = tables.padded_texts[tables.row(read.recent)]
    cosine = _cosines(tables.padded_texts[tables.row(pairs.item)], near, pairs.row)
    there = np.maximum((read.recent != NONE).sum(axis=1), 1)[pairs.row]
    yield "text_last", cosine[:, 0]
    yield "text_before", cosine[:, 1]
    yield "text_best_3", cosine[:, :3].max(axis=1)
    yield "text_best", cosine.max(axis=1)
    yield "text_mean", cosine.sum(axis=1) / there
    yield "text_recent", (cosine * 0.7 ** np.arange(RECENT)).sum(axis=1)


def _statistics(read: Reader, pairs: Pairs, *, popularity: bool) -> Iterator[Column]:
    """Global statistics of the candidate and of the last item."""
    own = read.tables.padded[read.tables.row(pairs.item)]
    for col, name in enumerate(STATISTICS):
        if popularity or name not in POPULARITY:
            yield f"item_{name}", own[:, col]
    if popularity:
        last = read.tables.padded[read.tables.row(read.recent[:, 0])]
        yield "last_item_events", last[pairs.row, 0]


POPULARITY = frozenset(
    {"events", "users", "last_28_days", "last_7_days", "trend", "first_seen_days", "position"}
)
"""Statistics that a ranker without popularity does not read."""


def _history(read: Reader, pairs: Pairs) -> Iterator[Column]:
    """The history itself: it decides how far the rest is trusted."""
    row = pairs.row
    yield "history_events", read.lengths[row]
    yield "history_baskets", read.baskets[row]
    yield "history_basket_size", (read.lengths / np.maximum(read.baskets, 1))[row]
    if read.has_times:
        yield "history_quiet_days", read.quiet[row]
        yield "history_basket_days", (read.span / np.maximum(read.baskets - 1, 1))[row]

"""What the type models read of histories: one vectorised code path in training and serving.

A feature is a sum over a history's events that fade with their age, a look at its last events, or
a comparison with the frozen distribution of types over the items that the user touched. Sums are
products of a sparse matrix (histories x events) with a few columns per event, so that thousands of
training histories and one live user cost what their events cost. Missing values are NaN.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from predictor.models.history import MICROSECONDS, NONE, Histories, Ints
from predictor.models.types.tables import Floats, Seen

Number = TypeVar("Number", np.int64, np.float32)

HALF_LIVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, np.inf)
"""Of an event, in events, in the decayed shares of types."""

FEW_HALF_LIVES = (2.0, 8.0, 32.0, np.inf)
"""The same where there are more than MANY_TYPES: the cost of trees grows with both."""

MANY_TYPES = 8

PRIOR_EVENTS = 0.5
"""Events that the prior counts for in a decayed share."""

TABLE_HALF_LIVES = (32.0, np.inf)
"""Of a transition in the user's own Markov table."""

TABLE_PRIOR = 2.0
"""Transitions that the user's shares count for in a row of that table."""

RESIDUAL_HALF_LIVES = (4.0, 16.0, 64.0, np.inf)
"""Of the difference between an event's type and what is usual for its item."""

RESIDUAL_PRIOR = 3.0
"""Events without any difference that count besides."""

LAST_TYPES = 6
LAST_GAPS = 3

SESSION_GAP_S = 1_800
"""A pause that ends a session: the usual half an hour of web analytics."""

DAY_S = 86_400


class View:
    """Histories and what several groups of features need of them."""

    def __init__(
        self, histories: Histories, seen: Seen, prior: Floats, *, has_times: bool, has_items: bool
    ) -> None:
        self.histories = histories
        self.seen = seen
        self.prior = prior
        self.types = len(prior)
        self.has_times = has_times
        self.has_items = has_items
        self.age = histories.age
        self.row = histories.row
        self.ends = np.cumsum(histories.lengths)
        self._indptr = np.concatenate([[0], self.ends])
        self._indices = np.arange(len(histories.type))
        codes = np.arange(self.types)
        self.one_hot = (histories.type[:, None] == codes).astype(np.float32)
        self.shares: dict[float, Floats] = {}
        for half_life in HALF_LIVES if self.types <= MANY_TYPES else FEW_HALF_LIVES:
            sums = self.sum(self.fading(half_life), self.one_hot)
            total = sums.sum(axis=1, keepdims=True) + PRIOR_EVENTS
            self.shares[half_life] = (sums + PRIOR_EVENTS * prior) / total
        self.last_type = self.take(histories.type, self.last(1), NONE)[:, 0]

    def sum(self, weights: Floats, columns: Floats) -> Floats:
        """(histories, k): for each history, the sum of weights (events,) x columns (events, k)."""
        shape = (len(self.histories), len(weights))
        matrix = sparse.csr_matrix((weights, self._indices, self._indptr), shape=shape)
        out: Floats = matrix @ columns
        return out

    def fading(self, half_life: float) -> Floats:
        """(events,) 1 for the last event, half of that `half_life` events before."""
        oldest = int(self.age.max(initial=0))
        table = np.exp2(-np.arange(oldest + 1) / half_life).astype(np.float32)
        return table[self.age]

    def last(self, count: int) -> Ints:
        """(histories, count) where the last events are, the very last first; -1 where none is."""
        back = np.arange(count)
        exists = back < self.histories.lengths[:, None]
        at: Ints = np.where(exists, self.ends[:, None] - 1 - back, -1)
        return at

    @staticmethod
    def take(values: NDArray[Number], at: Ints, missing: float) -> NDArray[Number]:
        """values[at], and `missing` where at is -1."""
        # The last element is what -1 points to.
        return np.append(values, np.asarray(missing, values.dtype))[at]

    def youngest(self, chosen: NDArray[np.bool_]) -> Ints:
        """(histories,) age of each history's latest chosen event; its length if it has none."""
        out = self.histories.lengths.copy()
        np.minimum.at(out, self.row[chosen], self.age[chosen])
        return out


def history_features(view: View) -> dict[str, Floats]:
    """(histories, k) features by group, always in the same order."""
    groups = {
        "shares": columns_of(*view.shares.values()),
        "last_types": _last_types(view),
        "transitions": _transitions(view),
        "runs": _runs(view),
        "length": np.log1p(view.histories.lengths).astype(np.float32)[:, None],
    }
    if view.has_items:
        groups["items"] = _items(view)
        groups["residuals"] = columns_of(*residuals(view).values())
    if view.has_times:
        groups["sessions"] = _sessions(view)
        groups["gaps"] = _gaps(view)
        groups["clock"] = _clock(view)
    return groups


def columns_of(*parts: NDArray[np.generic]) -> Floats:
    """One matrix of columns (n,) and matrices (n, k)."""
    wide = [part if part.ndim == 2 else part[:, None] for part in parts]
    return np.concatenate([part.astype(np.float32, copy=False) for part in wide], axis=1)


def _last_types(view: View) -> Floats:
    last = view.take(view.histories.type, view.last(LAST_TYPES), NONE)
    return columns_of(last, last[:, :1] == np.arange(view.types))


def _transitions(view: View) -> Floats:
    """What came after the last type, and after the last two, in the user's own past."""
    before = np.roll(view.histories.type, 1)
    second = np.roll(before, 1)
    youngest_two = view.take(view.histories.type, view.last(2), NONE)
    # The first event of a history follows none.
    place = view.histories.lengths[view.row] - 1 - view.age
    after = (before == youngest_two[view.row, 0]) & (place > 0)
    after_two = after & (second == youngest_two[view.row, 1]) & (place > 1)
    parts: list[Floats] = []
    shares = view.shares[32.0]
    for chosen in (after, after_two):
        for half_life in TABLE_HALF_LIVES:
            sums = view.sum(view.fading(half_life) * chosen, view.one_hot)
            total = sums.sum(axis=1, keepdims=True)
            parts += [(sums + TABLE_PRIOR * shares) / (total + TABLE_PRIOR), np.log1p(total)]
    return columns_of(*parts)


def _runs(view: View) -> Floats:
    """Lengths of runs, how often the type changes, and how long ago each type was."""
    type_ = view.histories.type
    run = view.youngest(type_ != view.last_type[view.row])
    change = (type_ != np.roll(type_, 1)) & (view.age < view.histories.lengths[view.row] - 1)
    changes = [
        _mean(view, half_life, change.astype(np.float32)[:, None]) for half_life in (8.0, 32.0)
    ]
    since = [np.log1p(view.youngest(type_ == code)) for code in range(view.types)]
    before_run = view.take(
        type_, np.where(run < view.histories.lengths, view.ends - 1 - run, -1), NONE
    )
    return columns_of(np.log1p(run), before_run, *changes, *since)


def _mean(view: View, half_life: float, columns: Floats) -> Floats:
    """(histories, k) decayed means of columns (events, k); 0 where there is no event."""
    ones = np.ones((len(columns), 1), np.float32)
    sums = view.sum(view.fading(half_life), np.concatenate([columns, ones], axis=1))
    means = sums[:, :-1] / np.maximum(sums[:, -1:], 1e-6)
    return means.astype(np.float32, copy=False)


def residuals(view: View) -> dict[float, Floats]:
    """(histories, types) by half-life: how the user differs from what is usual for the items."""
    some = (view.histories.item != NONE).astype(np.float32)
    columns = np.concatenate([view.one_hot - view.seen.expected, some[:, None]], axis=1)
    found = {}
    for half_life in RESIDUAL_HALF_LIVES:
        sums = view.sum(view.fading(half_life) * some, columns)
        found[half_life] = sums[:, :-1] / (sums[:, -1:] + RESIDUAL_PRIOR)
    return found


def _items(view: View) -> Floats:
    """The items that the user touched last: usual types, popularity, repetition."""
    items = view.histories.item
    usual = np.concatenate([view.seen.expected, view.seen.popularity[:, None]], axis=1)
    at = view.last(2)
    last = view.take(items, at[:, :1], NONE)[:, 0]
    same = view.youngest(items != last[view.row])
    count = view.sum(
        (items == last[view.row]).astype(np.float32), np.ones((len(items), 1), np.float32)
    )
    of_last = [view.take(np.ascontiguousarray(column), at[:, :1], np.nan) for column in usual.T]
    return columns_of(
        _mean(view, 4.0, usual), _mean(view, 32.0, usual), *of_last,
        np.log1p(same), np.log1p(count),
    )  # fmt: skip


def _seconds(view: View) -> Floats:
    """(events,) since the event before; 0 for the first of a history."""
    times = view.histories.timestamp
    gaps = np.diff(times, prepend=times[:1]) / MICROSECONDS
    gaps[view.age == view.histories.lengths[view.row] - 1] = 0
    return gaps.astype(np.float32)


def _sessions(view: View) -> Floats:
    """Where in a session the user is, and which types the session had."""
    h = view.histories
    seconds = _seconds(view)
    new = (seconds > SESSION_GAP_S) | (view.age == h.lengths[view.row] - 1)
    in_session = np.minimum(view.youngest(new) + 1, h.lengths)
    now = (view.age < in_session[view.row]).astype(np.float32)
    types = view.sum(now, view.one_hot)
    total = types.sum(axis=1, keepdims=True) + 2.0
    shares = (types + 2.0 * view.shares[np.inf]) / total
    sessions = view.sum(np.ones(len(now), np.float32), new.astype(np.float32)[:, None])[:, 0]
    begin = view.take(h.timestamp, np.where(h.lengths > 0, view.ends - in_session, -1), 0)
    lasted = (view.take(h.timestamp, view.last(1), 0)[:, 0] - begin) / MICROSECONDS
    return columns_of(
        np.log1p(in_session), shares, np.log1p(sessions),
        np.log1p(h.lengths / np.maximum(sessions, 1)), np.log1p(lasted),
        lasted / np.maximum(in_session, 1),
    )  # fmt: skip


def _gaps(view: View) -> Floats:
    """Times between the last events, usual ones, and those before each type."""
    log = np.log1p(_seconds(view))
    last = view.take(log, view.last(LAST_GAPS), np.nan)
    short = (log < np.log1p(1.5)).astype(np.float32)
    columns = np.stack([log, short], axis=1)
    weights = view.fading(64.0)
    of_type = view.sum(weights, view.one_hot * log[:, None])
    per_type = of_type / np.maximum(view.sum(weights, view.one_hot), 1e-6)
    return columns_of(last, _mean(view, 4.0, columns), _mean(view, 32.0, columns), per_type)


def _clock(view: View) -> Floats:
    """Hour and weekday (UTC) of the last event: the target's own time would be a leak."""
    last = view.take(view.histories.timestamp, view.last(1), 0)[:, 0] / MICROSECONDS
    return columns_of(last % DAY_S / 3600, last // DAY_S % 7)

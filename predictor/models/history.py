"""Histories as the models read them: the same code in training and serving. numpy only.

The sequence model reads tokens (HistoryBatch); the ranker, the type models and the rules read
whole histories (Histories). A token is one event: a vector in the model's space, a behavior type
and the time gap to the event before. Histories of several users lie one behind the other
("ragged"): `lengths` says where one ends, and no padding is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors

Ints = NDArray[np.int64]

GAPS = 32
"""Gap buckets: 0 none before, 1 the same instant, then one per power of two of seconds.

The last one holds gaps of 2**29 s (17 years) and more, so no real gap is clipped.
"""

MICROSECONDS = 1_000_000

DAY_HOURS = 24
HOURS = 7 * DAY_HOURS
"""Of a week, from Monday's first on, in UTC."""

_EPOCH_HOUR = 72
"""1970 began on a Thursday."""


def gap_buckets(timestamps: Ints, lengths: Ints) -> Ints:
    """The bucket of the time since the event before, for each event of ragged histories.

    Args:
        timestamps: (tokens,) microseconds, ascending within a history.
        lengths: (histories,) events of each history; their sum is `tokens`.

    Returns:
        (tokens,) in 0..GAPS-1; 0 for the first event of a history, 1 for an event of the same
        basket, 2 for less than two seconds, 3 for less than four, ...
    """
    if not len(timestamps):
        return np.zeros(0, np.int64)
    seconds = np.diff(timestamps, prepend=timestamps[0]) / MICROSECONDS
    # frexp gives the exact floor(log2) + 1, which log2 in floating point does not promise.
    exponent = np.frexp(np.maximum(seconds, 1))[1].astype(np.int64)
    buckets = np.where(seconds <= 0, 1, np.minimum(exponent + 1, GAPS - 1))
    buckets[starts(lengths)[lengths > 0]] = 0
    return buckets


def hours_of_week(timestamps: Ints) -> Ints:
    """(tokens,) in 0..HOURS-1, from microseconds since 1970."""
    return (timestamps // (3_600 * MICROSECONDS) + _EPOCH_HOUR) % HOURS


def starts(lengths: Ints) -> Ints:
    """Where each of the ragged histories begins, shape (histories,)."""
    return np.cumsum(lengths, dtype=np.int64) - lengths


@dataclass(frozen=True)
class HistoryBatch:
    """Ragged histories, oldest event first; build it with `history_batch`."""

    vectors: Vectors
    """(tokens, dims) item's or text's vector in the model's space; zero where there is none."""
    known: NDArray[np.bool_]
    """(tokens,) whether the event has a vector."""
    types: Ints
    """(tokens,) index in the version's behavior_types; their number stands for any other type."""
    gaps: Ints
    """(tokens,) gap buckets."""
    hours: Ints
    """(tokens,) hours of the week, which networks with a `clock` read."""
    lengths: Ints
    """(histories,) events of each history; 0 is allowed."""

    def __len__(self) -> int:
        return len(self.lengths)


NONE = -1
"""Index of an item, text or type that is not given."""
UNKNOWN = -2
"""Index of one that is given, but in no vocabulary: as a target it is always missed."""


@dataclass(frozen=True)
class Histories:
    """Whole histories of some users, ragged, oldest event first; at most HISTORY_EVENTS each."""

    item: Ints
    """(events,) index of the item; NONE or UNKNOWN. Items that are newer than a version's frozen
    tables have indices from the size of these tables on."""
    type: Ints
    """(events,) index in the version's behavior types; UNKNOWN for any other."""
    timestamp: Ints
    """(events,) microseconds, ascending within a history; without times, the source's order."""
    lengths: Ints
    """(histories,) events of each history; 0 is allowed."""
    as_of: Ints
    """(histories,) microseconds: when the prediction is asked for, not before the last event."""

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def row(self) -> Ints:
        """(events,) the history that each event belongs to."""
        row: Ints = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return row

    @cached_property
    def age(self) -> Ints:
        """(events,) 0 for the last event of a history, 1 for the one before, ..."""
        ends = np.cumsum(self.lengths)
        age: Ints = np.repeat(ends, self.lengths) - 1 - np.arange(len(self.item))
        return age


HISTORY_EVENTS = 5_000
"""Latest events of a user in Histories."""


def asked_at(now: Ints, last: Ints, horizon: int) -> Ints:
    """(histories,) Histories.as_of: `now`, but at most `horizon` after the last event.

    Args:
        now: (histories,) microseconds.
        last: (histories,) time of the last event; `now` where there is none.
        horizon: microseconds that a version has seen between a last event and the prediction; a
            user who comes back after a longer time is read as if they came back then.
    """
    return np.clip(now, last, last + horizon)


def history_batch(
    vectors: Vectors,
    known: NDArray[np.bool_],
    types: Ints,
    timestamps: Ints,
    lengths: Ints,
    *,
    has_times: bool = True,
) -> HistoryBatch:
    """Puts histories into the form that `SequenceModel.predict` takes.

    The caller has cut each history to its last `history_length` events already: a gap to an event
    that the model does not see does not count, in training as in serving.

    Args:
        vectors: (tokens, dims) float32.
        known: (tokens,) bool.
        types: (tokens,) behavior type indices.
        timestamps: (tokens,) microseconds, ascending within a history.
        lengths: (histories,).
        has_times: the version's `has_times`; without, all gaps are bucket 0 and all
            hours 0.
    """
    tokens = int(lengths.sum())
    if not len(vectors) == len(known) == len(types) == len(timestamps) == tokens:
        raise ValueError(f"lengths make {tokens} tokens, which the arrays do not have")
    if not has_times:
        none = np.zeros(tokens, np.int64)
        return HistoryBatch(vectors, known, types, none, none, lengths)
    gaps, hours = gap_buckets(timestamps, lengths), hours_of_week(timestamps)
    return HistoryBatch(vectors, known, types, gaps, hours, lengths)

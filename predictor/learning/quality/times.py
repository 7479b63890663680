"""Times that cannot be true, and users who do what no person does: bursts and bots.

The rules go by the set's own spread, robustly, and by what a person can do. An outlier is what
Iglewicz and Hoaglin, 1993 ("How to detect and handle outliers") call one: a modified z-score (from
median and median deviation) above 3.5, here of logarithms, for sizes and rates are skewed.
Programs show by equal gaps (Gianvecchio et al., 2008, "Measurement and classification of humans
and bots in internet chat"; Chu et al., 2012, "Detecting automation of Twitter accounts"), where
people's are bursty (Goh and Barabási, 2008).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretell.importing import EventColumns
from predictor.learning.quality.findings import (
    Finding,
    Mask,
    counted,
    most_frequent,
    pairs,
    share,
)
from predictor.models.history import MICROSECONDS, Ints

Floats = NDArray[np.float64]

MINUTE = 60 * MICROSECONDS
HOUR = 60 * MINUTE
DAY = 24 * HOUR

FIRST_TIME = 631_152_000 * MICROSECONDS
"""1990-01-01: behavior was not logged before, but programs write 1970 and 1980 for "no time"."""

BURST_EVENTS = 100
"""Of a user in one second, at least: more than a person does."""

FEW_BASKETS = 20
"""Below this many the sizes of baskets have no spread to speak of."""

BOT_ACTIONS = 2_000
"""On one day, at least: an action every half minute for 16 hours. The busiest person of MovieLens
small has 1,336."""

OUTLIER = 3.5
"""Modified z-score."""

REGULAR_GAPS = 50
"""That a user must have to be called regular."""

REGULAR_SHARE = 0.75
"""Of the gaps within REGULAR_WIDTH of their median, which is no whole number of days: a person's
day and week are regular, too."""

REGULAR_WIDTH = 0.05

CLAIMS_ORDER = 0.05
"""Share of the rows that may come before their user's row above in a file that claims order; in
one that does not, it is a half."""


def resolution(times: Ints) -> int:
    """The unit, in microseconds, that all but 1 % of the times are whole numbers of."""
    for unit in (DAY, HOUR, MINUTE, MICROSECONDS, 1_000):
        if (times % unit == 0).mean() >= 0.99:
            return unit
    return 1


def one_time(columns: EventColumns) -> Finding | None:
    """All events at one instant: then a user has one basket and no past."""
    times = columns.timestamp
    if times is None or len(times) < 2 or times.min() != times.max():
        return None
    return Finding(
        "one_time",
        f"all {len(times):,} events have the same time",
        "kept: each user's events are one basket; leave the column out if the rows are in order",
        np.ones(len(times), np.bool_),
    )


def impossible_times(columns: EventColumns, now: int) -> Finding | None:
    """Times before 1990 or after now; a set with its own clock (from 0 on) has none.

    Args:
        now: microseconds since 1970.
    """
    times = columns.timestamp
    if times is None:
        return None
    early, late = times < FIRST_TIME, times > now
    if early.all():
        return Finding(
            "own_clock",
            f"all {len(times):,} events are before 1990: their clock is one of their own",
            "kept: only the order and the gaps count",
        )
    some = early | late
    if not some.any():
        return None
    return Finding(
        "impossible_times",
        f"{counted(int(some.sum()), len(times), 'events')} have a time that cannot be: "
        f"{int(early.sum()):,} before 1990, {int(late.sum()):,} after now",
        "kept; --clean drops them",
        some,
        drops=True,
        noise=True,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def out_of_order(columns: EventColumns) -> Finding | None:
    """Rows before their user's row above, where nearly all others come after it."""
    times = columns.timestamp
    if times is None:
        return None
    by = np.argsort(columns.user, kind="stable")
    user, ordered = columns.user[by], times[by]
    same = user[1:] == user[:-1]
    back = same & (ordered[1:] < ordered[:-1])
    if not 0 < back.sum() <= CLAIMS_ORDER * same.sum():
        return None
    some = np.zeros(len(times), np.bool_)
    some[by[1:][back]] = True
    return Finding(
        "out_of_order",
        f"{counted(int(some.sum()), len(times), 'events')} are earlier than the row of their "
        "user above, though the others come in order",
        "mended: time decides, not the place in the source",
        some,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def bursts(columns: EventColumns) -> Finding | None:
    """Seconds in which a user has hundreds of events; not the set's usual baskets."""
    times = columns.timestamp
    if times is None or resolution(times) > MICROSECONDS:
        return None
    _, second, size = np.unique(
        pairs(columns.user, times // MICROSECONDS), return_inverse=True, return_counts=True
    )
    baskets = np.log(size[size > 1])
    large = size >= BURST_EVENTS
    if len(baskets) >= FEW_BASKETS:
        large &= _outliers(np.log(size), baskets)
    some: Mask = large[second]
    if not some.any():
        return None
    return Finding(
        "bursts",
        f"{counted(int(some.sum()), len(times), 'events')} come too many in a second of one user; "
        f"seconds: {int(large.sum()):,}, the fullest with {int(size.max()):,} events",
        "kept; --clean drops them",
        some,
        drops=True,
        noise=True,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def _outliers(values: Floats, among: Floats) -> Mask:
    """Which values are far above; where more than half of `among` are alike, all above these."""
    median = np.median(among)
    deviation = np.median(np.abs(among - median))
    above: Mask = 0.6745 * (values - median) > OUTLIER * deviation
    return above


def bots(columns: EventColumns) -> Finding | None:
    """Users who act as often, or as regularly, as programs do."""
    times = columns.timestamp
    if times is None:
        return None
    second = times // MICROSECONDS
    actions = np.unique(pairs(columns.user, second), return_index=True)[1]
    user, second = columns.user[actions], second[actions]
    busy = _too_busy(user, second, len(columns.user_ids))
    regular = _too_regular(user, second, len(columns.user_ids), resolution(times))
    some: Mask = (busy | regular)[columns.user]
    if not some.any():
        return None
    users = busy | regular
    return Finding(
        "bots",
        f"{counted(int(users.sum()), len(np.unique(columns.user)), 'users')} with "
        f"{share(float(some.mean()))} of the events act like programs: "
        f"{int(busy.sum()):,} too often ({BOT_ACTIONS:,} times a day and more, far from the "
        f"others), {int(regular.sum()):,} too regularly (equal gaps)",
        "kept; --clean drops them with all their events",
        some,
        drops=True,
        noise=True,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def _too_busy(user: Ints, second: Ints, users: int) -> Mask:
    """(users,) by the actions (seconds with an event) of their busiest day."""
    _, first, actions = np.unique(
        pairs(user, second // (DAY // MICROSECONDS)), return_index=True, return_counts=True
    )
    busiest = np.zeros(users, np.int64)
    np.maximum.at(busiest, user[first], actions)
    logs = np.log(np.maximum(busiest, 1))
    busy: Mask = (busiest >= BOT_ACTIONS) & _outliers(logs, logs[busiest > 0])
    return busy


def _too_regular(user: Ints, second: Ints, users: int, unit: int) -> Mask:
    """(users,) by the gaps between their actions. `user` is sorted, and `second` within it."""
    same = user[1:] == user[:-1]
    owner, gap = user[1:][same], np.diff(second)[same]
    by = np.lexsort((gap, owner))
    owner, gap = owner[by], gap[by]
    count = np.bincount(owner, minlength=users)
    median = np.zeros(users)
    some = count > 0
    median[some] = gap[(np.cumsum(count) - count + count // 2)[some]]
    near = np.abs(gap - median[owner]) <= REGULAR_WIDTH * median[owner]
    alike = np.bincount(owner[near], minlength=users)
    # Below one unit of the clock, the width would call equal what the clock cannot tell apart.
    readable = REGULAR_WIDTH * median * MICROSECONDS >= max(unit, MICROSECONDS)
    day = DAY // MICROSECONDS
    human = np.abs(median - np.round(median / day) * day) <= REGULAR_WIDTH * median
    regular: Mask = (count >= REGULAR_GAPS) & (alike >= REGULAR_SHARE * count) & readable & ~human
    return regular

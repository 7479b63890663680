"""Periods of the calendar, and which of them the events cover whole.

Weeks begin on Monday, days at midnight, all in UTC. Periods of N days end with the last whole day,
so that none of the newest days is lost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError

Days = NDArray[np.datetime64]
"""Of the unit D."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

YEAR = 364
"""Days after which weekdays fall into the same time of year again."""

USUAL = 0.95
"""Quantile of the silences at the ends of periods that still counts as usual."""
NEGLIGIBLE = 0.05
"""Share of a period that may be missing from it: less than demand varies anyway."""

_NAMED = {"day": 1, "week": 7, "month": None}
_DAYS = re.compile(r"[1-9]\d{0,3}d")


@dataclass(frozen=True)
class Period:
    """A length of time: `day`, `week`, `month`, or a number of days such as `14d`."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _NAMED and not _DAYS.fullmatch(self.name):
            raise InvalidArgumentError(
                f"the period {self.name!r} is none of day, week, month, and no number of days "
                "such as 14d",
                reason="BAD_PERIOD",
                field="period",
            )

    @property
    def days(self) -> int | None:
        """Its length; None: it varies."""
        return _NAMED[self.name] if self.name in _NAMED else int(self.name[:-1])

    @property
    def season(self) -> int | None:
        """Periods after which demand may repeat itself: a week of days, a year of all others.

        None where a year is no whole number of them, or of one only.
        """
        if self.days is None:
            return 12
        if self.days == 1:
            return 7
        return YEAR // self.days if YEAR % self.days == 0 and self.days < YEAR else None

    def edges(self, first: np.datetime64, count: int) -> Days:
        """(count + 1,) where periods begin from `first` on, and where the last one ends."""
        if self.days is None:
            found: Days = (first.astype("M8[M]") + np.arange(count + 1)).astype("M8[D]")
            return found
        return first + np.arange(count + 1) * self.days

    def around(self, first: np.datetime64, last: np.datetime64) -> Days:
        """Edges of the calendar's periods that hold the days `first` to `last`."""
        if self.days is None:
            begin = first.astype("M8[M]").astype("M8[D]")
            months = last.astype("M8[M]") - begin.astype("M8[M]")
            return self.edges(begin, int(months.astype(np.int64)) + 1)
        if self.name == "week":
            first = first - (int(first.astype(np.int64)) + 3) % 7  # 1970-01-01 was a Thursday
        return self.edges(first, int((last - first).astype(np.int64)) // self.days + 1)


@dataclass(frozen=True)
class Calendar:
    """Whole periods, one after the other."""

    period: Period
    edges: Days
    """(periods + 1,)."""
    left_out: tuple[str, ...]
    """Of what was cut off at the ends: a sentence each."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    def after(self, count: int) -> Days:
        """(count + 1,) edges of the periods that follow."""
        return self.period.edges(self.edges[-1], count)

    def of(self, times: Ints) -> Ints:
        """The period of each time (microseconds since 1970); -1 before, len() after them."""
        where: Ints = np.searchsorted(_microseconds(self.edges), times, side="right") - 1
        return where


def calendar(times: Ints, period: Period) -> Calendar:
    """The periods that events cover whole.

    The first and the last one are left out where the silence at their open end is longer than is
    usual at the ends of the others: the record began or ended within them.

    Args:
        times: of all events, of whatever kind, in microseconds since 1970; not empty.
    """
    counted = None if period.name in _NAMED else period.days
    edges, left_out = _whole(times, Period("day") if counted else period)
    if counted:
        count = int((edges[-1] - edges[0]).astype(np.int64)) // counted
        begin = edges[-1] - count * counted
        if begin > edges[0]:
            left_out = (*left_out, f"what was before {begin}, too short for a period")
        edges = period.edges(begin, count)
    return Calendar(period, edges, left_out)


def _whole(times: Ints, period: Period) -> tuple[Days, tuple[str, ...]]:
    ends = np.array([times.min(), times.max()], "M8[us]").astype("M8[D]")
    edges = period.around(ends[0], ends[1])
    at = _microseconds(edges)
    of = np.searchsorted(at, times, side="right") - 1
    first, last = at[1:].copy(), at[:-1].copy()  # a period without events is all silence
    np.minimum.at(first, of, times)
    np.maximum.at(last, of, times)
    begin, end, left_out = 0, len(edges) - 1, []
    if _is_cut((first - at[:-1])[::-1], np.diff(at)[0]):
        begin = 1
        left_out.append(f"the {period.name} of {edges[0]}, in which the events begin")
    if end > begin and _is_cut(at[1:] - last, np.diff(at)[-1]):
        end -= 1
        left_out.append(f"the {period.name} of {edges[end]}, in which the events end")
    return edges[begin : end + 1], tuple(left_out)


def _is_cut(silences: Ints, length: np.int64) -> bool:
    """Whether the last of the silences is unusual among the others."""
    usual = np.quantile(silences[:-1], USUAL, method="higher") if len(silences) > 1 else 0
    return bool(silences[-1] > max(usual, NEGLIGIBLE * length))


def _microseconds(days: Days) -> Ints:
    found: Ints = days.astype("M8[us]").astype(np.int64)
    return found

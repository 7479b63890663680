"""Events counted by series (an item, or the items of a category) and period."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foretell.errors import InvalidArgumentError
from predictor.learning.forecasting.periods import Calendar, Floats, Ints, Mask, Period, calendar
from predictor.learning.sources import CATEGORY, Source

ITEM = "item"
"""Value of `by` for a series per item; all others are names of attributes."""

CELLS = 2**26
"""Series times periods at most: half a gigabyte, of which a forecast takes several at a time."""


@dataclass(frozen=True)
class Demand:
    """How many events there were."""

    names: Sequence[str]
    """(series,) item ids or values of the attribute."""
    counts: Floats
    """(series, periods) whole numbers."""
    groups: Ints
    """(series,) those of one number are alike while they are new: items of one category."""
    calendar: Calendar
    notes: tuple[str, ...]
    """What was left out, a sentence each."""


def demand_of(
    source: Source, by: str, period: Period, behavior_types: Sequence[str] = ()
) -> Demand:
    """Counts the events of a source.

    Args:
        by: ITEM, or an attribute of the items.
        behavior_types: those that count; none: all.

    Raises:
        InvalidArgumentError: the events have no times, or none that counts; a behavior type or
            attribute is unknown; there is no whole period; there are too many series and periods.
    """
    columns = source.columns
    if columns.timestamp is None:
        raise InvalidArgumentError(
            "a forecast needs the times of the events: the column timestamp is missing",
            reason="NO_TIMES",
            field="events",
        )
    names, groups, series = _series(source, by)
    counted = _of_types(columns.behavior_type, columns.behavior_types, behavior_types)
    found = calendar(columns.timestamp, period)
    if not len(found):
        raise InvalidArgumentError(
            f"the events cover no whole period ({period.name}): take shorter ones",
            reason="TOO_FEW_PERIODS",
            field="period",
        )
    if len(names) * len(found) > CELLS:
        raise InvalidArgumentError(
            f"{len(names):,} series of {len(found):,} periods are too many: take longer periods, "
            "or forecast by an attribute of the items",
            reason="TOO_MANY_SERIES",
            field="by",
        )
    of = np.append(series, -1)[columns.item]  # an event without an item has -1
    at = found.of(columns.timestamp)
    inside = (at >= 0) & (at < len(found))
    used = counted & inside & (of >= 0)
    if not used.any():
        raise InvalidArgumentError(
            "no event that counts names an item" + ("" if by == ITEM else f" with {by!r}"),
            reason="NO_EVENTS",
            field="events",
        )
    cells = of[used] * len(found) + at[used]
    counts = np.bincount(cells, minlength=len(names) * len(found)).astype(np.float64)
    notes = [f"left out: {what}" for what in found.left_out]
    nameless = int((counted & inside & (of < 0)).sum())
    if nameless:
        what = "an item" if by == ITEM else f"an item with {by!r}"
        notes.append(f"left out: {nameless:,} events without {what}")
    return Demand(names, counts.reshape(len(names), -1), groups, found, tuple(notes))


def _of_types(codes: Ints, known: Sequence[str], wanted: Sequence[str]) -> Mask:
    """Which events are of the wanted types."""
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InvalidArgumentError(
            f"no event has the behavior type {', '.join(unknown)}; there are: "
            + ", ".join(sorted(known)),
            reason="UNKNOWN_TYPE",
            field="behavior_type",
        )
    mask = np.array([not wanted or name in wanted for name in known])
    chosen: Mask = mask[codes]
    return chosen


def _series(source: Source, by: str) -> tuple[list[str], Ints, Ints]:
    """Names and groups of the series, and the series of each of the events' items; -1: none."""
    item_ids = source.columns.item_ids
    attributes = {item.id: item.attributes for item in source.items or ()}
    if by == ITEM:
        names = list(dict.fromkeys([*attributes, *item_ids]))
        labels = [attributes.get(name, {}).get(CATEGORY, "") for name in names]
        groups = np.unique(labels, return_inverse=True)[1] if names else np.zeros(0, np.int64)
        mine = item_ids
    else:
        if source.items is None:
            raise InvalidArgumentError(
                f"--by {by} needs --items: it is an attribute of the items",
                reason="NO_ITEMS",
                field="items",
            )
        names = sorted({found[by] for found in attributes.values() if by in found})
        if not names:
            known = sorted({name for found in attributes.values() for name in found})
            raise InvalidArgumentError(
                f"no item has the attribute {by!r}; there are: {', '.join(known) or 'none'}",
                reason="UNKNOWN_ATTRIBUTE",
                field="by",
            )
        groups = np.zeros(len(names), np.int64)
        mine = [attributes.get(item_id, {}).get(by, "") for item_id in item_ids]
    place = {name: number for number, name in enumerate(names)}
    return names, groups.astype(np.int64), np.array([place.get(m, -1) for m in mine], np.int64)

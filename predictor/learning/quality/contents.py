"""Rows, users, behavior types and items that are odd, whatever their times."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from foretell.importing import EventColumns
from foretell.types import Item
from predictor.learning.quality.findings import EXAMPLES, Finding, Mask, counted, most_frequent
from predictor.learning.quality.times import resolution
from predictor.models.history import MICROSECONDS, Ints

RARE_EVENTS = 3
"""A behavior type with fewer cannot be in training, validation and test."""

RARE_SHARE = 0.001
"""Of all events: a type with less is hardly learned."""

LARGE_SHARE = 0.02
"""Of all events: a user with this much, and LARGE_TIMES the median, weighs on every figure."""

LARGE_TIMES = 10


def duplicates(columns: EventColumns) -> Finding | None:
    """Events equal in user, type, item, text and time, all but the first of each.

    A basket may hold two of one thing, and the event store keeps both; so does training. Where
    times tell no seconds apart, equal rows are no sign of anything.
    """
    times = columns.timestamp
    if times is None:
        return None
    keys = (columns.text, columns.item, columns.behavior_type, times, columns.user)
    by = np.lexsort(keys)  # stable: the first of the source comes first
    equal = np.ones(max(0, len(columns) - 1), np.bool_)
    for key in keys:
        equal &= key[by][1:] == key[by][:-1]
    if not equal.any():
        return None
    some = np.zeros(len(columns), np.bool_)
    some[by[1:][equal]] = True
    fine = resolution(times) <= MICROSECONDS
    return Finding(
        "duplicates",
        f"{counted(int(some.sum()), len(columns), 'events')} repeat another in user, type, item, "
        "text and time",
        "kept, as the event store keeps them: a basket may hold two of one thing"
        + ("; --clean drops them" if fine else ", and the times do not tell seconds apart"),
        some,
        drops=fine,
        noise=True,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def missing(columns: EventColumns) -> list[Finding]:
    """Events without an item, or a text, in a set in which others have one."""
    found = []
    for name, codes in (("item", columns.item), ("text", columns.text)):
        none = codes < 0
        if none.any() and not none.all():
            counts = counted(int(none.sum()), len(columns), "events")
            reads = "their text is read" if name == "item" else "their item is read"
            found.append(
                Finding(f"events_without_{name}", f"{counts} have no {name}", f"kept: {reads}",
                        none)
            )  # fmt: skip
    return found


def single_events(columns: EventColumns) -> Finding | None:
    """Users with one event, which has no past and no future."""
    counts = np.bincount(columns.user, minlength=len(columns.user_ids))
    single = counts == 1
    if not single.any():
        return None
    return Finding(
        "users_with_one_event",
        f"{counted(int(single.sum()), len(np.unique(columns.user)), 'users')} have one event",
        "kept: it counts for what is popular, and shows how a first event looks",
        single[columns.user],
        noise=True,
        examples=_first(np.flatnonzero(single), columns.user_ids),
    )


def large_users(columns: EventColumns) -> Finding | None:
    """Users who have a large share of all events, and far more than others."""
    counts = np.bincount(columns.user, minlength=len(columns.user_ids))
    least = max(LARGE_SHARE * len(columns), LARGE_TIMES * np.median(counts[counts > 0]))
    large = counts >= least
    if not large.any():
        return None
    some: Mask = large[columns.user]
    return Finding(
        "large_users",
        f"{int(large.sum()):,} of {len(np.unique(columns.user)):,} users have "
        f"{counted(int(some.sum()), len(columns), 'events')}, the largest "
        f"{int(counts.max()):,}",
        "kept: intervals that draw users, not events, allow for it",
        some,
        noise=True,
        examples=most_frequent(columns.user[some], columns.user_ids),
    )


def constants(columns: EventColumns) -> list[Finding]:
    """One behavior type, item or text in all events that have one: it tells nothing apart."""
    found = []
    for name, codes, names in (
        ("behavior type", columns.behavior_type, columns.behavior_types),
        ("item", columns.item, columns.item_ids),
        ("text", columns.text, ()),
    ):
        some = codes[codes >= 0]
        if len(some) >= 2 and some.min() == some.max():
            examples = (names[some[0]],) if names else ()
            found.append(
                Finding(
                    f"one_{name.replace(' ', '_')}",
                    f"all {len(some):,} events with {name} have the same one",
                    "kept: it is read, and has nothing to say",
                    examples=examples,
                )
            )
    return found


def rare_types(columns: EventColumns) -> Finding | None:
    """Behavior types that are almost never used."""
    counts = np.bincount(columns.behavior_type, minlength=len(columns.behavior_types))
    rare = (counts < max(RARE_EVENTS, RARE_SHARE * len(columns))) & (counts > 0)
    if not rare.any():
        return None
    some: Mask = rare[columns.behavior_type]
    return Finding(
        "rare_types",
        f"{counted(int(rare.sum()), int((counts > 0).sum()), 'behavior types')} have together "
        f"{counted(int(some.sum()), len(columns), 'events')}",
        "kept: one that training has not seen is counted as missed",
        some,
        examples=_first(np.flatnonzero(rare), columns.behavior_types),
    )


def spelling_variants(columns: EventColumns) -> Finding | None:
    """Behavior types that differ in case, white space, hyphens and underscores alone."""
    counts = np.bincount(columns.behavior_type, minlength=len(columns.behavior_types))
    groups: dict[str, list[int]] = defaultdict(list)
    for code in np.flatnonzero(counts).tolist():
        groups[_spelling(columns.behavior_types[code])].append(code)
    several = [codes for codes in groups.values() if len(codes) > 1]
    if not several:
        return None
    lesser = np.zeros(len(counts), np.bool_)
    examples = []
    for codes in several:
        most, *others = sorted(codes, key=lambda code: -counts[code])
        lesser[others] = True
        examples += [f"{columns.behavior_types[code]} = {columns.behavior_types[most]}"
                     for code in others]  # fmt: skip
    some: Mask = lesser[columns.behavior_type]
    return Finding(
        "spelling_variants",
        f"{int(lesser.sum()):,} behavior types look like another spelling of one, with "
        f"{counted(int(some.sum()), len(columns), 'events')}",
        "kept as types of their own: only you know; the same must be sent to the service",
        some,
        examples=tuple(examples[:EXAMPLES]),
    )


def _spelling(name: str) -> str:
    """Separators between letters go; those beside a digit or sign tell apart: A and A-, 1-1."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])", "", folded)


def of_items(columns: EventColumns, items: Sequence[Item] | None) -> list[Finding]:
    """Items without text, without events, and events whose item is in no catalogue."""
    if items is None:
        return []
    ids = {item.id for item in items}
    silent = {item.id for item in items if not item.text}
    used = set(_used(columns))
    found = []
    if silent:
        found.append(
            Finding(
                "items_without_text",
                f"{counted(len(silent), len(items), 'items')} have no text",
                "kept: known by their events alone, and by nothing while they have none",
                _events_of(columns, silent),
                examples=tuple(item.id for item in items if not item.text)[:EXAMPLES],
            )
        )
    if used and (unseen := tuple(item.id for item in items if item.id not in used)):
        found.append(
            Finding(
                "items_without_events",
                f"{counted(len(unseen), len(items), 'items')} are in no event",
                "kept: they can be predicted from their texts",
                examples=unseen[:EXAMPLES],
            )
        )
    if unknown := used - ids:
        some = _events_of(columns, unknown)
        found.append(
            Finding(
                "unknown_items",
                f"{counted(len(unknown), len(used), 'items of events')} are in no list of items, "
                f"with {counted(int(some.sum()), len(columns), 'events')}",
                "kept as events without a known item; as targets they count as missed",
                some,
                examples=most_frequent(columns.item[some], columns.item_ids),
            )
        )
    return found


def _used(columns: EventColumns) -> list[str]:
    return [columns.item_ids[at] for at in np.unique(columns.item[columns.item >= 0]).tolist()]


def _events_of(columns: EventColumns, ids: set[str]) -> Mask:
    # The last element stands for the events without an item.
    chosen = np.array([item_id in ids for item_id in columns.item_ids] + [False])
    some: Mask = chosen[columns.item]
    return some


def _first(codes: Ints, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names[at] for at in codes[:EXAMPLES].tolist())

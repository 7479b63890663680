"""What the callers ingest: few cells a user, so that writes meet, and each event tells its cell.

A cell is a place for one event of a user: the event's attribute `cell` has its name, and every
other one an event_id too. What the event says beside that is the cell's value.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from bench.crashing.model import Key, Value
from foretell.types import Event

TYPES = ("view", "buy", "search", "comment")
ITEM_IDS = ("", *(f"item {number:02}" for number in range(40)))
TEXTS = ("", *(f"{colour} {goods}" for colour in ("red", "green", "blue", "white")
               for goods in ("shoes", "coat", "hat", "scarf", "gloves")))  # fmt: skip
MINUTES = 1_000
"""Times that events may have; events without one have the service's clock, which is later."""
START = datetime(2024, 1, 1, tzinfo=UTC)

CELL = "cell"
"""The attribute."""

CELLS = tuple(f"{number:03}" for number in range(200))
"""Of each user."""


def with_id(cell: str) -> bool:
    """Whether its event has an event_id."""
    return int(cell) % 2 == 0


def some_value(rng: np.random.Generator) -> str:
    """What an event may say: type, item, text and minute; empty: it has none."""
    item, text = str(rng.choice(ITEM_IDS)), str(rng.choice(TEXTS))
    minute = str(rng.integers(MINUTES)) if rng.random() < 0.7 else ""
    return "|".join((str(rng.choice(TYPES)), item or ("" if text else ITEM_IDS[1]), text, minute))


def event(key: Key, value: str) -> Event:
    """The event of a cell."""
    behavior_type, item_id, text, minute = value.split("|")
    return Event(
        key.collection,
        behavior_type,
        START + timedelta(minutes=int(minute)) if minute else None,
        item_id=item_id,
        text=text,
        event_id=f"{key.collection}/{key.id}" if with_id(key.id) else "",
        attributes={CELL: key.id},
    )


def cell_of(event: Event) -> tuple[Key, Value]:
    """The cell of an event as it is listed, and its value."""
    assert event.timestamp is not None
    minutes = (event.timestamp - START) / timedelta(minutes=1)
    minute = f"{minutes:g}" if minutes < MINUTES else ""
    value = "|".join((event.behavior_type, event.item_id, event.text, minute))
    return Key(event.user_id, event.attributes.get(CELL, "")), value


def user_ids(caller: int) -> Sequence[str]:
    """The users of one caller: nobody else writes theirs, so that it knows their state."""
    return [f"user {caller}-{number}" for number in range(6)]

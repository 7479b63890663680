"""Writes of the event store: functions of a connection, run in a transaction."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from foretell import limits


class NewEvent(NamedTuple):
    """An event to store, checked."""

    user_id: str
    behavior_type: str
    time_us: int
    """Microseconds since 1970."""
    item_id: str | None
    text: str | None
    text_id: str | None
    event_id: str | None
    attributes: str | None
    """A JSON object."""


class Outcome(Enum):
    """What became of an event."""

    STORED = 0
    DUPLICATE = 1
    """Its event_id is known."""
    REFUSED = 2
    """Its behavior type would be one too many."""


def ingest(connection: sqlite3.Connection, events: Sequence[NewEvent]) -> list[Outcome]:
    """Stores a batch, in its order, within the connection's transaction."""
    known = _known_ids(connection, events)
    types: dict[str, int] = dict(connection.execute("SELECT name, type FROM types"))
    outcomes = []
    for event in events:
        if event.event_id in known:
            outcomes.append(Outcome.DUPLICATE)
        elif not _has_number(connection, types, event.behavior_type):
            outcomes.append(Outcome.REFUSED)
        else:
            outcomes.append(Outcome.STORED)
            if event.event_id is not None:
                known.add(event.event_id)
    stored = [
        event for event, outcome in zip(events, outcomes, strict=True) if outcome is Outcome.STORED
    ]
    users = _user_numbers(connection, {event.user_id for event in stored})
    texts = _text_numbers(connection, stored)
    connection.executemany(
        "UPDATE types SET events = events + ? WHERE type = ?",
        [(count, types[name]) for name, count in Counter(e.behavior_type for e in stored).items()],
    )
    connection.executemany(
        "INSERT INTO events (user, type, time, item_id, text, event_id, attributes)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                users[event.user_id],
                types[event.behavior_type],
                event.time_us,
                event.item_id,
                texts[event.text_id] if event.text_id else None,
                event.event_id,
                event.attributes,
            )
            for event in stored
        ],
    )
    return outcomes


def _known_ids(connection: sqlite3.Connection, events: Sequence[NewEvent]) -> set[str]:
    """The event_ids that are stored."""
    ids = [event.event_id for event in events if event.event_id]
    if not ids:
        return set()
    return {
        event_id
        for (event_id,) in connection.execute(
            "SELECT event_id FROM events WHERE event_id IN (SELECT value FROM json_each(?))",
            (json.dumps(ids),),
        )
    }


def _has_number(connection: sqlite3.Connection, types: dict[str, int], name: str) -> bool:
    """Whether a type is among the `types`: a new one is added while there is room."""
    if name not in types and len(types) < limits.BEHAVIOR_TYPES:
        types[name] = _insert(connection, "INSERT INTO types (name, events) VALUES (?, 0)", name)
    return name in types


def _user_numbers(connection: sqlite3.Connection, user_ids: Iterable[str]) -> dict[str, int]:
    users: dict[str, int] = {}
    for user_id in user_ids:
        row = connection.execute("SELECT user FROM users WHERE user_id = ?", (user_id,)).fetchone()
        users[user_id] = (
            row[0]
            if row
            else _insert(connection, "INSERT INTO users (user_id) VALUES (?)", user_id)
        )
    return users


def _text_numbers(connection: sqlite3.Connection, events: Sequence[NewEvent]) -> dict[str, int]:
    """Rows of the events' texts, by text_id; their counts of events grow."""
    texts: dict[str, int] = {}
    uses = Counter(event.text_id for event in events if event.text_id)
    by_id = {event.text_id: event.text for event in events if event.text_id}
    for text_id, count in uses.items():
        # A text that no event had any more may be on its way out of the embedder: it is new again.
        (texts[text_id],) = connection.execute(
            """
            INSERT INTO texts (text_id, text, events, state) VALUES (?, ?, ?, 0)
            ON CONFLICT (text_id) DO UPDATE SET
                state = CASE WHEN events = 0 THEN 0 ELSE state END,
                events = events + excluded.events
            RETURNING number
            """,
            (text_id, by_id[text_id], count),
        ).fetchone()
    return texts


def _insert(connection: sqlite3.Connection, statement: str, value: str) -> int:
    number = connection.execute(statement, (value,)).lastrowid
    assert number is not None
    return number


def delete_user(connection: sqlite3.Connection, user_id: str) -> int:
    """Deletes a user's events; texts that no event has now are left to be deleted.

    Returns how many events there were.
    """
    row = connection.execute("SELECT user FROM users WHERE user_id = ?", (user_id,)).fetchone()
    if row is None:
        return 0
    connection.execute(
        """
        UPDATE texts SET events = texts.events - gone.times
        FROM (SELECT text, count(*) AS times FROM events
              WHERE user = ? AND text IS NOT NULL GROUP BY text) AS gone
        WHERE texts.number = gone.text
        """,
        row,
    )
    connection.execute(
        """
        UPDATE types SET events = types.events - gone.times
        FROM (SELECT type, count(*) AS times FROM events WHERE user = ? GROUP BY type) AS gone
        WHERE types.type = gone.type
        """,
        row,
    )
    connection.execute("DELETE FROM types WHERE events = 0")
    deleted = connection.execute("DELETE FROM events WHERE user = ?", row).rowcount
    connection.execute("DELETE FROM users WHERE user = ?", row)
    return deleted


def new_deletion_id() -> str:
    """A name for a deletion."""
    return str(uuid.uuid4())

"""The event store: what users did, in SQLite.

Users, behavior types and texts are rows of their own, so that an event is a few integers. Events
of one user are read by the index (user, time, event); `event` grows with every insert, so events
of one time keep the order in which they came.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from foretell import limits
from serving.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS users (
    user INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE
);
CREATE TABLE IF NOT EXISTS types (
    type INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    events INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
    event INTEGER PRIMARY KEY AUTOINCREMENT,
    user INTEGER NOT NULL,
    type INTEGER NOT NULL,
    time INTEGER NOT NULL,
    item_id TEXT,
    text INTEGER,
    event_id TEXT,
    attributes TEXT
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user, time, event);
CREATE INDEX IF NOT EXISTS events_of_type ON events (type, time);
CREATE UNIQUE INDEX IF NOT EXISTS events_event_id ON events (event_id) WHERE event_id IS NOT NULL;
"""

POPULAR_EVENTS = 100_000
"""Latest stored events that `popular` counts."""

PAGE_BYTES = 16 * 1024 * 1024
"""A page of ListEvents ends early when its texts and attributes are larger than this, so that it
stays below the message limit."""


class PastEvent(NamedTuple):
    """An event as a prediction reads it."""

    behavior_type: str
    time_us: int
    item_id: str
    """Empty where there is none."""
    text_id: str
    """Empty where there is no text."""
    text: str
    """Of stored events only where it was asked for."""


@dataclass(frozen=True, slots=True)
class History:
    """Events of a user as predictions read them, oldest first: PastEvent's fields as columns."""

    behavior_types: Sequence[str] = ()
    times_us: Sequence[int] = ()
    item_ids: Sequence[str] = ()
    text_ids: Sequence[str] = ()
    texts: Sequence[str] = ()

    @classmethod
    def of(cls, events: Iterable[PastEvent]) -> History:
        """The events as columns."""
        return cls(*map(list, zip(*events, strict=True)))

    def __len__(self) -> int:
        return len(self.times_us)

    def last(self, count: int) -> History:
        """The latest `count` of them; at least one is asked for."""
        if len(self) <= count:
            return self
        return History(
            self.behavior_types[-count:],
            self.times_us[-count:],
            self.item_ids[-count:],
            self.text_ids[-count:],
            self.texts[-count:],
        )

    def followed_by(self, later: History) -> History:
        """These events, then the others."""
        if not len(later):
            return self
        if not len(self):
            return later
        return History(
            [*self.behavior_types, *later.behavior_types],
            [*self.times_us, *later.times_us],
            [*self.item_ids, *later.item_ids],
            [*self.text_ids, *later.text_ids],
            [*self.texts, *later.texts],
        )


class StoredEvent(NamedTuple):
    """An event as it was ingested, with its place in the order of the list."""

    time_us: int
    event: int
    behavior_type: str
    item_id: str
    text: str
    event_id: str
    attributes: dict[str, str]


@dataclass(frozen=True)
class Counts:
    """What the store holds."""

    events: int
    users: int
    pending_texts: int


@dataclass(frozen=True)
class Popularity:
    """How often items occur in the latest events."""

    events: int
    """Number of these events, with or without an item."""
    items: dict[str, int]
    """Occurrences by item id: most frequent first, of equals the latest."""


class EventStore:
    """Reads of the events in a Database; writes are functions of a connection for `db.write`."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._clock = Clock()

    def now(self, events: int) -> int:
        """The first of `events` successive microseconds of the clock, none given out before."""
        return self._clock.reserve(events)

    def histories(
        self, user_ids: Sequence[str], last: int, *, texts: bool = False
    ) -> dict[str, History]:
        """The users' last events; their texts too if asked for.

        Unknown users are left out. Each user is one row, whose columns are JSON: sqlite3 lets other
        threads run between two rows, and takes its turn among them before the next.
        """
        text = "coalesce(texts.text, '')" if texts else "''"
        rows = self.db.connection().execute(
            f"""
            SELECT user_id, (
                SELECT json_array(
                    json_group_array(type), json_group_array(time), json_group_array(item_id),
                    json_group_array(text_id), json_group_array(text)
                ) FROM (
                    SELECT types.name AS type, time, coalesce(item_id, '') AS item_id,
                        coalesce(text_id, '') AS text_id, {text} AS text
                    FROM events INDEXED BY events_of_user
                    JOIN types ON types.type = events.type
                    LEFT JOIN texts ON texts.number = events.text
                    WHERE events.user = users.user
                    ORDER BY time DESC, event DESC LIMIT ?
                )
            )
            FROM users WHERE user_id IN (SELECT value FROM json_each(?))
            """,
            (last, json.dumps(user_ids)),
        )
        return {
            user_id: History(*(column[::-1] for column in orjson.loads(columns)))
            for user_id, columns in rows
        }

    def items_of(self, user_id: str) -> tuple[int, list[str]]:
        """Over the user's last 5,000 events: their number, and the item of each that has one,
        latest first."""
        rows = self.db.connection().execute(
            """
            SELECT item_id FROM events INDEXED BY events_of_user
            WHERE user = (SELECT user FROM users WHERE user_id = ?)
            ORDER BY time DESC, event DESC LIMIT ?
            """,
            (user_id, limits.HISTORY_EVENTS),
        )
        items = [item_id for (item_id,) in rows]
        return len(items), [item_id for item_id in items if item_id is not None]

    def page(
        self, user_id: str, size: int, before: tuple[int, int] | None
    ) -> tuple[list[StoredEvent], tuple[int, int] | None]:
        """Up to `size` events older than `before` (time and event of one), newest first.

        The second value is `before` of the next page; None on the last one.
        """
        rows = self.db.connection().execute(
            """
            SELECT time, event, types.name, item_id, texts.text, event_id, attributes
            FROM events INDEXED BY events_of_user
            JOIN types ON types.type = events.type
            LEFT JOIN texts ON texts.number = events.text
            WHERE user = (SELECT user FROM users WHERE user_id = ?) AND (time, event) < (?, ?)
            ORDER BY time DESC, event DESC LIMIT ?
            """,
            (user_id, *(before or (2**63 - 1, 2**63 - 1)), size + 1),
        )
        page: list[StoredEvent] = []
        characters = 0
        for time_us, event, name, item_id, text, event_id, attributes in rows:
            characters += len(text or "") + len(attributes or "")
            # A character takes up to four bytes in UTF-8.
            if len(page) == size or (page and characters * 4 > PAGE_BYTES):
                return page, (page[-1].time_us, page[-1].event)
            page.append(
                StoredEvent(
                    time_us,
                    event,
                    name,
                    item_id or "",
                    text or "",
                    event_id or "",
                    json.loads(attributes) if attributes else {},
                )
            )
        return page, None

    def counts(self) -> Counts:
        """What the store holds."""
        with self.db.snapshot() as connection:
            (events,) = connection.execute("SELECT coalesce(sum(events), 0) FROM types").fetchone()
            (users,) = connection.execute("SELECT count(*) FROM users").fetchone()
            (pending,) = connection.execute(
                "SELECT count(*) FROM texts WHERE state = 0 AND events > 0"
            ).fetchone()
        return Counts(events, users, pending)

    def type_counts(self) -> dict[str, int]:
        """Events by behavior type."""
        return dict(self.db.connection().execute("SELECT name, events FROM types WHERE events > 0"))

    def change_mark(self) -> tuple[int, int]:
        """Differs whenever events came or went since."""
        connection = self.db.connection()
        row = connection.execute(
            "SELECT coalesce(max(event), 0), (SELECT coalesce(sum(events), 0) FROM types)"
            " FROM events"
        ).fetchone()
        return row[0], row[1]

    def popular(self) -> Popularity:
        """Counts items over the latest POPULAR_EVENTS events."""
        latest = "SELECT event, item_id FROM events ORDER BY event DESC LIMIT ?"
        with self.db.snapshot() as connection:
            (events,) = connection.execute(
                f"SELECT count(*) FROM ({latest})", (POPULAR_EVENTS,)
            ).fetchone()
            items = connection.execute(
                f"""
                SELECT item_id, count(*) AS times FROM ({latest}) WHERE item_id IS NOT NULL
                GROUP BY item_id ORDER BY times DESC, max(event) DESC
                """,
                (POPULAR_EVENTS,),
            )
            return Popularity(events, dict(items))


class Clock:
    """Microseconds of the wall clock, each given out once.

    Events without a timestamp are no basket because they came in one call: each gets its own
    microsecond, in their order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0

    def reserve(self, count: int) -> int:
        """The first of `count` successive microseconds."""
        with self._lock:
            first = max(time.time_ns() // 1_000, self._next)
            self._next = first + count
            return first

"""Retention: events that are older than their behavior type is kept go, in the background."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping

from foretell import limits
from foretell.errors import ForetellError
from predictor.processes import Presence
from serving.database import Database

log = logging.getLogger(__name__)

LEASE = "retention"
"""Held by the one process that deletes."""

TOGETHER = 250
"""Events deleted in one transaction: some milliseconds, for which ingestion waits."""

LOOK_S = 60.0
"""Between two looks at what has become too old."""

DAY_US = 86_400 * 1_000_000


class Retention:
    """The background task that deletes what has become too old.

    Attributes:
        deleted: events that this process deleted, by behavior type.
    """

    def __init__(
        self, db: Database, presence: Presence, days: int, by_type: Mapping[str, int]
    ) -> None:
        """`days`: of all types that `by_type` does not name; 0 keeps for ever."""
        self.deleted: Counter[str] = Counter()
        self._db = db
        self._presence = presence
        self._days = days
        self._by_type = by_type

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            try:
                if await self._presence.hold(LEASE):
                    await self._round()
            except ForetellError as error:
                log.warning("old events wait: %s", error.message)
            await asyncio.sleep(LOOK_S)

    async def _round(self) -> None:
        """Deletes all that is too old now."""
        await self._db.write(forget_requests)
        connection = self._db.connection()
        for type_, name in connection.execute("SELECT type, name FROM types").fetchall():
            days = self._by_type.get(name, self._days)
            if not days:
                continue
            before = time.time_ns() // 1_000 - days * DAY_US
            while await self._presence.hold(LEASE):
                began = time.monotonic()
                count = await self._db.write(_expiry(type_, before))
                self.deleted[name] += count
                if count < TOGETHER:
                    break
                # Others write at least half of the time.
                await asyncio.sleep(time.monotonic() - began)


def _expiry(type_: int, before: int) -> Callable[[sqlite3.Connection], int]:
    return lambda connection: expire(connection, type_, before)


def expire(connection: sqlite3.Connection, type_: int, before: int) -> int:
    """Deletes up to TOGETHER events of a type that are older than `before`, the oldest first.

    Their users go with their last events; texts that no event has now are left to be deleted.
    Returns how many events there were.
    """
    events = connection.execute(
        "SELECT event, user, text FROM events INDEXED BY events_of_type"
        " WHERE type = ? AND time < ? ORDER BY time LIMIT ?",
        (type_, before, TOGETHER),
    ).fetchall()
    if not events:
        return 0
    texts = Counter(text for _, _, text in events if text is not None)
    connection.executemany(
        "UPDATE texts SET events = events - ? WHERE number = ?",
        [(count, text) for text, count in texts.items()],
    )
    connection.execute("UPDATE types SET events = events - ? WHERE type = ?", (len(events), type_))
    connection.execute("DELETE FROM types WHERE type = ? AND events = 0", (type_,))
    connection.execute(
        "DELETE FROM events WHERE event IN (SELECT value FROM json_each(?))",
        (json.dumps([event for event, _, _ in events]),),
    )
    connection.execute(
        "DELETE FROM users WHERE user IN (SELECT value FROM json_each(?))"
        " AND NOT EXISTS (SELECT 1 FROM events WHERE events.user = users.user)",
        (json.dumps(list({user for _, user, _ in events})),),
    )
    return len(events)


def forget_requests(connection: sqlite3.Connection) -> None:
    """Deletes answers that no repeated request may ask for any more."""
    connection.execute(
        "DELETE FROM requests WHERE created_at < ?", (time.time() - limits.REQUEST_ID_SECONDS,)
    )

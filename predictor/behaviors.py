"""Behavior texts: each once, with the number of events that have it, on its way into the embedder.

A text is a row with a state. New ones are upserted to the collection `behaviors`; those that no
event has any more are deleted there, then here. Both are repeated until the embedder has
answered, so neither its absence nor kill -9 loses one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import time

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import ForetellError, from_status
from predictor.embedder import Embedder
from predictor.processes import Presence
from serving.database import Database

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (
    number INTEGER PRIMARY KEY,
    text_id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    events INTEGER NOT NULL,
    state INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS texts_new ON texts (events) WHERE state = 0;
CREATE INDEX IF NOT EXISTS texts_orphaned ON texts (number) WHERE events = 0;
"""

# States of a text: 0 new, 1 in the embedder, 2 refused by it.

COLLECTION = "behaviors"
"""The embedder's collection of behavior texts."""

LEASE = "behaviors"
"""Held by the one process that talks to the embedder about texts."""

UPSERT_TEXTS = 256
"""Texts in one call: some seconds of encoding on a small CPU."""

DELETE_TEXTS = 10_000
"""Ids in one call."""

CALL_S = 120.0
"""Deadline of one call. It waits for an absent embedder: gRPC paces the attempts."""


class BehaviorTexts:
    """The background task that keeps `behaviors` in step with the events."""

    def __init__(self, db: Database, embedder: Embedder, presence: Presence) -> None:
        self._db = db
        self._embedder = embedder
        self._presence = presence
        self._changed = asyncio.Event()
        self._oldest = (0, 0.0)
        """The text that has waited longest, and since when that is known."""

    def changed(self) -> None:
        """Says that texts may have come or gone: they need not wait for the next look."""
        self._changed.set()

    def lag_s(self) -> float:
        """How long the text that has waited longest is known to wait, by calls of this method."""
        (number,) = (
            self._db.connection()
            .execute("SELECT min(number) FROM texts WHERE state = 0 AND events > 0")
            .fetchone()
        )
        now = time.monotonic()
        if number != self._oldest[0]:
            self._oldest = (number, now)
        return 0.0 if number is None else now - self._oldest[1]

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            self._changed.clear()
            try:
                while await self._presence.hold(LEASE) and await self._step():
                    pass
            except ForetellError as error:
                log.warning("behavior texts wait: %s", error.message)
                await asyncio.sleep(error.retry_after_s or 1.0)
            # Other processes' events show at the next look only.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._presence.heartbeat_s)

    async def _step(self) -> bool:
        """One batch of each kind; whether there was any."""
        upserted = await self._upsert()
        return await self._delete() or upserted

    async def _upsert(self) -> bool:
        rows = await asyncio.to_thread(self._read_new)
        if not rows:
            return False
        request = pb.UpsertItemsRequest(
            collection=COLLECTION,
            items=[pb.Item(id=text_id, text=text) for _, text_id, text in rows],
        )
        response = await self._embedder.call(
            self._embedder.stub.UpsertItems, request, CALL_S, wait_for_ready=True
        )
        refused = {failure.index for failure in response.failures}
        if response.failures:
            first = response.failures[0]
            log.error(
                "the embedder refused %d behavior texts, the first (%s): %s",
                len(refused),
                rows[first.index][1],
                from_status(first.status).message,
            )
        states = [(2 if at in refused else 1, number) for at, (number, _, _) in enumerate(rows)]
        await self._db.write(lambda connection: _mark(connection, states))
        return True

    async def _delete(self) -> bool:
        rows = await asyncio.to_thread(self._read_orphaned)
        if not rows:
            return False
        request = pb.DeleteItemsRequest(collection=COLLECTION, ids=[text_id for _, text_id in rows])
        await self._embedder.call(
            self._embedder.stub.DeleteItems, request, CALL_S, wait_for_ready=True
        )
        numbers = [number for number, _ in rows]
        await self._db.write(lambda connection: _forget(connection, numbers))
        return True

    def _read_new(self) -> list[tuple[int, str, str]]:
        return (
            self._db.connection()
            .execute(
                "SELECT number, text_id, text FROM texts WHERE state = 0 AND events > 0 LIMIT ?",
                (UPSERT_TEXTS,),
            )
            .fetchall()
        )

    def _read_orphaned(self) -> list[tuple[int, str]]:
        return (
            self._db.connection()
            .execute("SELECT number, text_id FROM texts WHERE events = 0 LIMIT ?", (DELETE_TEXTS,))
            .fetchall()
        )


def _mark(connection: sqlite3.Connection, states: list[tuple[int, int]]) -> None:
    connection.executemany("UPDATE texts SET state = ? WHERE number = ?", states)


def _forget(connection: sqlite3.Connection, numbers: list[int]) -> None:
    """Removes texts that are gone from the embedder, but for those that an event has again."""
    connection.execute(
        "DELETE FROM texts WHERE events = 0 AND number IN (SELECT value FROM json_each(?))",
        (json.dumps(numbers),),
    )

"""Which predictor processes live on this database, and what each of them has taken on.

Times are of the clock that counts from the machine's start, sleep included, which nobody sets; a
process's name begins with the id of that start, so that rows from before it count for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import ForetellError
from serving.database import Database

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS processes (
    process TEXT PRIMARY KEY,
    heartbeat_at REAL NOT NULL,
    generation INTEGER NOT NULL,
    note TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    expires_at REAL NOT NULL
) WITHOUT ROWID;
"""

MISSED = 5
"""Heartbeats that a process may miss before it counts as gone."""

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""The same for all processes of a machine; Linux has the first."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Linux's id of the machine's start."""


def boot_id() -> str:
    """Id of the machine's start; "0" where the system tells none."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else "0"


@dataclass(frozen=True)
class Process:
    """A live process."""

    name: str
    generation: int
    """The activation that it has followed; see registry."""
    note: str
    """Why it has not followed the latest, if it knows."""


class Presence:
    """This process's heartbeat row, and the leases that it holds.

    A lease is work that one process does for all. It is renewed with the heartbeat, so it passes
    on soon after its holder has died.
    """

    def __init__(self, db: Database, heartbeat_s: float) -> None:
        self._db = db
        self.heartbeat_s = heartbeat_s
        boot = boot_id()
        self.name = f"{boot}:{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"
        self._this_boot = f"{boot}:*"
        self._generation = 0
        self._note = ""
        self._held: dict[str, float] = {}

    async def beat(self) -> None:
        """Writes the heartbeat now."""
        await self._db.write(self._beat)

    async def run(self, each: Callable[[], object]) -> None:
        """Writes it regularly until it is cancelled, and calls `each` after every one."""
        while True:
            try:
                await self.beat()
            except ForetellError as error:
                log.warning("no heartbeat: %s", error.message)
            each()
            await asyncio.sleep(self.heartbeat_s)

    async def report(self, generation: int, note: str = "") -> None:
        """Says which activation this process has followed."""
        self._generation, self._note = generation, note
        await self.beat()

    async def leave(self) -> None:
        """Removes this process's row and leases: others need not wait for them to expire.

        Where the disk does not take that, they expire: it is no reason to end badly.
        """
        try:
            await self._db.write(self._leave)
        except ForetellError as error:
            log.warning("this process's leases are left to expire: %s", error.message)

    async def hold(self, lease: str) -> bool:
        """Takes a lease, if it is free or this process's already; whether it has it now."""
        # One that the heartbeat has just renewed needs no write.
        if self._held.get(lease, 0.0) > _now() + self._expiry_s / 2:
            return True
        return await self._db.write(lambda connection: self._take(connection, lease))

    async def release(self, lease: str) -> None:
        """Gives a lease back."""
        await self._db.write(lambda connection: self._release(connection, lease))

    def live(self) -> list[Process]:
        """Processes whose heartbeat was seen lately, this one included."""
        rows = self._db.connection().execute(
            "SELECT process, generation, note FROM processes WHERE heartbeat_at > ?"
            " AND process GLOB ? ORDER BY process",
            (_now() - self._expiry_s, self._this_boot),
        )
        return [Process(*row) for row in rows]

    @property
    def _expiry_s(self) -> float:
        return MISSED * self.heartbeat_s

    def _beat(self, connection: sqlite3.Connection) -> None:
        now = _now()
        connection.execute(
            "INSERT OR REPLACE INTO processes VALUES (?, ?, ?, ?)",
            (self.name, now, self._generation, self._note),
        )
        connection.execute(
            "DELETE FROM processes WHERE heartbeat_at < ? OR process NOT GLOB ?",
            (now - 100 * self._expiry_s, self._this_boot),
        )
        for lease in tuple(self._held):
            self._take(connection, lease)

    def _take(self, connection: sqlite3.Connection, lease: str) -> bool:
        """Takes or renews it; runs in the database's writer thread only."""
        now = _now()
        taken = connection.execute(
            """
            INSERT INTO leases VALUES (?, ?, ?)
            ON CONFLICT (name) DO UPDATE SET holder = excluded.holder,
                expires_at = excluded.expires_at
            WHERE holder = excluded.holder OR expires_at < ? OR holder NOT GLOB ?
            """,
            (lease, self.name, now + self._expiry_s, now, self._this_boot),
        )
        if taken.rowcount > 0:
            self._held[lease] = now + self._expiry_s
            return True
        self._held.pop(lease, None)
        return False

    def _release(self, connection: sqlite3.Connection, lease: str) -> None:
        self._held.pop(lease, None)
        connection.execute("DELETE FROM leases WHERE name = ? AND holder = ?", (lease, self.name))

    def _leave(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM processes WHERE process = ?", (self.name,))
        connection.execute("DELETE FROM leases WHERE holder = ?", (self.name,))


def _now() -> float:
    """Seconds since the machine's start."""
    return time.clock_gettime(CLOCK)

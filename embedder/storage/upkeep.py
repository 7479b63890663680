"""The background work of a server: indexes are built and compacted, snapshots are written."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from dataclasses import dataclass

from embedder.storage.collection import Collection
from embedder.storage.collections import Collections

log = logging.getLogger(__name__)

PAUSE_S = 0.5
"""Between two rounds."""

NICENESS = 10
"""Of the thread, and so of faiss' threads below it: with both cores busy, writes became a quarter
faster while an index was built."""

RETRY_S = 60.0
"""After a failure."""

CHANGED_SHARE = 0.25
"""Share of a collection that must have changed for a snapshot: then one that grows is written about
five times over in all, and a start replays at most this much."""

CHANGED_SHARE_AT_END = 0.1
"""The same when the server ends. Below it, a replay takes less time than the writing."""


class _StoppedError(Exception):
    """The server ends."""


@dataclass
class _Kept:
    """A collection at its last snapshot."""

    changes: int = 0
    searched_by: str = "exact"
    retry_at: float = 0.0


class Upkeep:
    """One thread for what may wait.

    No other calls `maintain` of an index, so that a snapshot never meets a half-changed one.
    """

    def __init__(self, collections: Collections, least_changes: int) -> None:
        """`least_changes`: vectors of a collection that must have changed for a snapshot."""
        self._collections = collections
        self._least = least_changes
        self._kept = {
            one.row.number: _Kept(searched_by=one.index.name) for one in collections.all()
        }
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._wake.set()
        collections.listeners.append(self._wake.set)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after those snapshots that save time at the next start."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while not self._stop.is_set():
            self._wake.wait(RETRY_S)
            self._wake.clear()
            for collection in self._collections.all():
                self._tend(collection)
            self._clear()
            self._stop.wait(PAUSE_S)
        for collection in self._collections.all():
            if self._due(collection, CHANGED_SHARE_AT_END):
                self._write(collection)

    def _tend(self, collection: Collection) -> None:
        """Maintains an index, and writes its snapshot where one is due."""
        kept = self._kept.setdefault(collection.row.number, _Kept())
        if time.monotonic() < kept.retry_at:
            return
        try:
            while not self._stop.is_set() and collection.index.maintain():
                pass
        except Exception:
            log.exception("the index of collection %s could not be kept up", collection.row.name)
            kept.retry_at = time.monotonic() + RETRY_S
            return
        if self._due(collection, CHANGED_SHARE):
            self._write(collection, until=self._stop)

    def _clear(self) -> None:
        """Forgets collections that were deleted."""
        numbers = {one.row.number for one in self._collections.all()}
        self._kept = {number: kept for number, kept in self._kept.items() if number in numbers}
        try:
            self._collections.snapshots.keep_only(numbers)
        except OSError as error:  # harmless: no collection gets their numbers
            log.warning("snapshots of deleted collections are left: %s", error)

    def _due(self, collection: Collection, share: float) -> bool:
        """Whether its accelerator is new, or enough has changed since the last snapshot."""
        kept = self._kept.setdefault(collection.row.number, _Kept())
        if collection.index.name not in ("exact", kept.searched_by):
            return True
        enough = max(self._least, share * len(collection.index))
        return collection.changes - kept.changes >= enough

    def _write(self, collection: Collection, until: threading.Event | None = None) -> None:
        """Writes a snapshot; one that cannot be written is tried again later."""

        def check() -> None:
            if until is not None and until.is_set():
                raise _StoppedError

        kept = self._kept[collection.row.number]
        row, started = collection.row, time.monotonic()
        # In this order: what changes in between has a larger seq, and is replayed.
        changes, seq = collection.changes, collection.seq
        frozen = collection.index.frozen()
        try:
            check()
            self._collections.snapshots.write(row, seq, frozen, check)
        except _StoppedError:
            return
        except Exception as error:  # faiss has errors of its own
            log.warning(
                "no snapshot of collection %s: %s; next try in %.0f s", row.name, error, RETRY_S
            )
            kept.retry_at = time.monotonic() + RETRY_S
            return
        kind = "exact" if frozen.accelerator is None else frozen.accelerator.kind
        self._kept[row.number] = _Kept(changes, kind)
        log.info(
            "snapshot of collection %s: %d vectors, seq %d, %.1f s",
            row.name, len(frozen.ids), seq, time.monotonic() - started,
        )  # fmt: skip

"""Follows the vectors of a collection: all changes after a seq, then new ones as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from embedder.storage.collection import Collection
from embedder.storage.collections import ITEMS, Collections
from foretell import checks
from foretell.errors import InvalidArgumentError, UnavailableError
from foretell.vectors import Vectors

CHUNK_BYTES = 1024 * 1024
"""Numbers in one message: large enough to be quick, small enough to share a connection."""


@dataclass(frozen=True)
class Changes:
    """Some changes, in the order of the store."""

    ids: list[str]
    """New or changed."""
    vectors: Vectors
    """Shape (ids, cols)."""
    deleted_ids: list[str]
    seq: int
    """Who knows these changes and those before knows everything up to here."""
    caught_up: bool
    """Whether this was all when the message was made."""


class Watches:
    """All watches of a server. Used from one event loop."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Event] = set()
        self._stopped = False
        collections.listeners.append(self._notify)

    async def watch(self, name: str, after_seq: int) -> AsyncIterator[Changes]:
        """Changes after `after_seq`, for ever.

        Raises:
            NotFoundError: there is no such collection, or it was deleted.
            InvalidArgumentError: `after_seq` is ahead of the store.
            UnavailableError: the service is shutting down.
        """
        collection = self._collections.get(name, default=ITEMS)
        if after_seq > self._collections.applied_seq:
            raise InvalidArgumentError(
                f"after_seq is {after_seq}; the last change is {self._collections.applied_seq}",
                reason="SEQ_AHEAD",
                field="after_seq",
            )
        changed = asyncio.Event()
        self._waiting.add(changed)
        try:
            seq, told = after_seq, False
            while True:
                changed.clear()
                if self._stopped:
                    raise UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")
                if collection.deleted:
                    raise checks.no_collection(name)
                async for changes in self._catch_up(collection, seq, not told):
                    yield changes
                    seq, told = changes.seq, True
                await changed.wait()
        finally:
            self._waiting.discard(changed)

    def stop(self) -> None:
        """Ends all watches, so that the server can stop."""
        self._stopped = True
        self._wake()

    async def _catch_up(
        self, collection: Collection, after: int, must_tell: bool
    ) -> AsyncIterator[Changes]:
        """All changes after a seq up to now, in messages of bounded size."""
        while True:
            until = self._collections.applied_seq
            pending = await asyncio.to_thread(_changes, collection, after, until)
            if not pending.ids and not must_tell:
                return
            size = max(1, CHUNK_BYTES // (4 * collection.row.cols))
            for start in range(0, max(1, len(pending.ids)), size):
                end = min(start + size, len(pending.ids))
                caught_up = end == len(pending.ids) and until == self._collections.applied_seq
                yield pending.message(collection, start, end, caught_up)
            after, must_tell = until, not caught_up

    def _notify(self) -> None:
        """On the writer thread: something changed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for changed in self._waiting:
            changed.set()


@dataclass(frozen=True)
class _Pending:
    """Ids that changed after one seq and up to another, in the order of the changes."""

    ids: list[str]
    seqs: list[int]
    deleted: set[str]
    after: int
    until: int

    def message(self, collection: Collection, start: int, end: int, caught_up: bool) -> Changes:
        """Some of the changes, as they stand now.

        What changed again meanwhile is left to the next round: it has a larger seq.
        """
        some = self.ids[start:end]
        vectors = collection.index.get([id for id in some if id not in self.deleted])
        deleted = [id for id in some if id in self.deleted]
        present = collection.index.known(deleted)
        seq = self.until
        if end < len(self.ids):
            # The next change may belong to the same write; then this write is not known yet.
            seq = max(self.after, min(self.seqs[end - 1], self.seqs[end] - 1))
        block = np.array(list(vectors.values()), np.float32)
        return Changes(
            ids=list(vectors),
            vectors=block.reshape(-1, collection.row.cols),
            deleted_ids=[id for id, again in zip(deleted, present, strict=True) if not again],
            seq=seq,
            caught_up=caught_up,
        )


def _changes(collection: Collection, after: int, until: int) -> _Pending:
    changed, seqs = collection.index.changed_after(after)
    found = [(int(seq), id, False) for id, seq in zip(changed, seqs, strict=True)]
    if after:  # who knows nothing need not be told what is gone
        buried = list(collection.tombstones.items())
        found += [(seq, id, True) for id, seq in buried if seq > after]
    # What came after `until` is told in the next round, when all of it is there.
    found = sorted(each for each in found if each[0] <= until)
    return _Pending(
        ids=[id for _, id, _ in found],
        seqs=[seq for seq, _, _ in found],
        deleted={id for _, id, gone in found if gone},
        after=after,
        until=until,
    )

"""Vectors of a derived collection, kept in memory: what histories' tokens are made of."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import ForetellError, NotFoundError, UnavailableError
from foretell.vectors import Vectors, from_block
from predictor.embedder import Embedder

log = logging.getLogger(__name__)

PAUSE_S = 0.5
"""After a watch that ended, before the next one. An absent embedder is waited for by gRPC."""


class Catalog:
    """id -> vector, following a collection.

    Read by the model's worker thread while the event loop applies changes: each holds the lock.
    """

    def __init__(self, collection: str, cols: int) -> None:
        self.collection = collection
        self.caught_up = asyncio.Event()
        """Set once all that the collection held has been seen."""
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        self._matrix: Vectors = np.zeros((1_024, cols), np.float32)
        self._seq = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, item_id: str) -> bool:
        return item_id in self._rows

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._rows))

    def fill(self, ids: Sequence[str], vectors: Vectors, known: NDArray[np.bool_]) -> None:
        """Writes the vectors of known ids into rows of `vectors` that are not `known` yet.

        Args:
            ids: one per row; "" has no vector.
            vectors: (rows, cols).
            known: (rows,).
        """
        with self._lock:
            rows = np.fromiter(map(self._rows.get, ids, repeat(-1)), np.int64, len(ids))
            found = (rows >= 0) & ~known
            vectors[found] = self._matrix[rows[found]]
        known |= found

    def apply(self, changes: pb.WatchItemsResponse) -> None:
        """Takes changes over."""
        vectors = from_block(changes.vectors) if changes.ids else None
        with self._lock:
            if not self._seq:  # the first message, or the first after a loss
                self._rows.clear()
                self._free.clear()
            for item_id in changes.deleted_ids:
                row = self._rows.pop(item_id, None)
                if row is not None:
                    self._free.append(row)
            if vectors is not None:
                rows = [self._row(item_id) for item_id in changes.ids]
                self._matrix[rows] = vectors
            self._seq = changes.seq
        if changes.caught_up:
            self.caught_up.set()

    def lost(self) -> None:
        """Says that the collection begins anew: what is known stands until its first message."""
        self._seq = 0

    def _row(self, item_id: str) -> int:
        row = self._rows.get(item_id)
        if row is None:
            row = self._free.pop() if self._free else len(self._rows)
            self._rows[item_id] = row
            if row >= len(self._matrix):
                grown = np.zeros((2 * len(self._matrix), self._matrix.shape[1]), np.float32)
                grown[: len(self._matrix)] = self._matrix
                self._matrix = grown
        return row

    async def follow(self, embedder: Embedder, restore: Callable[[], Awaitable[None]]) -> None:
        """Follows the collection until it is cancelled.

        `restore` publishes the collection anew when the embedder has lost it.
        """
        while True:
            try:
                async for changes in embedder.watch(self.collection, self._seq):
                    self.apply(changes)
            except NotFoundError:
                log.error("the embedder has lost %s: publishing it anew", self.collection)
                self.lost()
                try:
                    await restore()
                except ForetellError as error:
                    log.warning("%s: %s", self.collection, error.message)
            except UnavailableError:
                pass  # logged by the embedder's side of the channel; the next watch waits for it
            except ForetellError as error:
                log.warning("%s: %s", self.collection, error.message)
            await asyncio.sleep(PAUSE_S)

"""Vectors of texts that were encoded before: the same text is never encoded twice."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from embedder.encoding.batcher import Batcher, Timing
from foretell.vectors import Row, Vectors
from serving.database import Database, select_in

log = logging.getLogger(__name__)

LOOKED_UP_AT_ONCE = 16
"""Texts that are looked up in the event loop: that takes less time than to go to a thread."""

ROW_OVERHEAD_BYTES = 300
"""Memory of a cached row beside its numbers: key, dict entry and array object (measured)."""


def text_hash(text: str) -> bytes:
    """Key of a text: the bytes of `foretell.texts.text_id`."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class KnownTexts(Protocol):
    """Where vectors of texts are kept on disk."""

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, Row]:
        """The vectors that are known. Called from any thread."""

    def keep(self, vectors: Mapping[bytes, Row]) -> None:
        """Told of newly encoded texts; may ignore them. Must not block."""


@dataclass(frozen=True)
class Encoded:
    """Vectors of some texts."""

    vectors: Vectors
    """Shape (texts, cols)."""
    new: int
    """Texts that the network had to encode."""
    timing: Timing


class TextCache:
    """Looks texts up in memory, then on disk, and has the others encoded.

    Of identical texts in one call or in concurrent ones only the first is encoded. Memory holds
    the most recently used vectors up to a limit in bytes. Used from one event loop.
    """

    def __init__(self, batcher: Batcher, known: KnownTexts, cols: int, memory_bytes: int) -> None:
        self.texts_cached = 0
        self._batcher = batcher
        self._known = known
        self._cols = cols
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self._max_rows = memory_bytes // (cols * 4 + ROW_OVERHEAD_BYTES)
        self._in_flight: dict[bytes, asyncio.Future[dict[bytes, Row]]] = {}

    async def encode(self, texts: Sequence[str], deadline: float | None = None) -> Encoded:
        """Vectors of length 1 in the order of the texts.

        Raises:
            ResourceExhaustedError, DeadlineExceededError: those of `Batcher.encode`, which
                `deadline` is for.
        """
        hashes = [text_hash(text) for text in texts]
        rows = self._from_memory(hashes)
        wanted = {key: text for key, text in zip(hashes, texts, strict=True) if key not in rows}
        timing = Timing()
        new = 0
        while wanted:
            others = {future for key in wanted if (future := self._in_flight.get(key))}
            mine = {key: text for key, text in wanted.items() if key not in self._in_flight}
            if mine:
                found, encoded, timing = await self._fetch(mine, deadline)
                rows |= found
                new += encoded
            if others:
                await asyncio.wait(others)
            for future in others:
                # Whoever encodes a text may fail or leave: then it is looked up again.
                if not future.cancelled():
                    found = future.result()
                    rows |= {key: found[key] for key in wanted if key in found}
            wanted = {key: text for key, text in wanted.items() if key not in rows}
        self.texts_cached += len(texts) - new
        vectors = np.empty((len(texts), self._cols), np.float32)
        for index, key in enumerate(hashes):
            vectors[index] = rows[key]
        return Encoded(vectors, new, timing)

    async def _fetch(
        self, texts: dict[bytes, str], deadline: float | None
    ) -> tuple[dict[bytes, Row], int, Timing]:
        """Vectors from disk or from the network, while other calls may wait for them."""
        future: asyncio.Future[dict[bytes, Row]] = asyncio.get_running_loop().create_future()
        for key in texts:
            self._in_flight[key] = future
        try:
            if len(texts) <= LOOKED_UP_AT_ONCE:
                rows = self._known.find(list(texts))
            else:
                rows = await asyncio.to_thread(self._known.find, list(texts))
            unknown = [key for key in texts if key not in rows]
            block, timing = await self._batcher.encode([texts[key] for key in unknown], deadline)
            encoded = dict(zip(unknown, block, strict=True))
            self._known.keep(encoded)
            rows |= encoded
            self._remember(rows)
            future.set_result(rows)
            return rows, len(unknown), timing
        finally:
            for key in texts:
                del self._in_flight[key]
            future.cancel()  # where there is no result, those who wait fetch it themselves

    def _from_memory(self, hashes: Iterable[bytes]) -> dict[bytes, Row]:
        rows = {}
        for key in hashes:
            row = self._rows.get(key)
            if row is not None:
                self._rows.move_to_end(key)
                rows[key] = row
        return rows

    def _remember(self, rows: Mapping[bytes, Row]) -> None:
        for key, row in rows.items():
            # A copy: a row of a block would keep the whole block in memory.
            self._rows[key] = row.copy()
        while len(self._rows) > self._max_rows:
            self._rows.popitem(last=False)


_CACHE_SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (key BLOB PRIMARY KEY, vector BLOB NOT NULL);
"""


class CacheFile:
    """Vectors of texts in a SQLite file that several processes share. Implements `KnownTexts`.

    It may hold vectors of several encoders: `identity` (of `encoder.identity`) is part of a key.

    Raises:
        FailedPreconditionError: the file cannot be opened.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._database = Database(folder / "texts.sqlite", _CACHE_SCHEMA)
        self._identity = bytes.fromhex(identity)

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, Row]:
        """The vectors that are known."""
        connection = self._database.connection()
        prefix = len(self._identity)
        rows = {}
        keys = [self._identity + key for key in hashes]
        for key, vector in select_in(connection, "SELECT key, vector FROM texts WHERE key", keys):
            rows[key[prefix:]] = np.frombuffer(vector, np.float32)
        return rows

    def keep(self, vectors: Mapping[bytes, Row]) -> None:
        """Writes newly encoded texts in the background."""
        new = [(self._identity + key, row.tobytes()) for key, row in vectors.items()]
        if new:
            written = self._database.submit(lambda connection: _insert(connection, new))
            written.add_done_callback(_warn)

    def close(self) -> None:
        """Writes what waits."""
        self._database.close()


def _insert(connection: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
    connection.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?)", rows)


def _warn(written: Future[None]) -> None:
    error = written.exception()
    if error is not None:  # the vectors will be encoded again, nothing more
        log.warning("the text cache could not be written: %s", error)

"""The record of truth in SQLite: collections, items, vectors, tombstones.

Functions take the connection of a transaction; `Store` owns the data directory. Everything that is
written gets the next `seq`, so that what is derived from it can be brought up to date.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import FailedPreconditionError
from foretell.vectors import Row
from serving.database import Database, select_in

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('seq', 0);
CREATE TABLE IF NOT EXISTS collections (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    kind INTEGER NOT NULL,
    source INTEGER REFERENCES collections (number),
    cols INTEGER NOT NULL,
    created_seq INTEGER NOT NULL,
    seq INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS definitions (
    collection INTEGER PRIMARY KEY REFERENCES collections (number),
    definition BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS texts (hash BLOB PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    collection INTEGER NOT NULL REFERENCES collections (number),
    id TEXT NOT NULL,
    text TEXT NOT NULL,
    hash BLOB REFERENCES texts (hash),
    attributes TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (collection, id)
);
CREATE INDEX IF NOT EXISTS items_hash ON items (hash);
CREATE TABLE IF NOT EXISTS vectors (
    collection INTEGER NOT NULL REFERENCES collections (number),
    id TEXT NOT NULL,
    vector BLOB NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (collection, id)
);
CREATE TABLE IF NOT EXISTS tombstones (
    collection INTEGER NOT NULL REFERENCES collections (number),
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (collection, id)
) WITHOUT ROWID;
"""
# definitions: the DerivedCollection messages. They can have many megabytes, so they are not in rows
# that every write reads. items.hash: the text's key in `texts`, NULL where the text is empty.
# items.seq: the last change of the text, and so of the vector. vectors: of a vector collection, or
# residuals of a derived one.


Kind: TypeAlias = pb.CollectionKind.ValueType


@dataclass(frozen=True)
class CollectionRow:
    """A collection as it was created."""

    number: int
    name: str
    kind: Kind
    source: int | None
    """Number of the collection that it is derived from."""
    cols: int
    created_seq: int
    seq: int
    """Its own last change."""


@dataclass(frozen=True)
class ItemRow:
    """An item to write."""

    id: str
    text: str
    hash: bytes | None
    """None: the text is empty."""
    attributes: str
    """JSON object."""


class Store:
    """The data directory: one process's, one encoder's.

    Raises:
        FailedPreconditionError: another process has it, another encoder filled it, or it is of
            another version.
    """

    def __init__(self, folder: Path, identity: str, encoder: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._lock = opened.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FailedPreconditionError(
                    f"the data directory {folder} belongs to another embedder that is running",
                    reason="DATA_DIR_IN_USE",
                ) from error
            self.database = Database(folder / "embedder.sqlite", _SCHEMA, version=2)
            opened.callback(self.database.close)
            claim = self.database.submit(lambda c: _claim(c, identity, encoder))
            found, filled_by = claim.result()
            if found != identity:
                raise FailedPreconditionError(
                    f"the data directory {folder} was filled by the encoder {filled_by}; "
                    f"{encoder} makes other vectors: name the first or another data directory",
                    reason="OTHER_ENCODER",
                )
            opened.pop_all()

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, Row]:
        """Vectors of texts that some item has. Implements `text_cache.KnownTexts`."""
        return texts_of(self.database.connection(), hashes)

    def keep(self, vectors: Mapping[bytes, Row]) -> None:
        """Does nothing: vectors are written together with the items that have them."""

    def close(self) -> None:
        """Commits what waits and gives the directory free."""
        self.database.close()
        self._lock.close()


def _claim(connection: sqlite3.Connection, identity: str, encoder: str) -> tuple[str, str]:
    """Which encoder the directory belongs to; a new one belongs to this one."""
    connection.executemany(
        "INSERT OR IGNORE INTO meta VALUES (?, ?)", [("identity", identity), ("encoder", encoder)]
    )
    found = dict(connection.execute("SELECT key, value FROM meta"))
    return found["identity"], found["encoder"]


def next_seq(connection: sqlite3.Connection) -> int:
    """The position of this write in the store's order."""
    (seq,) = connection.execute(
        "UPDATE meta SET value = value + 1 WHERE key = 'seq' RETURNING value"
    ).fetchone()
    return int(seq)


def current_seq(connection: sqlite3.Connection) -> int:
    """The position of the last write."""
    return int(connection.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()[0])


# --- collections ---------------------------------------------------------------------------------

_COLLECTION = "SELECT number, name, kind, source, cols, created_seq, seq FROM collections"


def collections(connection: sqlite3.Connection) -> list[CollectionRow]:
    """All collections, sources before what is derived from them."""
    return [CollectionRow(*row) for row in connection.execute(f"{_COLLECTION} ORDER BY number")]


def collection(connection: sqlite3.Connection, name: str) -> CollectionRow | None:
    """One collection by name."""
    row = connection.execute(f"{_COLLECTION} WHERE name = ?", (name,)).fetchone()
    return None if row is None else CollectionRow(*row)


def derived_from(connection: sqlite3.Connection, number: int) -> list[CollectionRow]:
    """The collections derived from one."""
    found = connection.execute(f"{_COLLECTION} WHERE source = ? ORDER BY number", (number,))
    return [CollectionRow(*row) for row in found]


def definition(connection: sqlite3.Connection, number: int) -> pb.DerivedCollection:
    """How a derived collection follows from its source."""
    query = "SELECT definition FROM definitions WHERE collection = ?"
    (message,) = connection.execute(query, (number,)).fetchone()
    return pb.DerivedCollection.FromString(message)


def add_collection(
    connection: sqlite3.Connection,
    name: str,
    kind: Kind,
    cols: int,
    source: int | None = None,
    derived: pb.DerivedCollection | None = None,
) -> CollectionRow:
    """Inserts a collection whose name is free; a derived one has a source and a definition."""
    seq = next_seq(connection)
    cursor = connection.execute(
        "INSERT INTO collections (name, kind, source, cols, created_seq, seq) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (name, kind, source, cols, seq, seq),
    )
    number = int(cursor.lastrowid or 0)
    if derived is not None:
        connection.execute(
            "INSERT INTO definitions VALUES (?, ?)", (number, derived.SerializeToString())
        )
    return CollectionRow(number, name, kind, source, cols, seq, seq)


def drop_collection(connection: sqlite3.Connection, number: int) -> int:
    """Deletes a collection and all in it; returns the write's seq."""
    hashes = [
        row[0]
        for row in connection.execute(
            "SELECT DISTINCT hash FROM items WHERE collection = ? AND hash IS NOT NULL", (number,)
        )
    ]
    for table in ("definitions", "items", "vectors", "tombstones"):
        connection.execute(f"DELETE FROM {table} WHERE collection = ?", (number,))
    _drop_unused_texts(connection, hashes)
    connection.execute("DELETE FROM collections WHERE number = ?", (number,))
    return next_seq(connection)


def touch(connection: sqlite3.Connection, number: int, seq: int) -> None:
    """Notes a collection's last change."""
    connection.execute("UPDATE collections SET seq = ? WHERE number = ?", (seq, number))


# --- items ---------------------------------------------------------------------------------------


def put_items(
    connection: sqlite3.Connection,
    number: int,
    rows: Sequence[ItemRow],
    vectors: Mapping[bytes, Row],
    seq: int,
) -> list[ItemRow]:
    """Inserts or replaces items of different ids; returns those whose vector is new.

    `vectors` has the vector of each hash. Items that are what they were are not written, and a
    change of attributes alone leaves the item's seq, so that whoever follows vectors sees none.
    """
    before = {
        id: (hash, text, attributes)
        for id, hash, text, attributes in select_in(
            connection,
            f"SELECT id, hash, text, attributes FROM items WHERE collection = {number} AND id",
            [row.id for row in rows],
        )
    }
    moved = [row for row in rows if row.id not in before or before[row.id][0] != row.hash]
    same = [
        row
        for row in rows
        if row.id in before
        and before[row.id][0] == row.hash
        and before[row.id][1:] != (row.text, row.attributes)
    ]
    connection.executemany(
        "INSERT OR IGNORE INTO texts VALUES (?, ?)",
        ((row.hash, vectors[row.hash].tobytes()) for row in moved if row.hash is not None),
    )
    connection.executemany(
        "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)",
        ((number, row.id, row.text, row.hash, row.attributes, seq) for row in moved),
    )
    connection.executemany(
        "UPDATE items SET text = ?, attributes = ? WHERE collection = ? AND id = ?",
        ((row.text, row.attributes, number, row.id) for row in same),
    )
    _drop_unused_texts(connection, [before[row.id][0] for row in moved if row.id in before])
    _unbury(connection, number, [row.id for row in moved if row.id not in before])
    return moved


def delete_ids(
    connection: sqlite3.Connection,
    number: int,
    kind: Kind,
    ids: list[str],
    seq: int,
) -> list[str]:
    """Deletes items of a text or vector collection, and their residuals; returns those it had."""
    present = existing(connection, number, kind, ids)
    gone = [id for id in ids if id in present]
    pairs = [(number, id) for id in gone]
    if kind == pb.COLLECTION_KIND_TEXT:
        hashes = [
            row[0]
            for row in select_in(
                connection, f"SELECT hash FROM items WHERE collection = {number} AND id", gone
            )
        ]
        connection.executemany("DELETE FROM items WHERE collection = ? AND id = ?", pairs)
        _drop_unused_texts(connection, hashes)
        for derived in derived_from(connection, number):
            connection.executemany(
                "DELETE FROM vectors WHERE collection = ? AND id = ?",
                ((derived.number, id) for id in gone),
            )
    else:
        connection.executemany("DELETE FROM vectors WHERE collection = ? AND id = ?", pairs)
    connection.executemany(
        "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?)", ((number, id, seq) for id in gone)
    )
    return gone


def existing(
    connection: sqlite3.Connection,
    number: int,
    kind: Kind,
    ids: Sequence[str],
) -> set[str]:
    """Which of the ids a text or vector collection has."""
    table = "items" if kind == pb.COLLECTION_KIND_TEXT else "vectors"
    query = f"SELECT id FROM {table} WHERE collection = {number} AND id"
    return {row[0] for row in select_in(connection, query, ids)}


def count_items(connection: sqlite3.Connection, number: int) -> int:
    """Items of a text collection."""
    query = "SELECT COUNT(*) FROM items WHERE collection = ?"
    return int(connection.execute(query, (number,)).fetchone()[0])


def items_by_id(
    connection: sqlite3.Connection, number: int, ids: Sequence[str]
) -> dict[str, pb.Item]:
    """Items of a text collection."""
    query = f"SELECT id, text, attributes FROM items WHERE collection = {number} AND id"
    return {row[0]: _item(*row) for row in select_in(connection, query, ids)}


def texts_by_id(connection: sqlite3.Connection, number: int, ids: Sequence[str]) -> dict[str, str]:
    """Texts of items of a text collection."""
    query = f"SELECT id, text FROM items WHERE collection = {number} AND id"
    return dict(select_in(connection, query, ids))


def all_texts(connection: sqlite3.Connection, number: int) -> Iterator[tuple[str, str]]:
    """Id and text of all items of a text collection."""
    yield from connection.execute("SELECT id, text FROM items WHERE collection = ?", (number,))


def items_after(
    connection: sqlite3.Connection, number: int, kind: Kind, after: str
) -> Iterator[pb.Item]:
    """Items of a text or vector collection with a larger id, in the order of the ids."""
    if kind == pb.COLLECTION_KIND_TEXT:
        query = "SELECT id, text, attributes FROM items"
    else:
        query = "SELECT id, '', '{}' FROM vectors"
    for row in connection.execute(
        f"{query} WHERE collection = ? AND id > ? ORDER BY id", (number, after)
    ):
        yield _item(*row)


def _item(id: str, text: str, attributes: str) -> pb.Item:
    return pb.Item(id=id, text=text, attributes=json.loads(attributes))


# --- vectors -------------------------------------------------------------------------------------


def texts_of(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, Row]:
    """Vectors of texts by hash, those that are known."""
    query = "SELECT hash, vector FROM texts WHERE hash"
    found = select_in(connection, query, hashes)
    return {key: np.frombuffer(vector, np.float32) for key, vector in found}


def put_vectors(
    connection: sqlite3.Connection, number: int, rows: Iterable[tuple[str, bytes]], seq: int
) -> None:
    """Inserts or replaces vectors of a vector collection or residuals of a derived one."""
    written = [(number, id, vector, seq) for id, vector in rows]
    connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?)", written)
    _unbury(connection, number, [row[1] for row in written])


def vectors_by_id(
    connection: sqlite3.Connection, number: int, ids: Sequence[str]
) -> dict[str, Row]:
    """Vectors or residuals by id, those that exist."""
    query = f"SELECT id, vector FROM vectors WHERE collection = {number} AND id"
    found = select_in(connection, query, ids)
    return {id: np.frombuffer(vector, np.float32) for id, vector in found}


def all_vectors(
    connection: sqlite3.Connection, number: int, kind: Kind
) -> Iterator[tuple[str, bytes | None, int]]:
    """Id, vector (None: zero) and seq of all in a collection; of a derived one its residuals."""
    if kind == pb.COLLECTION_KIND_TEXT:
        query = (
            "SELECT items.id, texts.vector, items.seq FROM items "
            "LEFT JOIN texts ON texts.hash = items.hash WHERE items.collection = ? "
            "ORDER BY items.rowid"
        )
    else:
        query = "SELECT id, vector, seq FROM vectors WHERE collection = ? ORDER BY rowid"
    yield from connection.execute(query, (number,))


def tombstones(connection: sqlite3.Connection, number: int) -> dict[str, int]:
    """Ids that a collection had, with the seq of their deletion."""
    query = "SELECT id, seq FROM tombstones WHERE collection = ?"
    return dict(connection.execute(query, (number,)))


def _unbury(connection: sqlite3.Connection, number: int, ids: Iterable[str]) -> None:
    connection.executemany(
        "DELETE FROM tombstones WHERE collection = ? AND id = ?", ((number, id) for id in ids)
    )


def _drop_unused_texts(connection: sqlite3.Connection, hashes: Iterable[bytes | None]) -> None:
    """A text that no item has any more leaves the store, and its vector with it."""
    connection.executemany(
        "DELETE FROM texts WHERE hash = ?1 "
        "AND NOT EXISTS (SELECT 1 FROM items WHERE items.hash = ?1)",
        ((hash,) for hash in hashes if hash is not None),
    )

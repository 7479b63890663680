"""The record of truth in SQLite: the schema, the data directory, and which collections there are.

Functions take the connection of a transaction; `Store` owns the data directory. Everything that is
written gets the next `seq`, so that what is derived from it can be brought up to date.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np

from embedder.storage import attributes
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import FailedPreconditionError
from foretell.vectors import Row
from serving.database import Database, check_version, open_read_only, select_in
from serving.files import make_folder

FILE = "embedder.sqlite"
"""The record of truth in a data directory."""

LOCK = "lock"
"""Locked by the process whose directory it is."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT OR IGNORE INTO meta VALUES ('seq', 0);
INSERT OR IGNORE INTO meta VALUES ('store', lower(hex(randomblob(16))));
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
CREATE INDEX IF NOT EXISTS items_seq ON items (collection, seq);
CREATE TABLE IF NOT EXISTS vectors (
    collection INTEGER NOT NULL REFERENCES collections (number),
    id TEXT NOT NULL,
    vector BLOB NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (collection, id)
);
CREATE INDEX IF NOT EXISTS vectors_seq ON vectors (collection, seq);
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
# residuals of a derived one. The indexes on seq find what a snapshot lacks.

VERSION = 1
"""Of the schema. Directories that unreleased programs left may say 1 or 2 and are none of this."""


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


class Store:
    """The data directory: one process's, one encoder's.

    Attributes:
        folder: the data directory.
        id: made with the store, so that files beside it can say whose they are.
        database: the record of truth in it.

    Raises:
        FailedPreconditionError: another process has it, another encoder filled it, it cannot
            be written, or it is of another version.
    """

    def __init__(self, folder: Path, identity: str, encoder: str) -> None:
        with contextlib.ExitStack() as opened:
            self._lock = opened.enter_context(owned(folder))
            self.database = Database(folder / FILE, _SCHEMA + attributes.SCHEMA, VERSION)
            opened.callback(self.database.close)
            claim = self.database.submit(lambda c: _claim(c, identity, encoder))
            meta = claim.result()
            if meta["identity"] != identity:
                raise FailedPreconditionError(
                    f"the data directory {folder} was filled by the encoder {meta['encoder']}; "
                    f"{encoder} makes other vectors: name the first or another data directory",
                    reason="OTHER_ENCODER",
                )
            self.folder = folder
            self.id = meta["store"]
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


def owned(folder: Path) -> IO[str]:
    """Makes a data directory this process's, until the file is closed.

    Raises:
        FailedPreconditionError: another process has it, or it cannot be written.
    """
    try:
        make_folder(folder)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise FailedPreconditionError(
            f"the data directory {folder} cannot be written: {error.strerror}",
            reason="DATA_DIR_READ_ONLY",
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise FailedPreconditionError(
            f"the data directory {folder} belongs to another embedder that is running",
            reason="DATA_DIR_IN_USE",
        ) from error
    return file


def _claim(connection: sqlite3.Connection, identity: str, encoder: str) -> dict[str, str]:
    """What the directory says of itself; a new one belongs to this encoder."""
    connection.executemany(
        "INSERT OR IGNORE INTO meta VALUES (?, ?)", [("identity", identity), ("encoder", encoder)]
    )
    return meta(connection)


def open_to_read(folder: Path) -> sqlite3.Connection:
    """A read-only connection to a data directory, which an embedder may own meanwhile.

    Raises:
        FailedPreconditionError: there is none, or it is of another version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FailedPreconditionError(f"there is no {path}", reason="NO_STORE")
    check_version(path, VERSION)
    return open_read_only(path)


def meta(connection: sqlite3.Connection) -> dict[str, str]:
    """What the store says of itself: its id, its encoder's identity and name."""
    return dict(connection.execute("SELECT key, value FROM meta"))


def next_seq(connection: sqlite3.Connection) -> int:
    """The position of this write in the store's order."""
    (seq,) = connection.execute(
        "UPDATE meta SET value = value + 1 WHERE key = 'seq' RETURNING value"
    ).fetchone()
    return int(seq)


def current_seq(connection: sqlite3.Connection) -> int:
    """The position of the last write."""
    return int(connection.execute("SELECT value FROM meta WHERE key = 'seq'").fetchone()[0])


def texts_of(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> dict[bytes, Row]:
    """Vectors of texts by hash, those that are known."""
    query = "SELECT hash, vector FROM texts WHERE hash"
    found = select_in(connection, query, hashes)
    return {key: np.frombuffer(vector, np.float32) for key, vector in found}


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


def touch(connection: sqlite3.Connection, number: int, seq: int) -> None:
    """Notes a collection's last change."""
    connection.execute("UPDATE collections SET seq = ? WHERE number = ?", (seq, number))

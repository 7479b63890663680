"""Items, vectors and tombstones in SQLite. Functions take the connection of a transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from embedder.storage import attributes
from embedder.storage.store import Kind, derived_from, next_seq, texts_of
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.vectors import Row, Vectors
from serving.database import select_in


@dataclass(frozen=True)
class ItemRow:
    """An item to write."""

    id: str
    text: str
    hash: bytes | None
    """None: the text is empty."""
    attributes: str
    """JSON object."""


def put_items(
    connection: sqlite3.Connection,
    number: int,
    rows: Sequence[ItemRow],
    vectors: dict[bytes, Row],
    seq: int,
) -> list[ItemRow]:
    """Inserts or replaces items of different ids; returns those whose vector is new.

    `vectors` has the vector of each hash. Where the store has one already, which may be of another
    batch and so differ a little, that one takes its place there, too.

    Items that are what they were are not written, and a change of attributes alone leaves the
    item's seq, so that whoever follows vectors sees none.
    """
    before = {
        id: (hash, text, json_text)
        for id, hash, text, json_text in select_in(
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
    hashes = list(dict.fromkeys(row.hash for row in moved if row.hash is not None))
    inserted = connection.executemany(
        "INSERT OR IGNORE INTO texts VALUES (?, ?)",
        ((hash, vectors[hash].tobytes()) for hash in hashes),
    )
    if inserted.rowcount < len(hashes):
        vectors.update(texts_of(connection, hashes))
    connection.executemany(
        "INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?)",
        ((number, row.id, row.text, row.hash, row.attributes, seq) for row in moved),
    )
    connection.executemany(
        "UPDATE items SET text = ?, attributes = ? WHERE collection = ? AND id = ?",
        ((row.text, row.attributes, number, row.id) for row in same),
    )
    attributes.change(
        connection,
        number,
        {row.id: before[row.id][2] for row in rows if row.id in before},
        {row.id: row.attributes for row in rows},
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
        attributes.change(connection, number, attributes.of_items(connection, number, gone), {})
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


def _item(id: str, text: str, json_text: str) -> pb.Item:
    return pb.Item(id=id, text=text, attributes=json.loads(json_text))


def drop_collection(connection: sqlite3.Connection, number: int) -> int:
    """Deletes a collection and all in it; returns the write's seq."""
    hashes = [
        row[0]
        for row in connection.execute(
            "SELECT DISTINCT hash FROM items WHERE collection = ? AND hash IS NOT NULL", (number,)
        )
    ]
    attributes.drop(connection, number)
    for table in ("definitions", "items", "vectors", "tombstones"):
        connection.execute(f"DELETE FROM {table} WHERE collection = ?", (number,))
    _drop_unused_texts(connection, hashes)
    connection.execute("DELETE FROM collections WHERE number = ?", (number,))
    return next_seq(connection)


# --- vectors -------------------------------------------------------------------------------------


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


def stacked(blobs: Sequence[bytes | None], cols: int) -> Vectors:
    """Vectors as the store keeps them, shape (blobs, cols); zero where there is none."""
    zero = bytes(4 * cols)
    return np.frombuffer(b"".join(blob or zero for blob in blobs), np.float32).reshape(-1, cols)


def changed_vectors(
    connection: sqlite3.Connection, number: int, kind: Kind, after: int
) -> Iterator[tuple[str, bytes | None, int]]:
    """Id, vector (None: zero) and seq of what a text or vector collection has after a seq."""
    if kind == pb.COLLECTION_KIND_TEXT:
        query = (
            "SELECT items.id, texts.vector, items.seq FROM items "
            "LEFT JOIN texts ON texts.hash = items.hash "
            "WHERE items.collection = ? AND items.seq > ? ORDER BY items.seq, items.rowid"
        )
    else:
        query = (
            "SELECT id, vector, seq FROM vectors "
            "WHERE collection = ? AND seq > ? ORDER BY seq, rowid"
        )
    yield from connection.execute(query, (number, after))


def changed_derived(
    connection: sqlite3.Connection, number: int, source: int, after: int
) -> Iterator[tuple[str, str, bytes | None, int]]:
    """Id, text, residual (None: zero) and seq of what a derived collection has after a seq.

    First what changed in the source, then where only the residual did.
    """
    named = {"number": number, "source": source, "after": after}
    yield from connection.execute(
        "SELECT items.id, items.text, vectors.vector, max(items.seq, ifnull(vectors.seq, 0)) "
        "FROM items LEFT JOIN vectors "
        "ON vectors.collection = :number AND vectors.id = items.id "
        "WHERE items.collection = :source AND items.seq > :after ORDER BY items.seq, items.rowid",
        named,
    )
    yield from connection.execute(
        "SELECT items.id, items.text, vectors.vector, vectors.seq "
        "FROM vectors JOIN items ON items.collection = :source AND items.id = vectors.id "
        "WHERE vectors.collection = :number AND vectors.seq > :after AND items.seq <= :after "
        "ORDER BY vectors.seq, vectors.rowid",
        named,
    )


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

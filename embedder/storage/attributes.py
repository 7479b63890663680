"""Attributes of items in SQLite, so that conditions find them; written with the items.

Each pair of a key and a value is stored once and has a number; items refer to it. What GetItems
returns is the JSON in `items`, which has the same attributes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping

from foretell.texts import number_of
from serving.database import select_in

SCHEMA = """
CREATE TABLE IF NOT EXISTS attribute_values (
    number INTEGER PRIMARY KEY,
    collection INTEGER NOT NULL REFERENCES collections (number),
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    as_number REAL,
    UNIQUE (collection, key, value)
);
CREATE INDEX IF NOT EXISTS attribute_numbers ON attribute_values (collection, key, as_number)
    WHERE as_number IS NOT NULL;
CREATE TABLE IF NOT EXISTS item_attributes (
    attribute INTEGER NOT NULL,
    id TEXT NOT NULL,
    PRIMARY KEY (attribute, id)
) WITHOUT ROWID;
"""

Pair = tuple[str, str]
"""Key and value."""


def change(
    connection: sqlite3.Connection,
    number: int,
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> None:
    """Brings the attributes of items of a text collection from what they were to what they are.

    Args:
        connection: of the transaction that writes the items.
        number: the collection's.
        before: JSON objects by id; without items that are new.
        after: likewise, without items that are gone.
    """
    gone = dict.fromkeys(_pairs(before, after))
    new = dict.fromkeys(_pairs(after, before))
    connection.executemany(
        "INSERT OR IGNORE INTO attribute_values (collection, key, value, as_number) "
        "VALUES (?, ?, ?, ?)",
        ((number, *pair, number_of(pair[1])) for pair in {pair for _, pair in new}),
    )
    numbers = {
        pair: _number(connection, number, pair) for pair in {pair for _, pair in (*gone, *new)}
    }
    connection.executemany(
        "DELETE FROM item_attributes WHERE attribute = ? AND id = ?",
        sorted((numbers[pair], id) for id, pair in gone),
    )
    # Sorted: neighbours in the table come one after the other.
    connection.executemany(
        "INSERT INTO item_attributes VALUES (?, ?)",
        sorted((numbers[pair], id) for id, pair in new),
    )
    connection.executemany(
        "DELETE FROM attribute_values WHERE number = ?1 "
        "AND NOT EXISTS (SELECT 1 FROM item_attributes WHERE attribute = ?1)",
        ((numbers[pair],) for pair in {pair for _, pair in gone}),
    )


def of_items(connection: sqlite3.Connection, number: int, ids: Iterable[str]) -> dict[str, str]:
    """JSON objects by id, of those items of a text collection that exist."""
    query = f"SELECT id, attributes FROM items WHERE collection = {number} AND id"
    return dict(select_in(connection, query, list(ids)))


def has(connection: sqlite3.Connection, number: int, id: str, pair: Pair) -> bool:
    """Whether a condition finds an item of a collection by one of its attributes."""
    query = (
        "SELECT 1 FROM attribute_values JOIN item_attributes ON attribute = number "
        "WHERE collection = ? AND key = ? AND value = ? AND id = ?"
    )
    return connection.execute(query, (number, *pair, id)).fetchone() is not None


def drop(connection: sqlite3.Connection, number: int) -> None:
    """Deletes all attributes of a collection."""
    connection.execute(
        "DELETE FROM item_attributes WHERE attribute IN "
        "(SELECT number FROM attribute_values WHERE collection = ?)",
        (number,),
    )
    connection.execute("DELETE FROM attribute_values WHERE collection = ?", (number,))


def _pairs(some: Mapping[str, str], others: Mapping[str, str]) -> Iterator[tuple[str, Pair]]:
    """Ids and the attributes that they have in `some` and not in `others`."""
    for id, text in some.items():
        other = others.get(id, "{}")
        if text != other:
            known = json.loads(other)
            for key, value in json.loads(text).items():
                if known.get(key) != value:
                    yield id, (key, value)


def _number(connection: sqlite3.Connection, number: int, pair: Pair) -> int:
    query = "SELECT number FROM attribute_values WHERE collection = ? AND key = ? AND value = ?"
    found: int = connection.execute(query, (number, *pair)).fetchone()[0]
    return found

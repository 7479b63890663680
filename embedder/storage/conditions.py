"""Which items match a condition over their attributes: one SQL statement, and a cache."""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from foretell.embedder.v1 import embedder_service_pb2 as pb

Ids = tuple[str, ...]

CACHE_BYTES = 64 * 1024 * 1024
"""Memory for the ids of conditions that were asked for lately."""

STEPS = 10_000
"""Instructions of SQLite's machine, some 0.5 ms, between two looks at whether to go on."""

_LEAF = (
    "SELECT id FROM item_attributes WHERE attribute IN "
    "(SELECT number FROM attribute_values WHERE collection = ? AND key = ?{})"
)

_BOUNDS = {"gte": ">=", "gt": ">", "lte": "<=", "lt": "<"}


@dataclass(frozen=True)
class _Known:
    """The answer to a condition."""

    seq: int
    """Of the collection, when it was given."""
    ids: Ids
    size: int
    """Bytes in memory."""


class Conditions:
    """Evaluates conditions, and remembers the ids until their collection changes. Thread-safe."""

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, bytes], _Known] = OrderedDict()

    def ids(
        self,
        connection: sqlite3.Connection,
        number: int,
        seq: int,
        condition: pb.Condition,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Ids:
        """The ids of all items of a text collection that match.

        Args:
            connection: the reading thread's.
            number: the collection's.
            seq: the collection's last change, read before `connection` was.
            condition: a valid one.
            cancelled: whether nobody waits for the answer any more.

        Raises:
            sqlite3.OperationalError: it was cancelled.
        """
        key = number, condition.SerializeToString(deterministic=True)
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.seq == seq:
                self._known.move_to_end(key)
                return known.ids
        found = matching(connection, number, condition, cancelled)
        size = sum(map(sys.getsizeof, (found, *key, *found)))
        if size <= self._cache_bytes:
            self._keep(key, _Known(seq, found, size))
        return found

    def _keep(self, key: tuple[int, bytes], known: _Known) -> None:
        with self._lock:
            self._forget(key)
            self._known[key] = known
            self._bytes += known.size
            while self._bytes > self._cache_bytes:
                self._forget(next(iter(self._known)))

    def _forget(self, key: tuple[int, bytes]) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._bytes -= known.size


def matching(
    connection: sqlite3.Connection,
    number: int,
    condition: pb.Condition,
    cancelled: Callable[[], bool] = lambda: False,
) -> Ids:
    """The ids of all items of a text collection that match a valid condition; see `Conditions`."""
    parameters: list[str | float] = []
    query = _leaf(condition, number, parameters)
    if not query:
        parameters.append(number)
        where = _term(condition, number, parameters)
        query = f"SELECT id FROM items WHERE collection = ? AND {where}"
    connection.set_progress_handler(cancelled, STEPS)
    try:
        return tuple(id for (id,) in connection.execute(query, parameters))
    finally:
        connection.set_progress_handler(None, 0)


def _term(condition: pb.Condition, number: int, parameters: list[str | float]) -> str:
    """A term over the column `items.id`, true or false; its parameters are appended.

    SQLite makes the list of each leaf's ids once. Then it looks ids up in it, or goes by the list
    where no other ids can match.
    """
    match condition.WhichOneof("kind"):
        case "all_of":
            return _joined(condition.all_of, " AND ", number, parameters)
        case "any_of":
            return _joined(condition.any_of, " OR ", number, parameters)
        case "none_of":
            return f"NOT {_joined(condition.none_of, ' OR ', number, parameters)}"
    return f"id IN ({_leaf(condition, number, parameters)})"


def _joined(parts: pb.Conditions, operator: str, number: int, parameters: list[str | float]) -> str:
    terms = [_term(part, number, parameters) for part in parts.conditions]
    return f"({operator.join(terms)})"


def _leaf(condition: pb.Condition, number: int, parameters: list[str | float]) -> str:
    """A query for the ids that match a leaf, each once; empty for other conditions."""
    match condition.WhichOneof("kind"):
        case "one_of":
            values = condition.one_of.values
            parameters += [number, condition.one_of.key, *values]
            return _LEAF.format(f" AND value IN ({','.join('?' * len(values))})")
        case "range":
            parameters += [number, condition.range.key]
            return _LEAF.format(_bounds(condition.range, parameters))
        case "exists":
            parameters += [number, condition.exists]
            return _LEAF.format("")
    return ""


def _bounds(value: pb.AttributeRange, parameters: list[str | float]) -> str:
    sql = ""
    for field, bound in value.ListFields():
        if field.name in _BOUNDS:
            sql += f" AND as_number {_BOUNDS[field.name]} ?"
            parameters.append(bound)
    return sql

"""Writes that may be repeated: the answer to a request_id is kept with what it did."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from foretell import checks, limits
from foretell.errors import ForetellError, InvalidArgumentError

M = TypeVar("M", bound=Message)

REQUESTS = """
CREATE TABLE IF NOT EXISTS requests (
    request_id TEXT PRIMARY KEY,
    digest BLOB NOT NULL,
    response BLOB NOT NULL,
    created_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS requests_created_at ON requests (created_at);
"""


def once(
    apply: Callable[[sqlite3.Connection], M], request: Message, response_type: type[M]
) -> Callable[[sqlite3.Connection], tuple[M, bool]]:
    """A write that happens once for a `request.request_id`; repeated, it gives the first answer.

    The answer is kept in the same transaction as the write. The second value says whether the
    write was done now. Without a request_id it is always done.

    Raises (when run):
        InvalidArgumentError: the request_id came with another request before.
    """
    if not _request_id(request):
        return lambda connection: (apply(connection), True)

    def apply_once(connection: sqlite3.Connection) -> tuple[M, bool]:
        first = first_answer(connection, request, response_type)
        if first is not None:
            return first, False
        response = apply(connection)
        _keep(connection, [(request, response)])
        return response, True

    return apply_once


def each_once(
    connection: sqlite3.Connection,
    apply: Callable[[Sequence[int]], Sequence[M]],
    requests: Sequence[Message],
    response_type: type[M],
) -> list[M | ForetellError]:
    """As `once`, for several requests together.

    Args:
        connection: in a transaction.
        apply: does the requests at these positions and gives their answers.
        requests: each with a `request_id`, or without.
        response_type: of all of them.
    """
    answers: dict[int, M | ForetellError] = {}
    fresh: list[int] = []
    rest: Sequence[Message] = []
    ids: set[str] = set()
    for at, request in enumerate(requests):
        request_id = _request_id(request)
        if request_id in ids:  # twice at once: the second one needs the first one's answer
            rest = requests[at:]
            break
        if request_id:
            ids.add(request_id)
            try:
                first = first_answer(connection, request, response_type)
            except InvalidArgumentError as error:
                answers[at] = error
                continue
            if first is not None:
                answers[at] = first
                continue
        fresh.append(at)
    done = apply(fresh)
    answers.update(zip(fresh, done, strict=True))
    kept = zip((requests[at] for at in fresh), done, strict=True)
    _keep(connection, [(request, answer) for request, answer in kept if _request_id(request)])
    if rest:
        begin = len(requests) - len(rest)
        later = each_once(
            connection, lambda some: apply([begin + at for at in some]), rest, response_type
        )
        answers.update(enumerate(later, begin))
    return [answers[at] for at in range(len(requests))]


def _keep(connection: sqlite3.Connection, answers: Sequence[tuple[Message, Message]]) -> None:
    """Remembers the answers to requests, and forgets old ones."""
    if not answers:
        return
    now = time.time()
    connection.execute(
        "DELETE FROM requests WHERE created_at < ?", (now - limits.REQUEST_ID_SECONDS,)
    )
    connection.executemany(
        "INSERT INTO requests VALUES (?, ?, ?, ?)",
        [
            (_request_id(request), _digest(request), answer.SerializeToString(), now)
            for request, answer in answers
        ],
    )


def first_answer(
    connection: sqlite3.Connection, request: Message, response_type: type[M]
) -> M | None:
    """The answer that `once` kept for this request, if it has one.

    Raises:
        InvalidArgumentError: the request_id came with another request before.
    """
    row = connection.execute(
        "SELECT digest, response FROM requests WHERE request_id = ? AND created_at >= ?",
        (_request_id(request), time.time() - limits.REQUEST_ID_SECONDS),
    ).fetchone()
    if row is None:
        return None
    if row[0] != _digest(request):
        raise checks.request_id_reused(_request_id(request))
    return response_type.FromString(row[1])


def _request_id(request: Message) -> str:
    request_id: str = request.request_id  # type: ignore[attr-defined]
    return request_id


def _digest(request: Message) -> bytes:
    kind = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(kind + request.SerializeToString(deterministic=True)).digest()

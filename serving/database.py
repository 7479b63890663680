"""SQLite as the record of truth: durable group commit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from foretell.errors import (
    FailedPreconditionError,
    ForetellError,
    ResourceExhaustedError,
    UnavailableError,
)
from serving.idempotency import REQUESTS

log = logging.getLogger(__name__)

Migration: TypeAlias = Callable[[sqlite3.Connection], object]
"""Brings a file from one schema version to the next, within a transaction."""

T = TypeVar("T")
P = TypeVar("P")

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another process's transaction."""

GROUP = 256
"""Writes that share one commit at most, so that the first of them does not wait long."""

PAGE_BYTES = 8_192
"""Five vectors of 384 dimensions fit in a page; of SQLite's 4,096 bytes two vectors leave a quarter
empty, and writing took a fifth longer."""

SELECT_TOGETHER = 500
"""Keys in one SQL statement."""


@dataclass
class _Write(Generic[T]):
    apply: Callable[[sqlite3.Connection, Sequence[Any]], Sequence[T | ForetellError]]
    """What follows in the queue with the same one is done with it: a result for each part."""
    part: Any
    committed: Callable[[T], None] | None
    future: Future[T]


class Database:
    """One SQLite file. Writes go through one thread that commits them in groups.

    A write is a function of a connection. All that wait when the thread is free share one
    transaction and so one fsync; each has a savepoint of its own, so that a failing one takes
    nothing with it. A returned write is on the disk (WAL, synchronous=FULL): it survives kill -9
    and power loss. Several processes may open the same file.

    Raises:
        FailedPreconditionError: the file is of a newer schema version, or no database.
    """

    def __init__(
        self, path: Path, schema: str, version: int = 1, migrations: Sequence[Migration] = ()
    ) -> None:
        """Opens a file, and creates or migrates it where it must be.

        Args:
            path: the file.
            schema: statements that may be repeated, each line's last ";" the end of one.
            version: of this schema.
            migrations: the first brings a file of version 0 to version 1, and so on.
        """
        self.path = path
        self._local = threading.local()
        self._queue: queue.SimpleQueue[_Write[Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        try:
            check_version(path, version)
            self._open_schema(schema + REQUESTS, version, migrations)
        except BaseException:
            for connection in self._connections:
                connection.close()
            raise
        self._writer = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)
        self._writer.start()

    def connection(self) -> sqlite3.Connection:
        """This thread's connection, for reads.

        Each statement sees all that was committed before it.
        """
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection in one read transaction: all statements see one state."""
        connection = self.connection()
        with read_transaction(connection):
            yield connection

    def submit(
        self,
        apply: Callable[[sqlite3.Connection], T],
        committed: Callable[[T], None] | None = None,
    ) -> Future[T]:
        """Runs `apply` in the next transaction.

        `committed` is called with its result after the commit and before the future resolves,
        in the order of the commits: what is derived from the database is brought up to date
        there, so that whoever has the answer sees its effect.
        """
        return self._put(
            _Write(lambda connection, _: [apply(connection)], None, committed, Future())
        )

    async def write(
        self,
        apply: Callable[[sqlite3.Connection], T],
        committed: Callable[[T], None] | None = None,
    ) -> T:
        """`submit` for coroutines. A cancelled caller's write is done all the same."""
        return await _waited_for(self.submit(apply, committed))

    async def write_part(
        self,
        apply: Callable[[sqlite3.Connection, Sequence[P]], Sequence[T | ForetellError]],
        part: P,
    ) -> T:
        """As `write`, of one of the parts that `apply` does together: those of callers who wait.

        Raises the error that `apply` gives for the part; what it raises itself fails all of them.
        """
        return await _waited_for(self._put(_Write(apply, part, None, Future())))

    def close(self) -> None:
        """Commits what waits and closes all connections."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._writer.join()
        for connection in self._connections:
            connection.close()

    def _put(self, write: _Write[T]) -> Future[T]:
        with self._closing:  # nothing may come after the mark that ends the writer
            if self._closed:
                raise UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")
            self._queue.put(write)
        return write.future

    def _connect(self) -> sqlite3.Connection:
        # Any thread may close it (in `close`); each thread uses only its own.
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")  # of a new file
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _open_schema(self, schema: str, version: int, migrations: Sequence[Migration]) -> None:
        """Migrates an old file and creates what is missing, in one transaction."""
        try:
            connection = self.connection()
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and found < version:
                self._migrate(connection, found, version, migrations)
            for statement in schema.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={version}")
            connection.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise _bad(self.path, error) from error

    def _migrate(
        self,
        connection: sqlite3.Connection,
        found: int,
        version: int,
        migrations: Sequence[Migration],
    ) -> None:
        if len(migrations) < version:
            raise FailedPreconditionError(
                f"{self.path} has schema version {found}; this program reads {version}",
                reason="SCHEMA_VERSION",
            )
        log.info("%s: from schema version %d to %d", self.path, found, version)
        for migrate in migrations[found:version]:
            migrate(connection)

    def _run(self) -> None:
        connection = self._connect()
        running = True
        while running:
            group = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(group) < GROUP:
                    group.append(self._queue.get_nowait())
            running = None not in group
            # A write that has begun cannot be cancelled any more.
            writes = [
                write
                for write in group
                if write is not None and write.future.set_running_or_notify_cancel()
            ]
            if writes:
                self._commit(connection, writes)

    def _commit(self, connection: sqlite3.Connection, writes: list[_Write[Any]]) -> None:
        """Runs the writes in one transaction; then resolves their futures."""
        done: list[tuple[_Write[Any], Any]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for apply, several in groupby(writes, key=attrgetter("apply")):
                together = list(several)
                connection.execute("SAVEPOINT one")
                try:
                    results = apply(connection, [write.part for write in together])
                    done.extend(zip(together, results, strict=True))
                except Exception as error:
                    if not connection.in_transaction:  # a full disk ends the transaction itself
                        raise
                    connection.execute("ROLLBACK TO one")
                    for write in together:
                        write.future.set_exception(_typed(error))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for write in writes:
                if not write.future.done():
                    write.future.set_exception(_typed(error))
            return
        for write, result in done:
            if isinstance(result, ForetellError):
                write.future.set_exception(result)
                continue
            try:
                if write.committed is not None:
                    write.committed(result)
                write.future.set_result(result)
            except Exception as error:
                log.exception("a committed write could not be applied in memory")
                write.future.set_exception(error)


async def _waited_for(write: Future[T]) -> T:
    done = asyncio.wrap_future(write)
    done.add_done_callback(_noticed)
    return await asyncio.shield(done)


def _noticed(done: asyncio.Future[Any]) -> None:
    """A write that fails when its caller has left is no exception that nobody has handled."""
    if not done.cancelled():
        done.exception()


@contextlib.contextmanager
def read_transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block see one state."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:  # a failing disk ends it by itself
            connection.execute("ROLLBACK")


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that can change nothing, while another process may write.

    Raises:
        sqlite3.OperationalError: there is no such file.
    """
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    return connection


def check_version(path: Path, version: int) -> None:
    """Refuses a file of a newer schema version before anything in it changes.

    Raises:
        FailedPreconditionError: it is of a newer version, or no database.
    """
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with contextlib.closing(open_read_only(path)) as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise _bad(path, error) from error
    if found > version:
        raise FailedPreconditionError(
            f"{path} has schema version {found}, written by a newer program; "
            f"this program reads {version}",
            reason="SCHEMA_VERSION",
        )


def _bad(path: Path, error: sqlite3.DatabaseError) -> FailedPreconditionError:
    return FailedPreconditionError(f"{path} cannot be opened: {error}", reason="BAD_DATABASE")


def select_in(
    connection: sqlite3.Connection, query: str, keys: Sequence[bytes] | Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Rows of `query IN (keys)`, some keys at a time. The query ends with the column's name."""
    for start in range(0, len(keys), SELECT_TOGETHER):
        some = keys[start : start + SELECT_TOGETHER]
        yield from connection.execute(f"{query} IN ({','.join('?' * len(some))})", some)


def _typed(error: Exception) -> Exception:
    """SQLite's own troubles as errors that a caller can act on."""
    if not isinstance(error, sqlite3.OperationalError):
        return error
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return UnavailableError(
            "another process holds the database", reason="DATABASE_LOCKED", retry_after_s=1.0
        )
    if name == "SQLITE_IOERR_FSYNC":
        # Its pages may be whole in the log all the same: then a crash before the next commit, which
        # would replace them, brings the write back.
        return UnavailableError(
            "the disk did not confirm the write, which may or may not be there after a restart: "
            "repeat it with its request_id",
            reason="DISK_FAILED",
            retry_after_s=60.0,
        )
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return ResourceExhaustedError(
            f"the database cannot be written: {error}", reason="DISK_FULL", retry_after_s=60.0
        )
    return error

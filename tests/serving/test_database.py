import asyncio
import gc
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import (
    FailedPreconditionError,
    ForetellError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from serving import database as database_module
from serving.database import Database
from serving.idempotency import once

SCHEMA = "CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY);\n"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "test.sqlite", SCHEMA)
    yield opened
    opened.close()


def insert(connection: sqlite3.Connection, number: int) -> int:
    connection.execute("INSERT INTO numbers VALUES (?)", (number,))
    return number


def numbers(database: Database) -> list[int]:
    rows = database.connection().execute("SELECT number FROM numbers ORDER BY number")
    return [number for (number,) in rows]


async def test_a_write_is_there_when_it_returns_and_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite"
    database = Database(path, SCHEMA)
    assert await database.write(lambda c: insert(c, 7)) == 7
    assert numbers(database) == [7]
    database.close()
    database = Database(path, SCHEMA)
    assert numbers(database) == [7]
    database.close()


async def test_a_failing_write_takes_nothing_with_it(database: Database) -> None:
    def half(connection: sqlite3.Connection) -> None:
        insert(connection, 2)
        insert(connection, 1)  # is there already

    outcomes = await asyncio.gather(
        database.write(lambda c: insert(c, 1)),
        database.write(half),
        database.write(lambda c: insert(c, 3)),
        return_exceptions=True,
    )
    assert outcomes[0] == 1
    assert outcomes[2] == 3
    assert isinstance(outcomes[1], sqlite3.IntegrityError)
    assert numbers(database) == [1, 3]


async def test_writes_that_wait_share_a_commit(database: Database) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait()

    first = database.submit(hold)
    entered.wait()
    visible: list[int] = []

    def count(connection: sqlite3.Connection) -> None:
        insert(connection, len(visible))
        # Another connection sees only what is committed.
        visible.append(len(numbers(database)))

    rest = [database.submit(count) for _ in range(50)]
    go.set()
    for write in (first, *rest):
        write.result()
    assert visible == [0] * 50
    assert numbers(database) == list(range(50))


async def test_committed_is_called_in_order_before_the_answer(database: Database) -> None:
    applied: list[int] = []

    async def write(number: int) -> bool:
        await database.write(lambda c: insert(c, number), applied.append)
        return number in applied

    assert all(await asyncio.gather(*(write(number) for number in range(100))))
    assert applied == list(range(100))


async def test_committed_is_not_called_for_a_failed_write(database: Database) -> None:
    applied: list[int] = []
    await database.write(lambda c: insert(c, 1), applied.append)
    with pytest.raises(sqlite3.IntegrityError):
        await database.write(lambda c: insert(c, 1), applied.append)
    assert applied == [1]


async def test_an_error_of_committed_reaches_the_caller_and_the_log(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        await database.write(lambda c: insert(c, 1), fail)
    assert "could not be applied" in caplog.text
    assert await database.write(lambda c: insert(c, 2)) == 2


async def test_a_cancelled_callers_write_is_done(database: Database) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait()
        insert(connection, 5)

    task = asyncio.ensure_future(database.write(hold))
    await asyncio.to_thread(entered.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await database.write(lambda c: None)
    assert numbers(database) == [5]


async def test_a_write_that_fails_after_its_caller_has_left_is_not_complained_of(
    database: Database,
) -> None:
    complaints: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    entered, go = threading.Event(), threading.Event()

    def fail(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait()
        raise UnavailableError("not now")

    task = asyncio.ensure_future(database.write(fail))
    await asyncio.to_thread(entered.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go.set()
    await database.write(lambda c: None)
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


def test_a_write_cancelled_before_it_began_is_left_out(database: Database) -> None:
    entered, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait()

    first = database.submit(hold)
    entered.wait()
    second = database.submit(lambda c: insert(c, 1))
    assert second.cancel()
    go.set()
    first.result()
    assert database.submit(lambda c: insert(c, 2)).result() == 2
    assert numbers(database) == [2]


def test_close_commits_what_waits_and_refuses_more(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite"
    database = Database(path, SCHEMA)
    entered, go = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        go.wait()

    database.submit(hold)
    entered.wait()
    waiting = [database.submit(lambda c, n=n: insert(c, n)) for n in range(10)]  # type: ignore[misc]
    closing = threading.Thread(target=database.close)
    closing.start()
    go.set()
    closing.join()
    assert [write.result() for write in waiting] == list(range(10))
    with pytest.raises(UnavailableError):
        database.submit(lambda c: insert(c, 11))
    database.close()
    reopened = Database(path, SCHEMA)
    assert numbers(reopened) == list(range(10))
    reopened.close()


def test_several_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite"
    one, other = Database(path, SCHEMA), Database(path, SCHEMA)
    one.submit(lambda c: insert(c, 1)).result()
    other.submit(lambda c: insert(c, 2)).result()
    assert numbers(one) == numbers(other) == [1, 2]
    one.close()
    other.close()


def test_a_locked_file_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.sqlite"
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 10)
    database = Database(path, SCHEMA)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(UnavailableError) as raised:
        database.submit(lambda c: insert(c, 1)).result()
    assert raised.value.reason == "DATABASE_LOCKED"
    assert raised.value.retry_after_s
    holder.execute("COMMIT")
    holder.close()
    assert database.submit(lambda c: insert(c, 1)).result() == 1
    database.close()


def test_a_full_disk_is_resource_exhausted_and_writes_nothing(database: Database) -> None:
    (pages,) = database.connection().execute("PRAGMA page_count").fetchone()

    def too_much(connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA max_page_count={pages + 2}")
        connection.executemany("INSERT INTO numbers VALUES (?)", ((n,) for n in range(100_000)))

    write = database.submit(too_much)
    with pytest.raises(ResourceExhaustedError) as raised:
        write.result()
    assert raised.value.reason == "DISK_FULL"
    assert numbers(database) == []


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite"
    Database(path, SCHEMA, version=1).close()
    with pytest.raises(FailedPreconditionError, match="schema version 1"):
        Database(path, SCHEMA, version=2)


def test_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "test.sqlite"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(FailedPreconditionError, match="cannot be opened"):
        Database(path, SCHEMA)


def test_commits_reach_the_disk(database: Database) -> None:
    """What makes an acknowledgement survive a power loss, which no test can cut."""

    def durability(connection: sqlite3.Connection) -> tuple[int, str]:
        (synchronous,) = connection.execute("PRAGMA synchronous").fetchone()
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        return synchronous, journal

    full = 2
    assert database.submit(durability).result() == (full, "wal")


def test_a_snapshot_sees_one_state(database: Database) -> None:
    database.submit(lambda c: insert(c, 1)).result()
    with database.snapshot() as connection:
        query = "SELECT COUNT(*) FROM numbers"
        assert connection.execute(query).fetchone() == (1,)
        database.submit(lambda c: insert(c, 2)).result()
        assert connection.execute(query).fetchone() == (1,)
    assert numbers(database) == [1, 2]


class TestOnce:
    @staticmethod
    def write(database: Database, request: pb.DeleteItemsRequest) -> tuple[int, bool]:
        def apply(connection: sqlite3.Connection) -> pb.DeleteItemsResponse:
            (count,) = connection.execute("SELECT COUNT(*) FROM numbers").fetchone()
            return pb.DeleteItemsResponse(deleted=insert(connection, count))

        write = once(apply, request, pb.DeleteItemsResponse)
        response, fresh = database.submit(write).result()
        return response.deleted, fresh

    def test_repeated_it_gives_the_first_answer(self, database: Database) -> None:
        request = pb.DeleteItemsRequest(ids=["a"], request_id="r1")
        assert self.write(database, request) == (0, True)
        assert self.write(database, request) == (0, False)
        assert numbers(database) == [0]

    def test_without_a_request_id_it_is_done_again(self, database: Database) -> None:
        request = pb.DeleteItemsRequest(ids=["a"])
        assert self.write(database, request) == (0, True)
        assert self.write(database, request) == (1, True)

    def test_another_request_with_the_same_id_is_refused(self, database: Database) -> None:
        self.write(database, pb.DeleteItemsRequest(ids=["a"], request_id="r1"))
        with pytest.raises(InvalidArgumentError) as raised:
            self.write(database, pb.DeleteItemsRequest(ids=["b"], request_id="r1"))
        assert raised.value.reason == "REQUEST_ID_REUSED"

    def test_a_failed_write_may_be_repeated(self, database: Database) -> None:
        request = pb.DeleteItemsRequest(request_id="r1")

        def fail(connection: sqlite3.Connection) -> pb.DeleteItemsResponse:
            raise UnavailableError("not now")

        with pytest.raises(ForetellError):
            database.submit(once(fail, request, pb.DeleteItemsResponse)).result()
        assert self.write(database, request) == (0, True)

    def test_it_is_forgotten_after_a_day(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = pb.DeleteItemsRequest(request_id="r1")
        self.write(database, request)
        later = time.time() + limits.REQUEST_ID_SECONDS + 1
        monkeypatch.setattr(time, "time", lambda: later)
        assert self.write(database, request) == (1, True)

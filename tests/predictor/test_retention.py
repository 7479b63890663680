"""Old events go, in small transactions, by one process at a time."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from foretell import limits
from foretell.texts import text_id
from predictor import retention
from predictor.database import open_database
from predictor.events import EventStore
from predictor.ingestion import NewEvent, ingest
from predictor.processes import Presence
from predictor.retention import DAY_US, Retention, expire
from predictor.verify import verify
from serving.database import Database


def event(user: str, behavior_type: str, days_ago: float, text: str | None = None) -> NewEvent:
    time_us = time.time_ns() // 1_000 - int(days_ago * DAY_US)
    identity = text_id(text) if text else None
    return NewEvent(user, behavior_type, time_us, "i", text, identity, None, None)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = open_database(tmp_path)
    yield database
    database.close()


def write(db: Database, *events: NewEvent) -> None:
    db.submit(lambda connection: ingest(connection, events)).result()


async def work(*tasks: Retention, until_kept: int) -> None:
    """Lets them run until so many events are left, and no fewer."""
    running = [asyncio.create_task(task.run()) for task in tasks]
    store = EventStore(tasks[0]._db)
    try:
        async with asyncio.timeout(60):
            while store.counts().events > until_kept:
                await asyncio.sleep(0.01)
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    assert store.counts().events == until_kept


async def test_each_type_has_its_days(db: Database, tmp_path: Path) -> None:
    write(
        db,
        event("both", "view", 100, "seldom"),
        event("both", "view", 80, "often"),
        event("gone", "view", 100, "often"),
        event("gone", "search", 31),
        event("late", "search", 29),
        event("late", "buy", 366),
        event("kept", "like", 10_000),
    )
    days = {"view": 90, "search": 30, "like": 0, "unknown": 1}
    task = Retention(db, Presence(db, 1.0), 365, days)
    await work(task, until_kept=3)
    assert task.deleted == {"view": 2, "search": 1, "buy": 1}
    assert EventStore(db).type_counts() == {"view": 1, "search": 1, "like": 1}
    users = db.connection().execute("SELECT user_id FROM users ORDER BY user_id")
    assert [user for (user,) in users] == ["both", "kept", "late"]
    # A text that no event has any more waits for its deletion in the embedder.
    texts = dict(db.connection().execute("SELECT text, events FROM texts"))
    assert texts == {"seldom": 0, "often": 1}
    assert verify(tmp_path).findings == []


async def test_nothing_goes_without_a_setting(db: Database) -> None:
    write(db, event("u", "view", 30_000))
    task = Retention(db, Presence(db, 1.0), 0, {})
    await task._round()
    assert EventStore(db).counts().events == 1
    assert not task.deleted


async def test_one_process_deletes_and_others_write_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "TOGETHER", 50)
    with contextlib.ExitStack() as opened:
        dbs = [opened.enter_context(contextlib.closing(open_database(tmp_path))) for _ in range(2)]
        write(dbs[0], *(event(f"u{n % 7}", "view", 2 + n) for n in range(1_000)))
        tasks = [Retention(db, Presence(db, 1.0), 1, {}) for db in dbs]

        async def writing() -> None:
            for number in range(20):
                await dbs[1].write(partial(ingest, events=[event(f"new {number}", "view", 0)]))

        store = EventStore(dbs[0])
        running = [asyncio.create_task(task.run()) for task in tasks]
        async with asyncio.timeout(60):
            await writing()
            # What is committed is counted a moment later.
            while sum(task.deleted.total() for task in tasks) < 1_000:
                await asyncio.sleep(0.01)
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert store.type_counts() == {"view": 20}
        assert sorted(task.deleted.total() for task in tasks) == [0, 1_000]
    assert verify(tmp_path).findings == []


def test_a_transaction_is_small_and_takes_the_oldest(db: Database) -> None:
    write(db, *(event("u", "view", days) for days in range(1, 2 * retention.TOGETHER)))
    now = time.time_ns() // 1_000
    assert db.submit(lambda c: expire(c, 1, now)).result() == retention.TOGETHER
    (oldest,) = db.connection().execute("SELECT min(time) FROM events").fetchone()
    assert round((now - oldest) / DAY_US) == retention.TOGETHER - 1
    assert db.submit(lambda c: expire(c, 1, now)).result() == retention.TOGETHER - 1
    assert db.submit(lambda c: expire(c, 1, now)).result() == 0
    # The type and the user went with their last events.
    assert EventStore(db).counts().users == 0
    assert EventStore(db).type_counts() == {}


async def test_answers_of_old_requests_go(db: Database) -> None:
    now = time.time()
    rows = [("old", b"", b"", now - limits.REQUEST_ID_SECONDS - 1), ("new", b"", b"", now)]
    db.submit(lambda c: c.executemany("INSERT INTO requests VALUES (?, ?, ?, ?)", rows)).result()
    await Retention(db, Presence(db, 1.0), 0, {})._round()
    assert list(db.connection().execute("SELECT request_id FROM requests")) == [("new",)]

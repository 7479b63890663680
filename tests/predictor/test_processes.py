import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from foretell.errors import ResourceExhaustedError
from predictor import application, processes
from predictor.__main__ import main
from predictor.database import open_database
from predictor.processes import MISSED, Presence
from serving.database import Database

HEARTBEAT_S = 0.1


@pytest.fixture
def databases(tmp_path: Path) -> Iterator[tuple[Database, Database]]:
    """The same file, as two processes open it."""
    first, second = open_database(tmp_path), open_database(tmp_path)
    yield first, second
    first.close()
    second.close()


async def test_a_lease_is_one_processs_until_it_is_given_back(
    databases: tuple[Database, Database],
) -> None:
    one, two = (Presence(db, 60.0) for db in databases)
    assert await one.hold("work")
    assert await one.hold("work")
    assert not await two.hold("work")
    assert await two.hold("other work")
    await two.release("work")  # not its to give
    assert not await two.hold("work")
    await one.release("work")
    assert await two.hold("work")
    assert not await one.hold("work")
    await two.leave()
    assert await one.hold("work")


async def test_a_lease_outlives_its_holder_for_a_few_heartbeats(
    databases: tuple[Database, Database],
) -> None:
    one, two = (Presence(db, HEARTBEAT_S) for db in databases)
    await one.beat()
    assert await one.hold("work")
    expiry = time.monotonic() + MISSED * HEARTBEAT_S
    taken = 0.0
    while not taken:  # the first one is silent from now on
        if await two.hold("work"):
            taken = time.monotonic()
    assert taken >= expiry - 0.05
    assert not await one.hold("work")  # it comes back and sees that it has lost it
    await one.beat()
    assert not await one.hold("work")
    assert await two.hold("work")


async def test_the_heartbeat_renews_leases(databases: tuple[Database, Database]) -> None:
    one, two = (Presence(db, HEARTBEAT_S) for db in databases)
    assert await one.hold("work")
    end = time.monotonic() + 2 * MISSED * HEARTBEAT_S
    while time.monotonic() < end:
        await one.beat()
        assert not await two.hold("work")


@pytest.mark.parametrize("jump_s", [86_400, -86_400])
async def test_a_clock_that_jumps_changes_nothing(
    databases: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    one, two = (Presence(db, 60.0) for db in databases)
    await one.report(1)
    assert await one.hold("work")
    before, before_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: before() + jump_s)
    monkeypatch.setattr(time, "time_ns", lambda: before_ns() + jump_s * 10**9)
    await two.report(1)
    assert not await two.hold("work")
    assert {process.name for process in two.live()} == {one.name, two.name}
    await one.beat()
    assert await one.hold("work")


async def test_rows_from_before_the_machines_start_count_for_nothing(
    databases: tuple[Database, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Presence(databases[0], 60.0)
    await one.report(1)
    assert await one.hold("work")
    monkeypatch.setattr(processes, "boot_id", lambda: "another")
    two = Presence(databases[1], 60.0)
    await two.report(1)
    assert await two.hold("work")
    assert [process.name for process in two.live()] == [two.name]


async def test_who_lives_and_which_activation_it_has_followed(
    databases: tuple[Database, Database],
) -> None:
    one, two = (Presence(db, 60.0) for db in databases)
    await one.report(3)
    await two.report(2, "a file is damaged")
    live = {process.name: (process.generation, process.note) for process in one.live()}
    assert live == {one.name: (3, ""), two.name: (2, "a file is damaged")}
    assert two.live() == one.live()
    await one.leave()
    assert [process.name for process in two.live()] == [two.name]


async def test_where_the_database_is_held_leases_are_left_to_expire(
    databases: tuple[Database, Database], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (Presence(db, 60.0) for db in databases)
    assert await one.hold("work")
    await databases[0].write(lambda connection: connection.execute("PRAGMA busy_timeout=1"))
    holder = sqlite3.connect(databases[0].path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    await one.leave()
    holder.close()
    assert "another process holds the database" in caplog.text
    assert not await two.hold("work")


def test_a_full_disk_at_the_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(data_dir: Path) -> NoReturn:
        raise ResourceExhaustedError("the database cannot be written", reason="DISK_FULL")

    monkeypatch.setattr(application, "open_database", full)
    assert main(["--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "predictor: the database cannot be written"

"""The path from one schema version to the next."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from foretell.errors import FailedPreconditionError
from serving.database import Database

OLDEST = "CREATE TABLE IF NOT EXISTS names (name TEXT);\n"
NEWEST = "CREATE TABLE IF NOT EXISTS names (name TEXT, length INTEGER, upper TEXT);\n"


def add_length(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE names ADD COLUMN length INTEGER")
    connection.execute("UPDATE names SET length = length(name)")


def add_upper(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE names ADD COLUMN upper TEXT")
    connection.execute("UPDATE names SET upper = upper(name)")


def fail(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM names")
    raise sqlite3.OperationalError("no such function: upper")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of version 0 with a row."""
    path = tmp_path / "test.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(OLDEST)
        connection.execute("INSERT INTO names VALUES ('foretell')")
    return path


def rows(path: Path) -> tuple[int, list[Any]]:
    """Version and contents."""
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return version, list(connection.execute("SELECT * FROM names"))


def test_each_step_is_done_once_and_in_order(path: Path) -> None:
    Database(path, NEWEST, 1, [add_length]).close()
    assert rows(path) == (1, [("foretell", 8)])
    Database(path, NEWEST, 2, [add_length, add_upper]).close()
    Database(path, NEWEST, 2, [add_length, add_upper]).close()
    assert rows(path) == (2, [("foretell", 8, "FORETELL")])


def test_a_new_file_needs_none(tmp_path: Path) -> None:
    Database(tmp_path / "new", NEWEST, 2, [fail, fail]).close()
    assert rows(tmp_path / "new") == (2, [])


def test_a_step_that_fails_leaves_the_old_file(path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="no such function"):
        Database(path, NEWEST, 2, [add_length, fail])
    assert rows(path) == (0, [("foretell",)])


def test_processes_that_start_together_migrate_once(path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(
            pool.map(lambda _: Database(path, NEWEST, 2, [add_length, add_upper]), range(4))
        )
    for one in opened:
        one.close()
    assert rows(path) == (2, [("foretell", 8, "FORETELL")])


def test_what_is_newer_or_has_no_path_is_refused_and_left(path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="has schema version 0") as raised:
        Database(path, NEWEST, 1)
    assert raised.value.reason == "SCHEMA_VERSION"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(FailedPreconditionError, match="3, written by a newer") as raised:
        Database(path, NEWEST, 2, [add_length, add_upper])
    assert raised.value.reason == "SCHEMA_VERSION"
    assert rows(path) == (3, [("foretell",)])

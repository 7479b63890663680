"""A data directory of an older schema becomes one of this, and loses nothing."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from predictor.backup import back_up, restore
from predictor.database import FILE, VERSION, open_database
from predictor.verify import verify

OLD = Path(__file__).parent / "schema-0.sql"
"""What a database of version 0 held."""

KILLED = """
import os, signal, sys
from pathlib import Path
from predictor import database

def killed(connection):
    database.MIGRATIONS[0](connection)
    connection.execute("PRAGMA user_version = 1")
    os.kill(os.getpid(), signal.SIGKILL)

database.Database(Path(sys.argv[1]), database.SCHEMA, 1, (killed,))
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data directory of version 0."""
    folder = tmp_path / "data"
    folder.mkdir()
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(OLD.read_text())
    return folder


def contents(connection: sqlite3.Connection) -> dict[str, list[Any]]:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return {name: list(connection.execute(f"SELECT * FROM {name}")) for (name,) in names.fetchall()}


def schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def read(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(folder / FILE)


def test_it_becomes_what_a_new_one_is_and_loses_nothing(old: Path, tmp_path: Path) -> None:
    with closing(read(old)) as connection:
        before = contents(connection)
        assert len(before["events"]) == 12
    open_database(old).close()
    open_database(tmp_path / "new").close()
    with closing(read(old)) as connection, closing(read(tmp_path / "new")) as new:
        assert contents(connection) == before
        assert schema(connection) == schema(new)
        assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
    assert verify(old).findings == []
    open_database(old).close()  # once


def test_killed_in_the_middle_it_is_the_old_one(old: Path) -> None:
    with closing(read(old)) as connection:
        before = contents(connection), schema(connection)
    command = [sys.executable, "-c", KILLED, str(old / FILE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    with closing(read(old)) as connection:
        assert (contents(connection), schema(connection)) == before
        assert connection.execute("PRAGMA user_version").fetchone() == (0,)
    open_database(old).close()
    assert verify(old).findings == []


def test_a_backup_of_an_older_schema_is_migrated_after_its_restore(
    old: Path, tmp_path: Path
) -> None:
    assert verify(old).findings == []
    assert back_up(old, tmp_path / "backup")["schema"] == 0
    restore(tmp_path / "backup", tmp_path / "again")
    open_database(tmp_path / "again").close()
    assert verify(tmp_path / "again").seen["events"] == 12

"""The predictor's database: one SQLite file that all predictor processes of a host share."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from foretell.errors import FailedPreconditionError
from predictor import behaviors, events, processes, registry
from serving.database import Database, Migration, check_version, open_read_only

FILE = "events.db"
"""Its name in the data directory."""

VERSION = 1
"""Of the schema."""

SCHEMA = events.SCHEMA + behaviors.SCHEMA + processes.SCHEMA + registry.SCHEMA
"""What a new file gets."""


def _events_by_type(connection: sqlite3.Connection) -> None:
    """From 0 to 1: retention finds the oldest events of a type."""
    connection.execute("CREATE INDEX events_of_type ON events (type, time)")


MIGRATIONS: tuple[Migration, ...] = (_events_by_type,)
"""From each version to the next."""


def open_database(data_dir: Path) -> Database:
    """Opens `data_dir`/events.db, and creates both where they are missing.

    Raises:
        FailedPreconditionError: the file is of another schema version, or no database.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    return Database(data_dir / FILE, SCHEMA, VERSION, MIGRATIONS)


def open_to_read(data_dir: Path) -> sqlite3.Connection:
    """A read-only connection, beside predictors that may run.

    Raises:
        FailedPreconditionError: there is no data directory, or it is of another version.
    """
    path = data_dir / FILE
    if not path.is_file():
        raise FailedPreconditionError(f"there is no {path}", reason="NO_STORE")
    check_version(path, VERSION)
    return open_read_only(path)

"""The predictor's database: one SQLite file that all predictor processes of a host share."""

from __future__ import annotations

from pathlib import Path

from predictor import behaviors, events, processes, registry
from serving.database import Database

FILE = "events.db"
"""Its name in the data directory."""


def open_database(data_dir: Path) -> Database:
    """Opens `data_dir`/events.db, and creates both where they are missing.

    Raises:
        FailedPreconditionError: the file is of another schema version, or no database.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    schema = events.SCHEMA + behaviors.SCHEMA + processes.SCHEMA + registry.SCHEMA
    return Database(data_dir / FILE, schema)

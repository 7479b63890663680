"""The consistency check of a data directory: SQLite, and the registered versions' files.

It only reads, takes no lock, and may run beside predictors.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from foretell.errors import InvalidArgumentError
from foretell.texts import text_id
from predictor import database, registry
from predictor.models import model_dir
from serving.database import read_transaction
from serving.keeping import Report, check_sqlite, reporting_damage

PAIRS = {
    "event without a user": "SELECT event FROM events "
    "WHERE NOT EXISTS (SELECT 1 FROM users WHERE users.user = events.user)",
    "event without a behavior type": "SELECT event FROM events "
    "WHERE NOT EXISTS (SELECT 1 FROM types WHERE types.type = events.type)",
    "event whose text is missing": "SELECT event FROM events WHERE text IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM texts WHERE texts.number = events.text)",
    "event whose attributes are no JSON object": "SELECT event FROM events "
    "WHERE attributes IS NOT NULL AND CASE json_valid(attributes) "
    "WHEN 1 THEN json_type(attributes) != 'object' ELSE 1 END",
    "user without an event": "SELECT user_id FROM users "
    "WHERE NOT EXISTS (SELECT 1 FROM events WHERE events.user = users.user)",
    "behavior type that counts other events than it has": "SELECT name FROM types LEFT JOIN "
    "(SELECT type, count(*) AS found FROM events GROUP BY type) USING (type) "
    "WHERE events != coalesce(found, 0)",
    "text that counts other events than it has": "SELECT text_id FROM texts LEFT JOIN "
    "(SELECT text AS number, count(*) AS found FROM events GROUP BY text) USING (number) "
    "WHERE events != coalesce(found, 0)",
}
"""Queries of what must not be."""


def verify(folder: Path) -> Report:
    """Checks SQLite, then each version's files.

    Raises:
        FailedPreconditionError: there is no data directory of this version.
        OSError, sqlite3.Error: it cannot be read.
    """
    report = Report("events", "users", "texts", "versions")
    with (
        contextlib.closing(database.open_to_read(folder)) as connection,
        reporting_damage(connection, report),
    ):
        with read_transaction(connection):
            check_sqlite(connection, report)
            _check_events(connection, report)
        _check_versions(connection, folder, report)
    return report


def _check_events(connection: sqlite3.Connection, report: Report) -> None:
    for table in ("events", "users", "texts"):
        (report.seen[table],) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    for kind, query in PAIRS.items():
        report.all(kind, (repr(which) for (which,) in connection.execute(query)))
    for found, text in connection.execute("SELECT text_id, text FROM texts"):
        if found != text_id(text):
            report.add("text whose id is not its own", found)


def _check_versions(connection: sqlite3.Connection, folder: Path, report: Report) -> None:
    """All versions load and give their golden answers; the active one is among them."""
    versions, active = registry.files(connection), registry.active(connection).version
    for version, files in versions.items():
        try:
            loaded = model_dir.load(registry.models_dir(folder) / version)
            loaded.check_golden()
            if json.dumps(loaded.config.files, sort_keys=True) != files:
                report.add("version with other files than were registered", version)
        except InvalidArgumentError as error:
            if registry.files(connection).get(version) == files:  # else it was deleted meanwhile
                report.add("version that cannot be served", f"{version}: {error.message}")
        report.seen["versions"] += 1
    if active and active not in versions:
        report.add("active version that is not registered", active)

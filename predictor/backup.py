"""Copies of a data directory: its SQLite file and its versions' files, while predictors may run.

A version's files never change, and are there before its row is and until after it is gone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

from foretell.errors import FailedPreconditionError
from predictor import database, registry
from serving import keeping
from serving.files import (
    File,
    check_file,
    make_folder,
    sync_folder,
    write_signed,
)

FORMAT = 1
"""Of a backup."""

UNFINISHED = f"{database.FILE}.new"
"""A database that is being restored; a restore that was killed may be repeated."""

ATTEMPTS = 5
"""At a copy of the database all of whose versions were there to be copied."""


def back_up(data_dir: Path, to: Path) -> dict[str, Any]:
    """Copies what is committed now; gives the manifest. Takes no lock and changes nothing.

    Raises:
        FailedPreconditionError: there is no data directory of this version, `to` has files, or
            versions come and go all the time.
        OSError, sqlite3.Error: it cannot be read or written; `to` is left without a manifest.
    """
    path = to / database.FILE
    with contextlib.closing(database.open_to_read(data_dir)) as connection:
        keeping.check_empty(to)
        make_folder(registry.models_dir(to))
        for _ in range(ATTEMPTS):
            _copy_versions(connection, registry.files(connection), data_dir, to)
            path.unlink(missing_ok=True)
            keeping.copy_database(connection, path)
            with contextlib.closing(sqlite3.connect(path)) as copy:
                versions, counts = registry.files(copy), _counts(copy)
            _copy_versions(connection, versions, data_dir, to)
            if all((registry.models_dir(to) / version).is_dir() for version in versions):
                break
        else:
            raise FailedPreconditionError(
                "versions are registered and deleted all the time: try later",
                reason="VERSIONS_CHANGE",
            )
    models = {
        str(file.relative_to(to)): keeping.describe_file(file)
        for file in sorted(registry.models_dir(to).rglob("*"))
        if file.is_file()
    }
    manifest = {
        "format": FORMAT,
        **counts,
        "versions": sorted(versions),
        "created_at": keeping.created_now(),
        "files": {database.FILE: keeping.describe_file(path), **models},
    }
    sync_folder(to)
    write_signed(to / keeping.MANIFEST, manifest)
    sync_folder(to)
    return manifest


def restore(source: Path, data_dir: Path) -> dict[str, Any]:
    """Makes a data directory of a backup that is whole; gives its manifest.

    What the embedder has of behavior texts is not known then: they are sent to it again, which
    encodes only those that it lacks.

    Raises:
        FailedPreconditionError: the backup is damaged or of another version, or `data_dir` has
            files.
        OSError: it cannot be read or written.
    """
    with keeping.damage_refused(source):
        manifest = keeping.read_manifest(source, FORMAT, database.VERSION)
        expected = {name: File(**file) for name, file in manifest["files"].items()}
        for name, file in expected.items():
            check_file(source / name, file)
        models = registry.models_dir(data_dir)
        keeping.check_empty(data_dir, {models.name, UNFINISHED})
        make_folder(models)
        for version in manifest["versions"]:
            registry.copy(registry.models_dir(source) / version, models / version)
        for name, file in expected.items():
            if name != database.FILE:
                check_file(data_dir / name, file)
        keeping.restore_file(
            source / database.FILE,
            data_dir / database.FILE,
            expected[database.FILE],
            data_dir / UNFINISHED,
            _embed_again,
        )
    return manifest


def describe(manifest: dict[str, Any]) -> str:
    """One line for people."""
    size = sum(file["bytes"] for file in manifest["files"].values())
    return f"{manifest['events']:,} events, {len(manifest['versions'])} versions, {size:,} bytes"


def _copy_versions(
    connection: sqlite3.Connection, versions: dict[str, str], data_dir: Path, to: Path
) -> None:
    """Makes the copied versions those that are listed, but for those that are gone already."""
    target = registry.models_dir(to)
    for there in target.iterdir():
        if not _is_copy(there, versions.get(there.name)):
            shutil.rmtree(there)
    for version, files in versions.items():
        if (target / version).exists():
            continue
        try:
            registry.copy(registry.models_dir(data_dir) / version, target / version)
        except (OSError, shutil.Error):
            if registry.files(connection).get(version) == files:
                raise  # else it was deleted meanwhile


def _is_copy(there: Path, files: str | None) -> bool:
    """Whether it is the version with these files, and no earlier one of its name."""
    if files is None:
        return False
    config = json.loads((there / "config.json").read_bytes())
    return json.dumps(config["files"], sort_keys=True) == files


def _counts(connection: sqlite3.Connection) -> dict[str, int]:
    """The schema version and the number of events."""
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (events,) = connection.execute("SELECT count(*) FROM events").fetchone()
    return {"schema": schema, "events": events}


def _embed_again(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=OFF")  # a file beside it might be left
        connection.execute("UPDATE texts SET state = 0 WHERE state = 1")

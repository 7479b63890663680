"""Copies of a data directory: its SQLite file, taken while an embedder may serve, and a manifest.

Snapshots are not copied: what they hold follows from SQLite.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from embedder.storage import store
from embedder.storage.files import (
    DamagedError,
    File,
    check_file,
    file_digest,
    make_folder,
    read_signed,
    sync_folder,
    write_signed,
)
from embedder.storage.snapshot import MANIFEST
from foretell.errors import FailedPreconditionError

FORMAT = 1
"""Of a backup."""

UNFINISHED = "embedder.new"
"""A store that is being restored; a restore that was killed may be repeated."""


def back_up(data_dir: Path, to: Path) -> dict[str, Any]:
    """Copies what is committed now; gives the manifest. Takes no lock and changes nothing.

    Raises:
        FailedPreconditionError: there is no data directory of this version, or `to` has files.
        OSError, sqlite3.Error: it cannot be read or written; `to` is left without a manifest.
    """
    with contextlib.closing(store.open_to_read(data_dir)) as connection:
        _check_empty(to)
        make_folder(to)
        path = to / store.FILE
        with contextlib.closing(sqlite3.connect(path)) as copy:
            # Synced below. One file, without a write-ahead log of its own.
            copy.execute("PRAGMA synchronous=OFF")
            connection.backup(copy)  # in one read transaction
            copy.execute("PRAGMA journal_mode=DELETE")
            seq, meta = store.current_seq(copy), store.meta(copy)
    _sync_file(path)
    written = file_digest(path)
    manifest = {
        "format": FORMAT,
        "schema": store.VERSION,
        "store": meta["store"],
        "encoder": meta["encoder"],
        "seq": seq,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bytes": written.bytes,
        "sha256": written.sha256,
    }
    sync_folder(to)
    write_signed(to / MANIFEST, manifest)
    sync_folder(to)
    return manifest


def restore(source: Path, data_dir: Path) -> dict[str, Any]:
    """Makes a data directory of a backup that is whole; gives its manifest.

    Raises:
        FailedPreconditionError: the backup is damaged or of another version, or `data_dir` has
            files or is another process's.
        OSError: it cannot be read or written.
    """
    try:
        manifest = read_signed(source / MANIFEST)
        if (manifest["format"], manifest["schema"]) != (FORMAT, store.VERSION):
            raise DamagedError(
                f"it has format {manifest['format']} and schema version {manifest['schema']}; "
                f"this program reads {FORMAT} and {store.VERSION}"
            )
        expected = File(manifest["bytes"], manifest["sha256"])
        check_file(source / store.FILE, expected)
        _check_empty(data_dir, {store.LOCK, UNFINISHED})
        # An embedder that starts meanwhile must not begin a store which is then replaced.
        with store.owned(data_dir):
            temporary = data_dir / UNFINISHED
            try:
                shutil.copyfile(source / store.FILE, temporary)
                check_file(temporary, expected)
                _sync_file(temporary)
                temporary.rename(data_dir / store.FILE)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(data_dir)
    except DamagedError as error:
        raise FailedPreconditionError(
            f"{source} is no good backup: {error}", reason="DAMAGED_BACKUP"
        ) from error
    return manifest


def _check_empty(folder: Path, besides: Collection[str] = ()) -> None:
    if folder.exists() and (
        not folder.is_dir() or any(one.name not in besides for one in folder.iterdir())
    ):
        raise FailedPreconditionError(
            f"{folder} is not empty: name a directory that is new or empty", reason="NOT_EMPTY"
        )


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())

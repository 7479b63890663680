"""Copies of a data directory: its SQLite file, taken while an embedder may serve, and a manifest.

Snapshots are not copied: what they hold follows from SQLite.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from embedder.storage import store
from serving import keeping
from serving.files import File, check_file, make_folder, sync_folder, write_signed

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
    path = to / store.FILE
    with contextlib.closing(store.open_to_read(data_dir)) as connection:
        keeping.check_empty(to)
        make_folder(to)
        keeping.copy_database(connection, path)
    with contextlib.closing(sqlite3.connect(path)) as copy:
        seq, meta = store.current_seq(copy), store.meta(copy)
    manifest = {
        "format": FORMAT,
        "schema": store.VERSION,
        "store": meta["store"],
        "encoder": meta["encoder"],
        "seq": seq,
        "created_at": keeping.created_now(),
        **keeping.describe_file(path),
    }
    sync_folder(to)
    write_signed(to / keeping.MANIFEST, manifest)
    sync_folder(to)
    return manifest


def restore(source: Path, data_dir: Path) -> dict[str, Any]:
    """Makes a data directory of a backup that is whole; gives its manifest.

    Raises:
        FailedPreconditionError: the backup is damaged or of another version, or `data_dir` has
            files or is another process's.
        OSError: it cannot be read or written.
    """
    with keeping.damage_refused(source):
        manifest = keeping.read_manifest(source, FORMAT, store.VERSION)
        expected = File(manifest["bytes"], manifest["sha256"])
        check_file(source / store.FILE, expected)
        keeping.check_empty(data_dir, {store.LOCK, UNFINISHED})
        # An embedder that starts meanwhile must not begin a store of its own.
        with store.owned(data_dir):
            keeping.restore_file(
                source / store.FILE, data_dir / store.FILE, expected, data_dir / UNFINISHED
            )
    return manifest

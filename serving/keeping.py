"""`verify`, `backup` and `restore` of a data directory: what both services' commands share."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.errors import FailedPreconditionError
from serving.files import DamagedError, File, check_file, file_digest, read_signed, sync_folder

MANIFEST = "manifest.json"
"""Of a backup: a signed file, written last, that says what all others are."""

SHOWN = 20
"""Findings of one kind that are written out."""


@dataclass(frozen=True)
class Commands:
    """What a service does with its data directory.

    A manifest says what a backup holds; `describe` makes a line of it.
    """

    program: str
    data_dir: Path
    """Where none is named."""
    verify: Callable[[Path], Report]
    back_up: Callable[[Path, Path], dict[str, Any]]
    restore: Callable[[Path, Path], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]


class Report:
    """What was found, and how much was looked at."""

    def __init__(self, *names: str) -> None:
        """`names`: what is counted in `seen`, in the order of the summary."""
        self.findings: list[str] = []
        self.seen: Counter[str] = Counter()
        self._names = names
        self._of_kind: Counter[str] = Counter()

    def add(self, kind: str, which: object = "") -> None:
        """A finding; of many of one kind only some are kept."""
        self._of_kind[kind] += 1
        if self._of_kind[kind] <= SHOWN:
            self.findings.append(f"{kind}: {which}" if which != "" else kind)
        elif self._of_kind[kind] == SHOWN + 1:
            self.findings.append(f"{kind}: and more")

    def all(self, kind: str, found: Iterable[object]) -> None:
        """A finding each."""
        for which in found:
            self.add(kind, which)

    def summary(self) -> str:
        """One line."""
        seen = ", ".join(f"{self.seen[name]:,} {name}" for name in self._names)
        return f"{seen}; findings: {self._of_kind.total():,}"


def check_sqlite(connection: sqlite3.Connection, report: Report) -> None:
    """SQLite's own checks of the file and of the schema's foreign keys."""
    for (said,) in connection.execute("PRAGMA integrity_check"):
        if said != "ok":
            report.add("SQLite file", said)
    for table, rowid, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        report.add(f"row of {table} whose {parent} is missing", rowid)


@contextlib.contextmanager
def reporting_damage(connection: sqlite3.Connection, report: Report) -> Iterator[None]:
    """A file that cannot be read to its end is a finding; what can be is read, UTF-8 or not."""
    # What is no UTF-8 becomes another text than the one that was written.
    connection.text_factory = lambda text: text.decode(errors="backslashreplace")
    try:
        yield
    except sqlite3.DatabaseError as error:
        if not getattr(error, "sqlite_errorname", "").startswith("SQLITE_CORRUPT"):
            raise
        report.add("SQLite file that cannot be read to its end", error)


def copy_database(connection: sqlite3.Connection, path: Path) -> None:
    """Copies what is committed now into one new file, without a write-ahead log of its own."""
    with contextlib.closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA synchronous=OFF")  # synced below
        connection.backup(copy)  # in one read transaction
        copy.execute("PRAGMA journal_mode=DELETE")
    sync_file(path)


def describe_file(path: Path) -> dict[str, Any]:
    """A file as a manifest says it."""
    written = file_digest(path)
    return {"bytes": written.bytes, "sha256": written.sha256}


def created_now() -> str:
    """The time, for a manifest."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_manifest(source: Path, backup_format: int, version: int) -> dict[str, Any]:
    """The manifest of a backup.

    An older schema is migrated when the service starts.

    Raises:
        DamagedError: it is damaged, or this program cannot read such a backup.
    """
    manifest = read_signed(source / MANIFEST)
    if manifest["format"] != backup_format or manifest["schema"] > version:
        raise DamagedError(
            f"it has format {manifest['format']} and schema version {manifest['schema']}; "
            f"this program reads {backup_format} and {version}"
        )
    return manifest


def restore_file(
    source: Path,
    target: Path,
    expected: File,
    unfinished: Path,
    prepare: Callable[[Path], None] | None = None,
) -> None:
    """Copies a file that must be whole; it appears as `target` at once, and never over another.

    Args:
        source: of the backup.
        target: its new name.
        expected: what it must be.
        unfinished: the copy's name until then, which may be there.
        prepare: changes the copy before it gets its name.

    Raises:
        DamagedError: it is not what was backed up.
        FailedPreconditionError: there is a `target` now.
    """
    try:
        shutil.copyfile(source, unfinished)
        check_file(unfinished, expected)
        if prepare is not None:
            prepare(unfinished)
        sync_file(unfinished)
        os.link(unfinished, target)
    except FileExistsError as error:
        raise FailedPreconditionError(
            f"{target} was made meanwhile: stop the service that uses it", reason="NOT_EMPTY"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def damage_refused(source: Path) -> Iterator[None]:
    """A damaged backup as an error for people."""
    try:
        yield
    except DamagedError as error:
        raise FailedPreconditionError(
            f"{source} is no good backup: {error}", reason="DAMAGED_BACKUP"
        ) from error


def check_empty(folder: Path, besides: Collection[str] = ()) -> None:
    """Raises:
    FailedPreconditionError: there is something else than `besides`.
    """
    if folder.exists() and (
        not folder.is_dir() or any(one.name not in besides for one in folder.iterdir())
    ):
        raise FailedPreconditionError(
            f"{folder} is not empty: name a directory that is new or empty", reason="NOT_EMPTY"
        )


def sync_file(path: Path) -> None:
    """Makes a file's bytes last."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def main(commands: Commands, arguments: Sequence[str]) -> int:
    """Exit status 0; 1 where `verify` found something; 2 and one line where it cannot be done."""
    options = _parser(commands).parse_args(arguments)
    try:
        return _run(commands, options)
    except FailedPreconditionError as error:
        sys.stderr.write(f"{commands.program}: {error.message}\n")
    except (OSError, sqlite3.Error) as error:
        sys.stderr.write(f"{commands.program}: {error}\n")
    return 2


def _run(commands: Commands, options: argparse.Namespace) -> int:
    match options.command:
        case "verify":
            report = commands.verify(options.data_dir)
            for finding in report.findings:
                sys.stdout.write(f"{finding}\n")
            sys.stdout.write(f"{options.data_dir}: {report.summary()}\n")
            return 1 if report.findings else 0
        case "backup":
            manifest = commands.back_up(options.data_dir, options.to)
            sys.stdout.write(f"{options.to}: {commands.describe(manifest)}\n")
        case _:
            manifest = commands.restore(options.source, options.data_dir)
            sys.stdout.write(f"{options.data_dir}: {commands.describe(manifest)}\n")
    return 0


def _parser(commands: Commands) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {commands.program}")
    names = parser.add_subparsers(dest="command", required=True)
    verifying = names.add_parser(
        "verify", help="check a data directory; the service may run meanwhile"
    )
    backing_up = names.add_parser(
        "backup", help="copy a data directory; the service may run meanwhile"
    )
    restoring = names.add_parser("restore", help="make a data directory of a backup")
    for one in (verifying, backing_up, restoring):
        one.add_argument("--data-dir", type=Path, default=commands.data_dir, metavar="DIR",
                         help="folder of the service's data (default: %(default)s)")  # fmt: skip
    backing_up.add_argument("--to", type=Path, required=True, metavar="DIR",
                            help="new or empty directory")  # fmt: skip
    restoring.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR",
                           help="a backup; the data directory must be new or empty")  # fmt: skip
    return parser

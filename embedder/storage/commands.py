"""`python -m embedder verify`, `backup` and `restore`: a data directory from the command line."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from embedder.settings import DEFAULT_DATA_DIR, PROGRAM
from embedder.storage.backup import back_up, restore
from embedder.storage.verify import verify
from foretell.errors import FailedPreconditionError


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 where `verify` found something; 2 and one line where it cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except FailedPreconditionError as error:
        sys.stderr.write(f"{PROGRAM}: {error.message}\n")
    except (OSError, sqlite3.Error) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
    return 2


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "verify":
            report = verify(options.data_dir)
            for finding in report.findings:
                sys.stdout.write(f"{finding}\n")
            sys.stdout.write(f"{options.data_dir}: {report.summary()}\n")
            return 1 if report.findings else 0
        case "backup":
            manifest = back_up(options.data_dir, options.to)
            sys.stdout.write(f"{options.to}: seq {manifest['seq']}, {manifest['bytes']:,} bytes\n")
        case _:
            manifest = restore(options.source, options.data_dir)
            sys.stdout.write(f"{options.data_dir}: seq {manifest['seq']}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser(
        "verify",
        help="compare SQLite, snapshots and indexes; an embedder may serve meanwhile",
    )
    backing_up = commands.add_parser(
        "backup", help="copy a data directory; an embedder may serve meanwhile"
    )
    restoring = commands.add_parser("restore", help="make a data directory of a backup")
    for one in (verifying, backing_up, restoring):
        one.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, metavar="DIR",
                         help="folder of the collections (default: %(default)s)")  # fmt: skip
    backing_up.add_argument("--to", type=Path, required=True, metavar="DIR",
                            help="new or empty directory")  # fmt: skip
    restoring.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR",
                           help="a backup; the data directory must be new or empty")  # fmt: skip
    return parser

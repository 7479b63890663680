"""`python -m embedder verify`, `backup` and `restore`: a data directory from the command line."""

from __future__ import annotations

from collections.abc import Sequence

from embedder.settings import DEFAULT_DATA_DIR, PROGRAM
from embedder.storage.backup import back_up, restore
from embedder.storage.verify import verify
from serving import keeping

COMMANDS = keeping.Commands(
    PROGRAM,
    DEFAULT_DATA_DIR,
    verify,
    back_up,
    restore,
    lambda manifest: f"seq {manifest['seq']}, {manifest['bytes']:,} bytes",
)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 where `verify` found something; 2 and one line where it cannot be done."""
    return keeping.main(COMMANDS, arguments)

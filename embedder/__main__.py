"""`python -m embedder`: serves; or verifies, backs up and restores a data directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; without one it serves."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Each reads in only what it needs: a backup does not wait for torch.
    if arguments and arguments[0] in ("verify", "backup", "restore"):
        from embedder.storage import commands

        return commands.main(arguments)
    # Threads of OpenMP that have nothing to do would otherwise look for work for milliseconds, on
    # cores that others need: half of the CPU time of searches for 256 queries.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from embedder import application

    return application.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m predictor`: serves; or trains, evaluates and registers versions; or verifies, backs up
and restores a data directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; without one it serves."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Each reads in only what it needs: serving does not wait for scikit-learn.
    if arguments and arguments[0] in ("train", "evaluate", "register"):
        from predictor.learning import commands

        return commands.main(arguments)
    if arguments and arguments[0] in ("verify", "backup", "restore"):
        from predictor import commands as keeping

        return keeping.main(arguments)
    from predictor import application

    return application.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

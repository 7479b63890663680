"""`python -m embedder`: the service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from embedder import application


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves."""
    return application.main(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())

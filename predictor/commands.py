"""`python -m predictor verify`, `backup` and `restore`: a data directory from the command line."""

from __future__ import annotations

from collections.abc import Sequence

from predictor.backup import back_up, describe, restore
from predictor.settings import PROGRAM, PredictorSettings
from predictor.verify import verify
from serving import keeping

COMMANDS = keeping.Commands(
    PROGRAM,
    PredictorSettings.model_fields["data_dir"].default,
    verify,
    back_up,
    restore,
    describe,
)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 where `verify` found something; 2 and one line where it cannot be done."""
    return keeping.main(COMMANDS, arguments)

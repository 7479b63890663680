"""`python -m predictor`: serves; or runs a command: `train` and what else there is to do with
versions (see `predictor.learning.commands`); `verify`, `backup` and `restore` of a data directory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from serving.supervisor import WORKER


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; without one it serves."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and not arguments[0].startswith("-") else None
    # Each reads in only what it needs: serving does not wait for scikit-learn.
    if command in (None, WORKER):
        return _serve(arguments)
    if command in ("verify", "backup", "restore"):
        from predictor import commands as keeping

        return keeping.main(arguments)
    from predictor.learning import commands

    return commands.main(arguments)


def _serve(arguments: Sequence[str]) -> int:
    """Serves in this process, or supervises those that do; exit status 2 where it cannot start."""
    from predictor.settings import PROGRAM, PredictorSettings
    from serving import logs, settings, supervisor

    if arguments and arguments[0] == WORKER:
        from predictor import application

        given = supervisor.worker_settings(PredictorSettings, arguments[1:])
        return application.run(given, share_port=True)
    loaded = settings.load(PredictorSettings, arguments, PROGRAM)
    if loaded.processes == 1:
        from predictor import application

        return application.run(loaded)
    logs.configure(PROGRAM, loaded.log_format)
    try:
        return supervisor.supervise(PROGRAM, loaded, loaded.processes)
    except OSError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

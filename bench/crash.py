"""Kills a service under load, starts it again, and checks that nothing acknowledged is lost.

A `python -m embedder` or `python -m predictor` on a data directory of its own is called from
several threads: the embedder with items, vectors, residuals, deletions, collections that come and
go, searches, watches; the predictor with events that come, come again and are deleted. It is killed
with SIGKILL at random moments, while it starts or writes snapshots too, and started again; then all
that it holds is read in every way that there is and compared with the answers that the callers had
(bench/crashing/model.py says what must be there). Each violation is one line with the seed and the
kill before it; the exit status is 1 if there was any.

The kills and the calls follow from the seed; how calls are interleaved does not, so that the same
seed meets the same violation often, not always. --keep leaves the data directory and the log.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import harness
from bench.crashing import campaign
from bench.crashing.campaign import ServiceChild, Subject
from bench.crashing.embedder.subject import Embedder
from bench.crashing.predictor.subject import Predictor
from bench.harness import say
from foretell.testing import FakeServices

EMBEDDER = (
    *("--port", "0", "--threads", "1"),
    # So that a text's vector does not depend on its batch.
    *("--precision", "float32"),
    # So that snapshots are written, and approximate indexes built, all the time.
    *("--snapshot-changes", "100", "--approximate-from", "1100"),
)
"""Its arguments."""

# A dead process's leases pass on soon.
PREDICTOR = ("--port", "0", "--heartbeat-s", "0.1", "--drain-s", "0")
"""Its arguments."""

Started = contextlib.AbstractContextManager[tuple[ServiceChild, Subject]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Exit status 0: nothing was lost and nothing disagreed."""
    options = _parser().parse_args(arguments)
    with (
        _folder(options.keep) as folder,
        SERVICES[options.service](folder, options.seed) as (child, subject),
    ):
        begin = time.monotonic()
        outcome = campaign.run(child, subject, options.kills, options.seed)
        figures = outcome.figures(subject.acknowledged, time.monotonic() - begin)
    harness.finish("crash", harness.versions("grpcio", "numpy", "torch"), figures)
    return 1 if outcome.violations else 0


@contextlib.contextmanager
def embedder_in(folder: Path, seed: int) -> Iterator[tuple[ServiceChild, Embedder]]:
    """An embedder whose data and log are in a folder, and what is done to it."""
    data = folder / "data"
    child = ServiceChild(
        "embedder",
        [*EMBEDDER, "--data-dir", str(data)],
        folder / "log",
        opening='"encoder ',
        data=data,
        unfinished="*.new",
    )
    with contextlib.closing(child):
        yield child, Embedder(seed)


@contextlib.contextmanager
def predictor_in(folder: Path, seed: int) -> Iterator[tuple[ServiceChild, Predictor]]:
    """Likewise a predictor; its embedder is the fake one, which outlives it."""
    data = folder / "data"
    with FakeServices() as fakes:
        child = ServiceChild(
            "predictor",
            [*PREDICTOR, "--data-dir", str(data), "--embedder", fakes.embedder_address],
            folder / "log",
            opening='"settings: ',
            data=data,
        )
        with contextlib.closing(child):
            yield child, Predictor(fakes.embedder_address)


SERVICES: dict[str, Callable[[Path, int], Started]] = {
    "embedder": embedder_in,
    "predictor": predictor_in,
}


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        say(f"data and log are in {keep}")
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="crash-") as made:
            yield Path(made)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--service", choices=SERVICES, default="embedder",
                        help="which one is killed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--kills", type=int, default=200, metavar="N",
                        help="how often it is killed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="of the calls and the moments (default: %(default)s)")  # fmt: skip
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="a new folder for the data and the log, which stay there")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""A campaign: start a service, load it, kill it, start it again, check; from a seed.

What is checked belongs to a `Subject`; `ServiceChild` runs any of the services.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.crashing.model import Kind, Violation
from bench.harness import Figures, say
from serving.process import ServiceProcess, start

STARTING_SHARE = 0.2
"""Of the kills that come while the service starts."""

LOADED_S = (0.0, 1.5)
"""After how many seconds of load another kill comes..."""

WRITING_SHARE = 0.4
"""... but for this share, which come as soon after that as a file is being written."""

WRITING_S = (0.0, 0.01)
"""How much later then."""


class Child(Protocol):
    """The service that is killed; its data outlives it."""

    def start(self) -> str:
        """Starts it and returns its address once it is ready."""

    def wait_for_writing(self) -> None:
        """Returns when it writes a file that is not the database, or after some time."""

    def kill(self) -> bool:
        """Ends it at once; `start` may be called again.

        Returns whether it was writing such a file.
        """

    def kill_while_starting(self, share: float) -> bool:
        """Starts it and kills it when about this share of its start has passed.

        Returns whether it was not ready by then.
        """

    def stop(self) -> None:
        """Asks it to stop and waits."""

    def verify(self) -> list[str]:
        """What its own check finds wrong with its data, after a stop."""


class Subject(Protocol):
    """What is done to a service, and what must be there afterwards."""

    @property
    def acknowledged(self) -> int:
        """Writes that were answered so far."""

    def check(self, address: str) -> list[Violation]:
        """Compares what a service that has just started holds with all that was acknowledged."""

    def load(self, address: str, seed: tuple[int, ...], killed: threading.Event) -> None:
        """Calls the service from several threads until `killed` is set; returns at once then.

        What the calls are follows from the seed; how they are interleaved does not.
        """

    def end(self) -> list[Violation]:
        """The calls in flight have failed by now: waits for the callers; what they noticed."""


@dataclass
class Outcome:
    """What a campaign counted."""

    kills: int = 0
    starting: int = 0
    """Kills before the service was ready."""
    writing: int = 0
    """Kills that left a file half-written, such as a snapshot."""
    violations: list[tuple[int, Violation]] = field(default_factory=list)
    """With the number of the kill before."""

    def count(self, kind: Kind) -> int:
        """Violations of a kind."""
        return sum(violation.kind is kind for _, violation in self.violations)

    def figures(self, acknowledged: int, seconds: float) -> Figures:
        """For the JSON line."""
        return {
            "kills": self.kills,
            "kills_while_starting": self.starting,
            "kills_while_writing_files": self.writing,
            "acknowledged": acknowledged,
            "lost": self.count(Kind.LOST),
            "resurrected": self.count(Kind.RESURRECTED),
            "torn": self.count(Kind.TORN),
            "duplicated": self.count(Kind.DUPLICATED),
            "disagreements": self.count(Kind.DISAGREEMENT),
            "seconds": seconds,
        }


def run(child: Child, subject: Subject, kills: int, seed: int) -> Outcome:
    """Kills the child so many times, and checks after each restart and once more at the end.

    Raises:
        RuntimeError: it does not start again.
    """
    outcome = Outcome()

    def report(found: list[Violation]) -> None:
        for violation in found:
            say(f"seed {seed}, kill {outcome.kills}: {violation.kind}: {violation.what}")
            outcome.violations.append((outcome.kills, violation))

    def started() -> str:
        try:
            return child.start()
        except RuntimeError:
            say(f"seed {seed}, kill {outcome.kills}: it does not start")
            raise

    address = started()
    report(subject.check(address))
    while outcome.kills < kills:
        rng = np.random.default_rng([seed, outcome.kills])
        killed = threading.Event()
        subject.load(address, (seed, outcome.kills), killed)
        time.sleep(rng.uniform(*LOADED_S))
        if rng.random() < WRITING_SHARE:
            child.wait_for_writing()
            time.sleep(rng.uniform(*WRITING_S))
        outcome.writing += child.kill()
        outcome.kills += 1
        killed.set()
        report(subject.end())
        while outcome.kills < kills and rng.random() < STARTING_SHARE:
            outcome.starting += child.kill_while_starting(rng.random())
            outcome.kills += 1
        address = started()
        report(subject.check(address))
        say(
            f"kill {outcome.kills} of {kills}: {subject.acknowledged:,} writes acknowledged, "
            f"{len(outcome.violations)} violations"
        )
    child.stop()
    report(subject.check(started()))
    child.stop()
    report([Violation(Kind.DISAGREEMENT, f"verify: {line}") for line in child.verify()])
    return outcome


class ServiceChild:
    """`python -m MODULE ARGUMENTS` as a process of its own. Implements `Child`.

    Args:
        module: embedder or predictor.
        arguments: its flags.
        log: file for its standard error.
        opening: of the line in the log after which it begins to open its data: kills while it
            starts come after that.
        data: its data directory.
        unfinished: pattern of names in it, at any depth, of what is being written; empty: it
            writes nothing but its database.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        log: Path,
        opening: str,
        data: Path,
        unfinished: str = "",
    ) -> None:
        self._module = module
        self._arguments = arguments
        self._log = log
        self._opening = opening
        self._data = data
        self._unfinished = unfinished
        self._seen: set[int] = set()
        """Inodes of what earlier kills left."""
        self._opening_s = 1.0
        """From that line to being ready, in the latest start."""
        self._service: ServiceProcess | None = None

    def start(self) -> str:
        """Starts it and returns its address once it is ready."""
        begin = self._log.stat().st_size if self._log.exists() else 0
        opened: list[float] = []
        watching = threading.Thread(target=lambda: opened.append(self._wait(begin)), daemon=True)
        watching.start()
        self._service = start(self._module, self._arguments, log=self._log)
        ready = time.monotonic()
        watching.join()
        self._opening_s = ready - opened[0]
        return self._service.address

    def wait_for_writing(self) -> None:
        """Returns when something unfinished appears, or after two seconds; at once where there is
        nothing of the kind."""
        deadline = time.monotonic() + (2 if self._unfinished else 0)
        while not self._writing() and time.monotonic() < deadline:
            time.sleep(0.0005)

    def kill(self) -> bool:
        """Ends it at once (SIGKILL); whether that left something unfinished."""
        assert self._service is not None
        self._service.kill()
        self._close()
        left = self._writing()
        self._seen |= left
        return bool(left)

    def kill_while_starting(self, share: float) -> bool:
        """Starts it and kills it when about this share of opening its data has passed."""
        begin = self._log.stat().st_size
        command = [sys.executable, "-m", self._module, *self._arguments]
        with (
            self._log.open("ab") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
        ):
            self._wait(begin, process)
            time.sleep(share * self._opening_s)
            process.kill()
            assert process.stdout is not None
            return b" ready at " not in process.stdout.read()

    def stop(self) -> None:
        """Asks it to stop and waits.

        Raises:
            RuntimeError: it did not end well.
        """
        assert self._service is not None
        status = self._service.stop()
        self._close()
        if status:
            raise RuntimeError(f"{self._module} ended with status {status}; see {self._log}")

    def close(self) -> None:
        """Kills it where it still runs, as after an error."""
        if self._service is not None:
            self.kill()

    def verify(self) -> list[str]:
        """What `python -m MODULE verify` finds wrong, line by line."""
        command = [sys.executable, "-m", self._module, "verify", "--data-dir", str(self._data)]
        ended = subprocess.run(command, capture_output=True, text=True)
        return [*ended.stdout.splitlines(), *ended.stderr.splitlines()] if ended.returncode else []

    def _writing(self) -> set[int]:
        """Inodes of what is being written now."""
        found: set[int] = set()
        if not self._unfinished:
            return found
        # Unlike Path.rglob, os.walk passes over folders that are deleted meanwhile.
        for folder, folders, files in os.walk(self._data):
            for name in fnmatch.filter([*folders, *files], self._unfinished):
                with contextlib.suppress(FileNotFoundError):
                    found.add(Path(folder, name).stat().st_ino)
        return found - self._seen

    def _close(self) -> None:
        assert self._service is not None
        assert self._service.process.stdout is not None
        self._service.process.stdout.close()
        self._service = None

    def _wait(self, begin: int, process: subprocess.Popen[bytes] | None = None) -> float:
        """Waits for the line and returns when it came (monotonic clock)."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (process is None or process.poll() is None):
            if self._log.exists():
                with self._log.open("rb") as log:
                    log.seek(begin)
                    if self._opening.encode() in log.read():
                        break
            time.sleep(0.002)
        return time.monotonic()

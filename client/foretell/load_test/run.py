"""The parent of the generator's processes: starts them, shows how it goes, adds up."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Final, Self, TextIO, cast

import numpy as np

from foretell.errors import ForetellError
from foretell.load_test.schedule import Phase
from foretell.load_test.tally import Tally
from foretell.load_test.worker import Plan, Progress, work

LEAD_S: Final = 0.1
"""From the order to begin to the first call: all processes have it by then."""

STOP_S: Final = 5.0
"""After this a process that was asked to end is ended."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of the calls of a phase."""

    phase: Phase
    methods: dict[str, Tally]

    @property
    def total(self) -> Tally:
        """Of all methods together."""
        return Tally.sum(self.methods.values())

    def figures(self) -> dict[str, Any]:
        """As an entry of the report."""
        rate, seconds, total = self.phase.rate, self.phase.seconds, self.total
        return {
            "seconds": seconds,
            **total.figures(rate, seconds),
            "methods": {
                name: tally.figures(tally.calls / seconds, seconds)
                for name, tally in self.methods.items()
            },
        }


class LiveLine:
    """A line that says how it goes, on a terminal; nothing where the stream is none."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream if stream.isatty() else None
        self._reports: list[Progress] = []
        self._shown = self._start = time.monotonic()

    def update(self, report: Progress, processes: int) -> None:
        """Shows the line anew when each of the processes has reported, about."""
        self._reports.append(report)
        if self._stream is None or len(self._reports) < processes:
            return
        now = time.monotonic()
        calls, bad, in_flight = (
            sum(getattr(report, name) for report in self._reports)
            for name in ("calls", "bad", "in_flight")
        )
        latencies = [latency for report in self._reports for latency in report.latencies]
        p50, p99 = np.quantile(latencies, [0.5, 0.99]) * 1e3 if latencies else (np.nan, np.nan)
        self._stream.write(
            f"\r{now - self._start:6.1f} s  {calls / (now - self._shown):,.0f} calls/s  "
            f"p50 {p50:.1f} ms  p99 {p99:.1f} ms  {in_flight:,} in flight  "
            f"{bad:,} without an answer\x1b[K"
        )
        self._stream.flush()
        self._shown = now
        self._reports.clear()

    def close(self) -> None:
        """Clears it."""
        if self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class Generators:
    """Processes that send calls together, for as long as the `with` block lasts.

    Args:
        plans: one for each process.
        live: is told how it goes.

    Raises:
        ForetellError: a process cannot reach a service, or cannot read a file of the settings.
    """

    def __init__(self, plans: Sequence[Plan], live: LiveLine) -> None:
        self._plans = plans
        self._live = live
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        # A forked process would share gRPC's threads and locks with this one.
        context = multiprocessing.get_context("spawn")
        try:
            for plan in self._plans:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(plan, theirs), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            for connection in self._connections:
                self._receive(connection)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def run(self, phases: Sequence[Phase]) -> list[Measured]:
        """Sends the calls of all phases; those of phases that are to be measured are given back.

        Raises:
            RuntimeError: a process ended.
        """
        start = time.monotonic() + LEAD_S
        for connection in self._connections:
            connection.send((start, phases))
        tallies: dict[tuple[int, str], list[Tally]] = {}
        at_work = list(self._connections)
        while at_work:
            for connection in cast("list[Connection]", wait(at_work)):
                message = self._receive(connection)
                if isinstance(message, Progress):
                    self._live.update(message, len(self._connections))
                    continue
                at_work.remove(connection)
                for key, tally in message.items():
                    tallies.setdefault(key, []).append(tally)
        return [
            Measured(
                phase,
                {name: Tally.sum(tallies[at, name]) for which, name in tallies if which == at},
            )
            for at, phase in enumerate(phases)
            if phase.measured
        ]

    def _receive(self, connection: Connection) -> Any:
        try:
            message = connection.recv()
        except EOFError:
            raise RuntimeError("a process of the load test has ended") from None
        if isinstance(message, ForetellError):
            raise message
        if isinstance(message, str) and message != "ready":
            raise RuntimeError(f"a process of the load test failed:\n{message}")
        return message

    def _stop(self) -> None:
        for connection in self._connections:
            connection.close()  # they wait for orders, or have nobody to report to
        deadline = time.monotonic() + STOP_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

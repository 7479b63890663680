"""Starts a service as a process of its own: for commands that need one, the demo and tests."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

STOP_TIMEOUT_S = 60.0
"""After this a service that was asked to stop is killed."""


ENDING_S = 5.0
"""How long one that failed to start may take to end by itself."""


class ServiceProcess:
    """A running service.

    Attributes:
        address: host:port of its gRPC server.
        process: the process.
    """

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def stop(self) -> int:
        """Asks it to stop (SIGTERM), waits, and returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def kill(self) -> None:
        """Ends it at once (SIGKILL)."""
        self.process.kill()
        self.process.wait()


def start(
    module: str,
    arguments: Sequence[str] = (),
    *,
    timeout_s: float = 120.0,
    log: Path | None = None,
) -> ServiceProcess:
    """Runs `python -m MODULE ARGUMENTS` and returns when it is ready.

    Its standard error goes to the file `log`, or is inherited. It does not get this terminal's
    Ctrl-C: who starts it stops it.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    errors: IO[bytes] | None = None
    with contextlib.ExitStack() as files:
        if log is not None:
            errors = files.enter_context(log.open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=os.environ,
        )
    try:
        line = _first_line(process, timeout_s)
    except BaseException:  # such as Ctrl-C: nobody else knows of it
        _end(process, 0)
        raise
    if line is None or " ready at " not in line:
        status = _end(process, ENDING_S if line is not None else 0)
        where = f"; see {log}" if log else ""
        raise RuntimeError(f"python -m {module} did not start (exit status {status}){where}")
    return ServiceProcess(process, line.rsplit(" ", 1)[1].strip())


@contextlib.contextmanager
def started(
    module: str,
    arguments: Sequence[str] = (),
    *,
    timeout_s: float = 120.0,
    log: Path | None = None,
) -> Iterator[ServiceProcess]:
    """`start` for a block, at whose end it is stopped."""
    service = start(module, arguments, timeout_s=timeout_s, log=log)
    try:
        yield service
    finally:
        service.stop()
        if service.process.stdout is not None:
            service.process.stdout.close()


def _end(process: subprocess.Popen[str], timeout_s: float) -> int:
    """Waits for a process that failed, kills it after that, and gives its exit status."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)
    process.kill()
    if process.stdout is not None:
        process.stdout.close()
    return process.wait()


def _first_line(process: subprocess.Popen[str], timeout_s: float) -> str | None:
    """The first line of its standard output, empty if there is none; None: not in time."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if selector.select(deadline - time.monotonic()):
            return process.stdout.readline()
    return None

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
    line = _first_line(process, timeout_s)
    if " ready at " not in line:
        process.kill()
        status = process.wait()
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


def _first_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if selector.select(deadline - time.monotonic()):
            return process.stdout.readline()
    return ""

"""Several processes of a service behind one port: started together, replaced when they die.

The supervisor holds the port and serves nothing. Its workers listen on the port with SO_REUSEPORT,
so that the kernel deals connections out among them. What a worker is to do comes on its standard
input, its line that it is ready goes to its standard output, and it ends with its supervisor. For
Linux: elsewhere the port would not be shared evenly, nor would workers end with their supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from serving.settings import ServiceSettings

log = logging.getLogger(__name__)

WORKER = "worker"
"""`python -m MODULE worker PID`: how the supervisor with that process id starts one."""

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 30.0
"""Pause before a dead worker is replaced; it doubles with each that dies soon."""

STEADY_S = 10.0
"""A worker that has served for so long did not die soon."""

ENDING_S = 15.0
"""What workers get beyond their own `drain_s` and `grace_s`; then they are killed."""

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""

Settings = TypeVar("Settings", bound=ServiceSettings)


def supervise(module: str, settings: ServiceSettings, count: int) -> int:
    """Keeps `count` workers `python -m MODULE worker` running until SIGTERM or SIGINT.

    Prints `MODULE ready at HOST:PORT` once all of them serve. SIGTERM goes on to them, and their
    end is waited for. Each has its own page of metrics, on `metrics_port` and those after it.

    Returns:
        The exit status: 0 after SIGTERM or SIGINT; that of a worker which could not start in the
        beginning. Later ones are tried again and again.

    Raises:
        OSError: the port is taken or the address is none of this machine's; or no Linux.
    """
    if sys.platform != "linux":
        raise OSError("several processes behind one port need Linux")
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_held_port(settings.host, settings.port))
        selector = stack.enter_context(selectors.DefaultSelector())
        asked = stack.enter_context(_signals())
        selector.register(asked, selectors.EVENT_READ)
        workers = []
        for number in range(count):
            page = settings.metrics_port and settings.metrics_port + number
            changes = {"port": port, "metrics_port": page}
            workers.append(_Worker(module, settings.model_copy(update=changes), selector))
        try:
            status = _keep(workers, selector, f"{module} ready at {settings.host}:{port}\n")
        finally:
            clean = _stop(workers, settings.drain_s + settings.grace_s + ENDING_S)
        return status if clean else status or 1


def worker_settings(kind: type[Settings], arguments: Sequence[str]) -> Settings:
    """In a worker: its settings, from the supervisor, with which it ends from now on.

    Args:
        kind: of the settings.
        arguments: of the command line after `worker`.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if [str(os.getppid())] != list(arguments):
        raise SystemExit(f"{WORKER}: its supervisor has ended, or it was not started by one")
    return kind.model_validate_json(sys.stdin.read())


class _Worker:
    """A worker, and those that take its place one after another."""

    def __init__(
        self, module: str, settings: ServiceSettings, selector: selectors.BaseSelector
    ) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.due = 0.0
        """When to start the next one, where none runs."""
        self.ready_at: float | None = None
        self._module = module
        self._settings = settings
        self._selector = selector
        self._backoff_s = FIRST_BACKOFF_S

    def start(self) -> None:
        """Starts a process, of a session of its own: a terminal's Ctrl-C is the supervisor's."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", self._module, WORKER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._selector.register(self.process.stdout, selectors.EVENT_READ, self)
        with contextlib.suppress(BrokenPipeError):  # it has ended: that shows on its output
            self.process.stdin.write(self._settings.model_dump_json().encode())
        self.process.stdin.close()

    def look(self) -> int | None:
        """Reads what it has written, or that it has ended: then its exit status."""
        assert self.process is not None
        assert self.process.stdout is not None
        written = os.read(self.process.stdout.fileno(), 4096)
        if written:
            if self.ready_at is None and b" ready at " in written:
                self.ready_at = time.monotonic()
            return None
        self._selector.unregister(self.process.stdout)
        self.process.stdout.close()
        status = self.process.wait()
        pid, self.process = self.process.pid, None
        self._back_off()
        log.warning("process %d has ended with status %d", pid, status)
        return status

    def _back_off(self) -> None:
        now = time.monotonic()
        if self.ready_at is not None and now - self.ready_at > STEADY_S:
            self._backoff_s = FIRST_BACKOFF_S
        self.ready_at = None
        self.due = now + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)


def _keep(workers: Sequence[_Worker], selector: selectors.BaseSelector, line: str) -> int:
    """Starts workers, and others for those that end, until a signal asks to stop."""
    announced = False
    while True:
        now = time.monotonic()
        for worker in workers:
            if worker.process is None and worker.due <= now:
                worker.start()
        waits = [worker.due - now for worker in workers if worker.process is None]
        happened = [key.data for key, _ in selector.select(max(min(waits), 0) if waits else None)]
        if None in happened:
            log.info("stopping")
            return 0
        for worker in happened:
            status = worker.look()
            if status is not None and not announced:
                return status if status > 0 else 1
        if not announced and all(worker.ready_at is not None for worker in workers):
            sys.stdout.write(line)
            sys.stdout.flush()
            announced = True


def _stop(workers: Sequence[_Worker], timeout_s: float) -> bool:
    """Asks all to end and waits for them; whether they did."""
    processes = [worker.process for worker in workers if worker.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("process %d does not end and is killed", process.pid)
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    # -SIGTERM: it had not begun to serve.
    return all(process.returncode in (0, -signal.SIGTERM) for process in processes)


@contextlib.contextmanager
def _held_port(host: str, port: int) -> Iterator[int]:
    """Binds the port, where 0 is any free one, without listening on it, and gives its number.

    For this socket's bind the port has to be free. After it, only sockets of the same user with
    SO_REUSEPORT may join; those are the workers', for no service asks for it by itself.
    """
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        for family, kind, protocol, _, address in found:
            one = stack.enter_context(socket.socket(family, kind, protocol))
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Old connections that linger in TIME_WAIT do not count.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind((address[0], port, *address[2:]))
            except OSError as error:
                # A name may have an address of a protocol that this machine does not speak.
                if error.errno == errno.EADDRNOTAVAIL and address is not found[-1][-1]:
                    continue
                raise OSError(f"cannot listen on {host}:{port}") from error
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            port = one.getsockname()[1]
        yield port


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """Gives a socket that can be read once SIGTERM or SIGINT has come."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)

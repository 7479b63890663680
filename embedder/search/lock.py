"""A lock that many readers share and a writer has alone."""

import contextlib
import threading
from collections.abc import Iterator


class ReadWriteLock:
    """Readers run side by side. A reader waits for at most one writer, a writer for the readers
    that were there before it, so that neither a stream of readers nor one of writers shuts the
    others out (phase-fair, Brandenburg and Anderson 2009)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._readers_waiting = 0
        self._writers_waiting = 0
        self._writing = False
        self._phase = 0
        """Number of writes that are over."""

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Not to be nested: a writer that waits in between would wait for ever."""
        with self._changed:
            if self._writing or self._writers_waiting:
                phase = self._phase
                self._readers_waiting += 1
                while self._phase == phase:  # the writer that ends it counts this reader in
                    self._changed.wait()
            else:
                self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                if not self._readers:
                    self._changed.notify_all()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Alone."""
        with self._changed:
            self._writers_waiting += 1
            while self._writing or self._readers:
                self._changed.wait()
            self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._phase += 1
                self._readers += self._readers_waiting
                self._readers_waiting = 0
                self._changed.notify_all()

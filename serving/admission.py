"""Whether work can still be done in time: by what waits already, and how fast work was done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foretell.errors import DeadlineExceededError, ResourceExhaustedError

WINDOW_S = 0.1
"""The least time over which a rate is measured: shorter ones see one batch or none end."""

SMOOTHING = 0.2
"""Weight of the latest window in the mean rate."""

STRETCH = 8
"""Waiting times in units of a call's own time that are no overload: what a random arrival of like
calls brings the slowest in a hundred at 80 % of the throughput."""

DOUBT = 1.25
"""By how much the rate rises each time that a call is refused for its own work while no other runs:
what is refused teaches nothing, so that a rate measured in a bad moment would stand for ever."""

RETRY_S = (0.05, 60.0)
"""Least and greatest advice."""


class Admission:
    """Keeps waiting short: admits a call only if it can be done soon and before its deadline.

    The calls that are admitted share what works on them, each getting the same part. So a call
    waits for as much of every other one as it has work itself, and a small call hardly waits for a
    large one. A call may wait `max_wait_s` for others, or STRETCH times its own time if that is
    longer: so some large calls can run beside one another. For one event loop.

    The rate is work of finished calls per second, measured while more than `slack` waits: with less
    nothing is at its full speed.

    Args:
        max_wait_s: how long a call may wait for others.
        slack: work that may always wait; as much as uses the hardware well.
        clock: seconds.
    """

    def __init__(
        self, max_wait_s: float, slack: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_wait_s = max_wait_s
        self._slack = slack
        self._clock = clock
        self._admitted: dict[object, int] = {}
        self._waiting = 0
        self._rate = 0.0
        """Work per second; 0: not known yet."""
        self._since = 0.0
        """When the window began; it ends without a result when no more than the slack waits."""
        self._done = 0
        """Work of the calls that finished in it."""

    @contextmanager
    def admitted(self, work: int, remaining_s: float | None = None) -> Iterator[None]:
        """For the block that does the work; if it raises, or is cancelled, none was done.

        Args:
            work: how much, in the same unit as all other calls'.
            remaining_s: until the caller's deadline; None: it has none.

        Raises:
            ResourceExhaustedError: too much waits; `retry_after_s` says when to come back.
            DeadlineExceededError: alone it would take longer than the caller waits.
        """
        self._check(work, remaining_s)
        key = object()
        self._admitted[key] = work
        before, self._waiting = self._waiting, self._waiting + work
        if before <= self._slack < self._waiting:
            self._since, self._done = self._clock(), 0
        try:
            yield
            if self._waiting > self._slack:
                self._finished(work)
        finally:
            self._waiting -= self._admitted.pop(key)

    def _check(self, work: int, remaining_s: float | None) -> None:
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceededError("the deadline has passed")
        if not self._rate:
            return
        own_s = work / self._rate
        if remaining_s is not None and own_s > remaining_s:
            if not self._admitted:
                self._rate *= DOUBT
            raise DeadlineExceededError(
                f"this takes about {own_s:.3g} s and the deadline is in {remaining_s:.3g} s"
            )
        if self._waiting + work <= self._slack:
            return
        wait_s = sum(min(work, other) for other in self._admitted.values()) / self._rate
        most_s = max(self._max_wait_s, STRETCH * own_s)
        if remaining_s is not None:
            most_s = min(most_s, remaining_s - own_s)
        if wait_s > most_s:
            least, greatest = RETRY_S
            raise ResourceExhaustedError(
                f"too much waits already: about {wait_s:.3g} s of work before this call's",
                reason="OVERLOADED",
                retry_after_s=min(max(wait_s, least), greatest),
            )

    def _finished(self, work: int) -> None:
        self._done += work
        now = self._clock()
        seconds = now - self._since
        if seconds >= WINDOW_S:
            rate = self._done / seconds
            self._rate += (rate - self._rate) * (SMOOTHING if self._rate else 1.0)
            self._since, self._done = now, 0

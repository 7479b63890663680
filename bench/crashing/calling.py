"""Callers: threads that call a service until it is killed, and what they noticed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from bench.crashing.model import Kind, Violation
from foretell import Client
from foretell.errors import CancelledError, FailedPreconditionError, UnavailableError

L = TypeVar("L", bound="Ledger")


@dataclass
class Ledger:
    """What all callers know, through every restart.

    Attributes:
        acknowledged: writes that were answered.
        problems: what must not happen and was seen while the service ran.
    """

    acknowledged: int = 0
    problems: list[Violation] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def problem(self, what: str) -> None:
        """Notes a disagreement."""
        with self.lock:
            self.problems.append(Violation(Kind.DISAGREEMENT, what))

    def noticed(self) -> list[Violation]:
        """The problems since this was asked last."""
        with self.lock:
            noticed, self.problems = self.problems, []
        return noticed


class Caller(Generic[L]):
    """One thread's calls; what they are follows from the seed."""

    def __init__(self, number: int, client: Client, ledger: L, seed: Sequence[int]) -> None:
        self.number = number
        self.client = client
        self.ledger = ledger
        self.rng = np.random.default_rng([*seed, number])

    def actions(self) -> Mapping[Callable[[], None], float]:
        """What it does, with the share of each."""
        raise NotImplementedError

    def run(self, killed: threading.Event) -> None:
        """Calls until the service is gone."""
        shares = self.actions()
        actions, weights = list(shares), np.array(list(shares.values()))
        try:
            while not killed.is_set():
                actions[self.rng.choice(len(actions), p=weights / weights.sum())]()
        except (UnavailableError, CancelledError):
            return
        except FailedPreconditionError as error:
            if error.reason != "CLOSED":
                self.ledger.problem(f"a call failed: {error!r}")
        except Exception as error:  # whatever it is, the campaign must hear of it
            if not killed.is_set():
                self.ledger.problem(f"a call failed: {error!r}")

    def some(self, of: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """So many different ones as one of the sizes says."""
        chosen = self.rng.choice(len(of), self.rng.choice(sizes), replace=False)
        return [of[number] for number in chosen]


class Running:
    """Callers that share a client, each in its thread."""

    def __init__(
        self, client: Client, callers: Sequence[Caller[L]], killed: threading.Event
    ) -> None:
        self._client = client
        self._threads = [threading.Thread(target=each.run, args=(killed,)) for each in callers]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Closes the client, or the callers would wait for the service to come back; waits."""
        self._client.close()
        for thread in self._threads:
            thread.join()

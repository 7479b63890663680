"""The predictor as the subject of a campaign: loaded and checked."""

from __future__ import annotations

import threading

from bench.crashing.calling import Running
from bench.crashing.model import Kind, Violation
from bench.crashing.predictor.check import Reading, compare_texts, compare_totals, read
from bench.crashing.predictor.load import CALLERS, Caller, Ledger, Owner, Repeat
from foretell import Client


class Predictor:
    """Implements `bench.crashing.campaign.Subject`.

    Args:
        embedder: address of the embedder, which is not killed; it must belong to this predictor
            alone.
    """

    def __init__(self, embedder: str) -> None:
        self._embedder = embedder
        self._ledger = Ledger()
        self._running: Running | None = None

    @property
    def acknowledged(self) -> int:
        """Writes that were answered so far."""
        return self._ledger.acknowledged

    def check(self, address: str) -> list[Violation]:
        """Compares what is there with what was acknowledged; repeats what was not."""
        found: list[Violation] = []
        with Client(embedder=self._embedder, predictor=address) as client:
            users = [user for owner in self._ledger.owners for user in owner.users]
            reading = read(client, users)
            compare_totals(client, reading)
            found += reading.violations
            for owner in self._ledger.owners:
                found += self._settle(client, owner, reading)
            # Once more, with the lost writes: what was repeated must not be there twice.
            reading = read(client, users)
            for owner in self._ledger.owners:
                found += _compared(owner, reading)
            compare_totals(client, reading)
            compare_texts(client, reading)
            found += reading.violations
        return [*found, *self._ledger.noticed()]

    def load(self, address: str, seed: tuple[int, ...], killed: threading.Event) -> None:
        """Calls from several threads until `killed` is set."""
        client = Client(predictor=address)
        callers = [Caller(number, client, self._ledger, seed) for number in range(CALLERS)]
        self._running = Running(client, callers, killed)

    def end(self) -> list[Violation]:
        """Waits for the callers; what they noticed."""
        assert self._running is not None
        self._running.end()
        return self._ledger.noticed()

    def _settle(self, client: Client, owner: Owner, reading: Reading) -> list[Violation]:
        """Compares an owner's users, then repeats its lost write."""
        lost, owner.lost = owner.lost, None
        if lost is not None:
            owner.model.unknown.append(lost.write)
        found = _compared(owner, reading)
        if lost is None or lost.repeat is Repeat.NEVER:
            return found
        cells = lost.write.cells
        wrong = lost.repeated(
            client, all(reading.cells.get(key) == value for key, value in cells.items())
        )
        owner.acknowledge(lost.write)
        return [*found, Violation(Kind.DISAGREEMENT, wrong)] if wrong else found


def _compared(owner: Owner, reading: Reading) -> list[Violation]:
    """What differs from what the owner knows; from then on it knows what was read."""
    observed = {key: value for key, value in reading.cells.items() if key.collection in owner.users}
    return owner.model.check(observed, owner.users, owner.model.acknowledged_seq)

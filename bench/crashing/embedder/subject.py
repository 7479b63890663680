"""The embedder as the subject of a campaign: prepared, loaded, checked."""

from __future__ import annotations

import threading

import numpy as np

from bench.crashing.calling import Running
from bench.crashing.embedder import contents
from bench.crashing.embedder.check import read
from bench.crashing.embedder.contents import ITEMS, PASSING, STEADY, VECTORS
from bench.crashing.embedder.follow import Follower
from bench.crashing.embedder.load import CALLERS, Call, Caller, Ledger
from bench.crashing.model import Done, Kind, Violation
from foretell import Client
from foretell.errors import ForetellError, NotFoundError
from foretell.vectors import Vectors


class Embedder:
    """Implements `bench.crashing.campaign.Subject`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._checks = 0
        self._ledger = Ledger()
        self._text_vectors: dict[str, Vectors] = {}
        self._followers = {name: Follower(name) for name in (ITEMS, VECTORS, STEADY)}
        self._running: Running | None = None

    @property
    def acknowledged(self) -> int:
        """Writes that were answered so far."""
        return self._ledger.acknowledged

    def check(self, address: str) -> list[Violation]:
        """Compares what is there with what was acknowledged; repeats what was not.

        The first time the service is empty: it gets the collections that stay.
        """
        with Client(embedder=address) as client:
            if not self._text_vectors:
                self._prepare(client)
            self._checks += 1
            reading = read(client, self._text_vectors, (self._seed, self._checks))
            found = [*reading.violations]
            for name, follower in self._followers.items():
                wrong = follower.catch_up(client, reading.vectors[name])
                found += [Violation(Kind.DISAGREEMENT, what) for what in wrong]
            # Only now, when all is read: the answers tell which of the lost writes were done.
            repeated = [done for call in self._ledger.lost if (done := self._repeat(client, call))]
            self._ledger.lost.clear()
            found += self._check_passing(client, PASSING in reading.vectors, reading.seq)
            found += self._ledger.model.check(
                reading.cells, reading.vectors.keys(), reading.seq, repeated
            )
        return [*found, *self._ledger.noticed()]

    def load(self, address: str, seed: tuple[int, ...], killed: threading.Event) -> None:
        """Calls from several threads, and followers, until `killed` is set."""
        client = Client(embedder=address)
        for follower in self._followers.values():
            follower.follow(client)
        callers = [Caller(number, client, self._ledger, seed) for number in range(CALLERS)]
        self._running = Running(client, callers, killed)

    def end(self) -> list[Violation]:
        """Waits for the callers; what they noticed."""
        assert self._running is not None
        self._running.end()
        for follower in self._followers.values():
            follower.end()
        return self._ledger.noticed()

    def _prepare(self, client: Client) -> None:
        vectors = client.embed(contents.TEXTS).vectors
        self._text_vectors = dict(zip(contents.TEXTS, vectors, strict=True))
        self._text_vectors[""] = np.zeros(contents.TEXT_COLS, np.float32)
        client.create_vector_collection(VECTORS, contents.COLS)
        client.create_derived_collection(STEADY, ITEMS, contents.PROJECTIONS[STEADY])

    def _repeat(self, client: Client, call: Call) -> Done | None:
        """Sends a lost write once more; None where its collection is gone."""
        try:
            return call.send(client)
        except NotFoundError:
            if any(key.collection != PASSING for key in call.write.cells):
                self._ledger.problem("a repeated write found no collection")
        except ForetellError as error:
            self._ledger.problem(f"a repeated write failed: {error!r}")
        return None

    def _check_passing(self, client: Client, there: bool, seq: int) -> list[Violation]:
        """Whether the passing collection is there; repeats what was being done to it."""
        passing = self._ledger.passing
        expected, passing.exists = passing.exists, there
        if passing.lost is None:
            if there == expected:
                return []
            kind = Kind.LOST if expected else Kind.RESURRECTED
            return [Violation(kind, f"{PASSING}: there: {there}, not {expected}")]
        call, passing.lost = passing.lost, None
        try:
            done = call.send(client)
        except ForetellError as error:
            return [Violation(Kind.DISAGREEMENT, f"{PASSING}: repeated, a change failed: {error}")]
        passing.exists = not expected
        if passing.exists:
            self._ledger.created(int(done.seq))
            if there != (done.seq <= seq):
                what = f"{PASSING}: there: {there}, at {seq}; its creation says {done.seq}"
                return [Violation(Kind.DISAGREEMENT, what)]
        return []

"""The callers: writes of all kinds and some reads, from several threads at once."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.crashing import calling
from bench.crashing.embedder import contents
from bench.crashing.embedder.contents import ITEMS, PASSING, STEADY, VECTORS
from bench.crashing.model import Done, Key, Model, Value, Write
from foretell import Client
from foretell.errors import ForetellError, NotFoundError

CALLERS = 6
UNREPEATED = 2
"""Callers that do not repeat a lost write; more would leave too much open."""

SIZES = (1, 2, 5, 12, 40)
"""Elements of a call."""

ROWS = (1, 20, 100, 600)
"""Vectors of a call."""

REPEATED_SHARE = 0.05
"""Of the answered writes that are sent once more: the answer must be the same."""


@dataclass(frozen=True, eq=False)
class Call:
    """A write with all that is needed to send it again."""

    write: Write
    send: Callable[[Client], Done]
    request_id: str


@dataclass
class Passing:
    """What is known of the collection that comes and goes; one caller's."""

    exists: bool = False
    lost: Call | None = None
    """A creation or deletion whose answer was lost."""


@dataclass
class Ledger(calling.Ledger):
    """What all callers know, through every restart."""

    model: Model = field(default_factory=Model)
    passing: Passing = field(default_factory=Passing)
    lost: list[Call] = field(default_factory=list)
    """Writes that are to be repeated after the restart."""

    def seq(self) -> int:
        """The largest seq that is acknowledged."""
        with self.lock:
            return self.model.acknowledged_seq

    def acknowledge(self, done: Done) -> None:
        """A write was answered."""
        with self.lock:
            self.acknowledged += 1
            self.model.acknowledge(done)

    def created(self, seq: int) -> None:
        """The passing collection was created."""
        with self.lock:
            self.model.clear(PASSING, seq)

    def lose(self, call: Call) -> None:
        """A write's answer was lost."""
        with self.lock:
            if call.request_id:
                self.lost.append(call)
            else:
                self.model.unknown.append(call.write)


def upsert(cells: Mapping[str, str], after: int, request_id: str) -> Call:
    """Items by id."""
    write = Write({Key(ITEMS, id): value for id, value in cells.items()}, after)
    items = [contents.item(id, value) for id, value in cells.items()]

    def send(client: Client) -> Done:
        return Done(write, client.upsert_items(items, request_id=request_id).seq)

    return Call(write, send, request_id)


def delete(collection: str, ids: Sequence[str], after: int, request_id: str) -> Call:
    """Items, with their residuals, or vectors."""
    touched = (ITEMS, STEADY, PASSING) if collection == ITEMS else (collection,)
    write = Write({Key(name, id): None for name in touched for id in ids}, after)

    def send(client: Client) -> Done:
        answer = client.delete_items(ids, collection=collection, request_id=request_id)
        return Done(write, answer.seq)

    return Call(write, send, request_id)


def put(collection: str, cells: Mapping[str, str], after: int, request_id: str) -> Call:
    """Vectors or residuals by id; those of items that do not exist are refused one by one."""
    rows = contents.ROW_OF if collection == VECTORS else contents.RESIDUAL_OF
    ids = list(cells)
    block = np.stack([rows[name] for name in cells.values()])
    write = Write({Key(collection, id): name for id, name in cells.items()}, after)

    def send(client: Client) -> Done:
        answer = client.put_vectors(collection, ids, block, request_id=request_id)
        refused = {ids[failure.index] for failure in answer.failures}
        written: dict[Key, Value] = {
            key: name for key, name in write.cells.items() if key.id not in refused
        }
        return Done(Write(written, after), answer.seq)

    return Call(write, send, request_id)


def create_passing(request_id: str) -> Call:
    """The passing collection is created: its seq is that of the creation."""

    def send(client: Client) -> Done:
        projection = contents.PROJECTIONS[PASSING]
        made = client.create_derived_collection(PASSING, ITEMS, projection, request_id=request_id)
        return Done(Write({}), made.seq)

    return Call(Write({}), send, request_id)


def delete_passing(request_id: str) -> Call:
    """The passing collection is deleted; the answer has no seq."""

    def send(client: Client) -> Done:
        client.delete_collection(PASSING, request_id=request_id)
        return Done(Write({}), 0)

    return Call(Write({}), send, request_id)


class Caller(calling.Caller[Ledger]):
    """One thread's calls."""

    def actions(self) -> Mapping[Callable[[], None], float]:
        """Writes of all kinds and some reads."""
        return {
            self._upsert: 0.36,
            self._delete: 0.14,
            self._put_vectors: 0.14,
            self._put_residuals: 0.14,
            self._search: 0.14,
            self._read: 0.05,
            self._create_or_delete: 0.03,
        }

    def _upsert(self) -> None:
        ids = self.some(contents.ITEM_IDS, SIZES)
        texts = self.rng.choice([*contents.TEXTS, ""], len(ids))
        shades = self.rng.choice(contents.SHADES, len(ids))
        values = (f"{text}|{shade}" for text, shade in zip(texts, shades, strict=True))
        self._write(upsert(dict(zip(ids, values, strict=True)), self.ledger.seq(), self._id()))

    def _delete(self) -> None:
        if self.rng.random() < 0.6:
            ids = self.some(contents.ITEM_IDS, SIZES)
            self._write(delete(ITEMS, ids, self.ledger.seq(), self._id()))
        else:
            ids = self.some(contents.VECTOR_IDS, ROWS[:-1])
            self._write(delete(VECTORS, ids, self.ledger.seq(), self._id()))

    def _put_vectors(self) -> None:
        ids = self.some(contents.VECTOR_IDS, ROWS)
        names = [str(name) for name in self.rng.choice(contents.ROWS, len(ids))]
        cells = dict(zip(ids, names, strict=True))
        self._write(put(VECTORS, cells, self.ledger.seq(), self._id()))

    def _put_residuals(self) -> None:
        # Which rows are refused follows from the store's order: without a request_id nobody could
        # ever tell which cells a lost write has set.
        ids = self.some(contents.ITEM_IDS, SIZES)
        names = [str(name) for name in self.rng.choice(contents.RESIDUALS, len(ids))]
        cells = dict(zip(ids, names, strict=True))
        collection = STEADY if self.rng.random() < 0.6 else PASSING
        self._write(put(collection, cells, self.ledger.seq(), uuid.uuid4().hex))

    def _create_or_delete(self) -> None:
        if self.number:
            return
        passing = self.ledger.passing
        make = delete_passing if passing.exists else create_passing
        call = make(uuid.uuid4().hex)
        try:
            done = call.send(self.client)
        except ForetellError:
            passing.lost = call
            raise
        passing.exists = not passing.exists
        if passing.exists:
            self.ledger.created(int(done.seq))

    def _search(self) -> None:
        collection = str(self.rng.choice([ITEMS, STEADY, VECTORS]))
        ids = contents.VECTOR_IDS if collection == VECTORS else contents.ITEM_IDS
        found = self.client.search(ids=self.some(ids, SIZES), collection=collection, k=20)
        for hits in found.hits:
            strange = set(hits.ids) - set(ids)
            if strange or len(set(hits.ids)) < len(hits.ids):
                self.ledger.problem(f"Search in {collection} found {hits.ids}")

    def _read(self) -> None:
        self.client.get_items(self.some(contents.ITEM_IDS, SIZES), include_vectors=True)
        self.client.embed([str(self.rng.choice(contents.TEXTS))])

    def _write(self, call: Call) -> None:
        try:
            done = call.send(self.client)
        except NotFoundError:
            if any(key.collection != PASSING for key in call.write.cells):
                self.ledger.problem("a write found no collection")
            return
        except Exception:
            self.ledger.lose(call)
            raise
        self.ledger.acknowledge(done)
        if call.request_id and self.rng.random() < REPEATED_SHARE:
            with contextlib.suppress(NotFoundError):  # its collection was deleted meanwhile
                again = call.send(self.client)
                if again.seq != done.seq:
                    self.ledger.problem(f"repeated, a write got seq {again.seq} after {done.seq}")

    def _id(self) -> str:
        """A new request_id; empty where the write is not to be repeated."""
        alone = self.number < UNREPEATED and self.rng.random() < 0.5
        return "" if alone else uuid.uuid4().hex

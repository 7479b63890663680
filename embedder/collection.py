"""One collection in memory: its vectors, and how they follow from its source's."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from embedder import store
from embedder.index import VectorIndex
from embedder.store import CollectionRow
from embedder.text_cache import Row
from foretell import checks
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.projection import Projection
from foretell.vectors import Vectors

LOADED_TOGETHER = 8_192
"""Rows read from the store at a time."""


class Collection:
    """One collection in memory.

    Attributes:
        row: as it was created.
        index: its vectors.
        projection: of a derived collection.
        tombstones: ids that it had, with the seq of their deletion; a derived collection shares
            its source's.
        seq: its last change.
        deleted: whether it is gone; whoever follows it must stop.
    """

    def __init__(
        self, row: CollectionRow, tombstones: dict[str, int], projection: Projection | None = None
    ) -> None:
        self.row = row
        self.index = VectorIndex(row.cols)
        self.projection = projection
        self.tombstones = tombstones
        self.seq = row.seq
        self.deleted = False

    def put(self, ids: Sequence[str], vectors: Vectors, seq: int) -> None:
        """Inserts or replaces vectors."""
        self.index.put(ids, vectors, seq)
        for id in ids:
            self.tombstones.pop(id, None)
        self.seq = seq

    def remove(self, ids: Sequence[str], seq: int) -> None:
        """Deletes vectors."""
        self.index.remove(ids)
        self.tombstones.update(dict.fromkeys(ids, seq))
        self.seq = seq

    def project(
        self, ids: Sequence[str], vectors: Vectors, residuals: Mapping[str, Row]
    ) -> Vectors:
        """A derived collection's vectors of ids, from their source vectors and residuals."""
        assert self.projection is not None
        added = np.zeros((len(ids), self.row.cols), np.float32)
        for position, id in enumerate(ids):
            if id in residuals:
                added[position] = residuals[id]
        return self.projection.apply(vectors, added)

    def message(self, source: str, items: int | None = None) -> pb.Collection:
        """As the contract shows it."""
        return pb.Collection(
            name=self.row.name,
            kind=self.row.kind,
            source=source,
            cols=self.row.cols,
            items=len(self.index) if items is None else items,
            seq=self.seq,
            index=self.index.name,
        )

    def load(self, connection: sqlite3.Connection) -> None:
        """Reads the vectors of a text or vector collection from the store."""
        row = self.row
        zero = np.zeros(row.cols, np.float32).tobytes()
        found = store.all_vectors(connection, row.number, row.kind)
        while some := list(islice(found, LOADED_TOGETHER)):
            ids = [id for id, _, _ in some]
            numbers = b"".join(blob or zero for _, blob, _ in some)
            block = np.frombuffer(numbers, np.float32).reshape(-1, row.cols)
            self.index.put(ids, block, np.array([seq for _, _, seq in some], np.int64))

    def fill(self, source: Collection, connection: sqlite3.Connection | None = None) -> None:
        """Gives a derived collection the vectors of all its source's items.

        With the residuals that the connection's database has for it; a new one has none.
        """
        created = self.row.created_seq
        residuals: dict[str, Row] = {}
        residual_seqs: dict[str, int] = {}
        if connection is not None:
            for id, blob, seq in store.all_vectors(connection, self.row.number, self.row.kind):
                residuals[id] = np.frombuffer(blob or b"", np.float32)
                residual_seqs[id] = seq
        for ids, vectors, seqs in source.index.chunks(LOADED_TOGETHER):
            own = np.array([residual_seqs.get(id, created) for id in ids], np.int64)
            seqs = np.maximum(np.maximum(seqs, created), own)
            self.index.put(ids, self.project(ids, vectors, residuals), seqs)
        self.seq = max(self.row.seq, source.seq)


def check_kind(
    row: CollectionRow, kinds: Sequence[pb.CollectionKind.ValueType], field: str
) -> None:
    """Refuses a collection of none of `kinds`; any will do if none are given.

    Raises:
        InvalidArgumentError: it is of another kind.
    """
    if kinds and row.kind not in kinds:
        names = (pb.CollectionKind.Name(kind).rsplit("_", 1)[-1].lower() for kind in kinds)
        raise checks.wrong_kind(row.name, f"a {' or '.join(sorted(names))} collection", field)


def row_of(connection: sqlite3.Connection, name: str, field: str = "collection") -> CollectionRow:
    """The row of a collection by name.

    Raises:
        NotFoundError: there is none.
    """
    row = store.collection(connection, name)
    if row is None:
        raise checks.no_collection(name, field)
    return row

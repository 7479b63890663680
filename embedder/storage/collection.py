"""One collection in memory: its vectors, and how they follow from its source's."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from embedder.search.index import DEFAULT_OPTIONS, IndexOptions, VectorIndex
from embedder.storage import records, store
from embedder.storage.store import CollectionRow
from foretell import checks
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.projection import Projection
from foretell.vectors import Row, Vectors

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
        self,
        row: CollectionRow,
        tombstones: dict[str, int],
        projection: Projection | None = None,
        options: IndexOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.row = row
        self.index = VectorIndex(row.cols, options)
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
        self,
        ids: Sequence[str],
        vectors: Vectors,
        texts: Sequence[str],
        residuals: Mapping[str, Row],
    ) -> Vectors:
        """A derived collection's vectors of ids, from their source vectors, texts, residuals."""
        assert self.projection is not None
        return self.projection.apply(vectors, texts, self._rows(ids, residuals))

    def _rows(self, ids: Sequence[str], known: Mapping[str, Row]) -> Vectors:
        """One row per id, zero where none is known."""
        rows = np.zeros((len(ids), self.row.cols), np.float32)
        for position, id in enumerate(ids):
            if id in known:
                rows[position] = known[id]
        return rows

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
        found = records.all_vectors(connection, row.number, row.kind)
        while some := list(islice(found, LOADED_TOGETHER)):
            ids = [id for id, _, _ in some]
            numbers = b"".join(blob or zero for _, blob, _ in some)
            block = np.frombuffer(numbers, np.float32).reshape(-1, row.cols)
            self.index.put(ids, block, np.array([seq for _, _, seq in some], np.int64))

    def term_sums(self, connection: sqlite3.Connection) -> dict[str, Row]:
        """By id what a derived collection's terms add to its source's items in the store."""
        sums: dict[str, Row] = {}
        if self.projection is None or self.projection.terms is None or self.row.source is None:
            return sums
        found = records.all_texts(connection, self.row.source)
        while some := dict(islice(found, LOADED_TOGETHER)):
            sums.update(zip(some, self.projection.terms.sum(list(some.values())), strict=True))
        return sums

    def load_derived(self, source: Collection, connection: sqlite3.Connection) -> None:
        """Gives a derived collection its vectors; terms and residuals come from the store."""
        added = self.term_sums(connection)
        seqs: dict[str, int] = {}
        for id, blob, seq in records.all_vectors(connection, self.row.number, self.row.kind):
            residual = np.frombuffer(blob or b"", np.float32)
            added[id] = added[id] + residual if id in added else residual
            seqs[id] = seq
        self.fill(source, added, seqs)

    def fill(
        self, source: Collection, added: Mapping[str, Row], added_seqs: Mapping[str, int]
    ) -> None:
        """Gives a derived collection the vectors of all its source's items.

        Args:
            added: what terms and residuals add, by id.
            added_seqs: the seq of the residuals' last changes.
        """
        assert self.projection is not None
        created = self.row.created_seq
        for ids, vectors, seqs in source.index.chunks(LOADED_TOGETHER):
            own = np.array([added_seqs.get(id, created) for id in ids], np.int64)
            seqs = np.maximum(np.maximum(seqs, created), own)
            projected = self.projection.apply_added(vectors, self._rows(ids, added))
            self.index.put(ids, projected, seqs)
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

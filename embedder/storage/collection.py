"""One collection in memory: its vectors, and how they follow from its source's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from embedder.search.index import VectorIndex
from embedder.storage import records, store
from embedder.storage.store import CollectionRow
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
        source: what it is derived from.
        tombstones: ids that it had, with the seq of their deletion; a derived collection shares
            its source's.
        seq: its last change.
        changes: vectors that changed since it was opened, replayed ones included.
        deleted: whether it is gone; whoever follows it must stop.
    """

    def __init__(
        self,
        row: CollectionRow,
        index: VectorIndex,
        source: Collection | None = None,
        projection: Projection | None = None,
    ) -> None:
        self.row = row
        self.index = index
        self.source = source
        self.projection = projection
        self.tombstones: dict[str, int] = {} if source is None else source.tombstones
        self.seq = row.seq
        self.changes = 0
        self.deleted = False

    def put(self, ids: Sequence[str], vectors: Vectors, seq: int) -> None:
        """Inserts or replaces vectors."""
        self.index.put(ids, vectors, seq)
        if self.tombstones:
            for id in ids:
                self.tombstones.pop(id, None)
        self._changed(len(ids), seq)

    def remove(self, ids: Sequence[str], seq: int) -> None:
        """Deletes vectors."""
        self.index.remove(ids)
        self.tombstones.update(dict.fromkeys(ids, seq))
        self._changed(len(ids), seq)

    def _changed(self, count: int, seq: int) -> None:
        # After the index, never before: a snapshot holds all up to the seq that it reads first.
        self.changes += count
        self.seq = seq

    def project(self, vectors: Vectors, texts: Sequence[str], residuals: Vectors) -> Vectors:
        """A derived collection's vectors from their source's vectors, texts and residuals."""
        assert self.projection is not None
        return self.projection.apply(vectors, texts, residuals)

    def message(self, items: int | None = None) -> pb.Collection:
        """As the contract shows it; `items`: how many, if the index does not know yet."""
        return pb.Collection(
            name=self.row.name,
            kind=self.row.kind,
            source="" if self.source is None else self.source.row.name,
            cols=self.row.cols,
            items=len(self.index) if items is None else items,
            seq=self.seq,
            index=self.index.name,
            indexed=self.index.covered,
            recall_at_10=self.index.recall,
        )

    def replay(self, connection: sqlite3.Connection, after: int = -1) -> None:
        """Brings the index from what it was at the seq `after` to what the store holds.

        Doing so twice does no harm. Without `after` this loads everything. A derived collection
        takes its vectors from its source's index, which must be up to date.
        """
        buried = [id for id, seq in self.tombstones.items() if seq > after]
        self.index.remove(buried)
        self.changes += len(buried)
        for ids, vectors, seqs in self._changed_after(connection, after):
            self.index.put(ids, vectors, seqs)
            self.changes += len(ids)
        self.seq = self.row.seq if self.source is None else max(self.row.seq, self.source.seq)

    def _changed_after(
        self, connection: sqlite3.Connection, after: int
    ) -> Iterator[tuple[list[str], Vectors, NDArray[np.int64]]]:
        """Ids, vectors and seqs of what the store has after a seq, some at a time."""
        row, source = self.row, self.source
        if source is None:
            found = records.changed_vectors(connection, row.number, row.kind, after)
            while some := list(islice(found, LOADED_TOGETHER)):
                vectors = records.stacked([blob for _, blob, _ in some], row.cols)
                yield [id for id, _, _ in some], vectors, _seqs([seq for *_, seq in some])
            return
        changed = records.changed_derived(connection, row.number, source.row.number, after)
        while group := list(islice(changed, LOADED_TOGETHER)):
            origins = source.index.get([id for id, *_ in group])
            # While writes wait to be applied in memory, the store may be ahead of the source.
            group = [one for one in group if one[0] in origins]
            block = np.array([origins[id] for id, *_ in group], np.float32)
            vectors = self.project(
                block.reshape(-1, source.row.cols),
                [text for _, text, _, _ in group],
                records.stacked([blob for _, _, blob, _ in group], row.cols),
            )
            seqs = np.maximum(_seqs([seq for *_, seq in group]), row.created_seq)
            yield [id for id, *_ in group], vectors, seqs


def _seqs(seqs: Sequence[int]) -> NDArray[np.int64]:
    return np.array(seqs, np.int64)


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

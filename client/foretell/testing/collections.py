"""Collections of the fake embedder, and the hashed word pieces that stand for its encoder."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.projection import Projection
from foretell.testing.conditions import matches
from foretell.vectors import Vectors, to_block

Row = NDArray[np.float32]
"""One vector."""

COLS = 384
"""Dimensions of a text vector, as the services' default encoder has."""

WATCH_ROWS = 1_000
"""Changes in one message of WatchItems."""

_WORD = re.compile(r"\w+|[^\w\s]")


def encode(text: str) -> Row:
    """A vector of length 1, shape (COLS,): hashed words and their pieces of three characters.

    Texts that share words or parts of words are near one another. A blank text's is zero.
    """
    vector = np.zeros(COLS, np.float32)
    for word in _WORD.findall(text.lower()):
        padded = f"<{word}>"
        pieces = (padded[at : at + 3] for at in range(len(padded) - 2))
        for piece in (padded, *pieces):
            code = zlib.crc32(piece.encode())
            vector[code % COLS] += 1.0 if code & 0x8000_0000 else -1.0
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


@dataclass
class Collection:
    """A collection and all in it."""

    name: str
    kind: pb.CollectionKind.ValueType
    cols: int
    source: str = ""
    projection: Projection | None = None
    """Of a derived one."""
    items: dict[str, pb.Item] = field(default_factory=dict)
    vectors: dict[str, Row] = field(default_factory=dict)
    residuals: dict[str, Row] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    """Position of each id's last change, deletions too; in the order of these."""
    seq: int = 0
    deleted: bool = False

    def put(self, item: pb.Item, vector: Row, seq: int) -> None:
        """Inserts or replaces an item; what follows the vectors sees only changes of these."""
        self.items[item.id] = item
        known = self.vectors.get(item.id)
        if known is None or not np.array_equal(known, vector):
            self.vectors[item.id] = vector
            self._note(item.id, seq)

    def delete(self, item_id: str, seq: int) -> None:
        """Deletes an item, its vector and its residual."""
        del self.items[item_id], self.vectors[item_id]
        self.residuals.pop(item_id, None)
        self._note(item_id, seq)

    def _note(self, item_id: str, seq: int) -> None:
        self.changes.pop(item_id, None)
        self.changes[item_id] = self.seq = seq

    def derive(self, source_vector: Row, text: str, item_id: str) -> Row:
        """The vector in this derived collection of a text; of an item's with its residual."""
        assert self.projection is not None
        residual = self.residuals.get(item_id)
        rows = None if residual is None else residual[None]
        row: Row = self.projection.apply(source_vector[None], [text], rows)[0]
        return row

    def matrix(self, ids: Iterable[str]) -> Vectors:
        """Vectors of ids, shape (ids, cols)."""
        return stack([self.vectors[item_id] for item_id in ids], self.cols)

    def changes_after(self, seq: int) -> pb.WatchItemsResponse:
        """The next changes after a position."""
        later = ((item_id, at) for item_id, at in self.changes.items() if at > seq)
        some = list(islice(later, WATCH_ROWS))
        ids = [item_id for item_id, _ in some if item_id in self.vectors]
        known = some[-1][1] if some else max(seq, self.seq)
        return pb.WatchItemsResponse(
            ids=ids,
            vectors=to_block(self.matrix(ids)),
            deleted_ids=[item_id for item_id, _ in some if item_id not in self.vectors],
            seq=known,
            caught_up=known >= self.seq,
        )

    def message(self) -> pb.Collection:
        """The collection as it stands."""
        return pb.Collection(
            name=self.name,
            kind=self.kind,
            source=self.source,
            cols=self.cols,
            items=len(self.vectors),
            seq=self.seq,
            index="Flat",
        )


def nearest(
    collection: Collection, query: Row, k: int, query_filter: pb.QueryFilter
) -> tuple[list[str], Row]:
    """The k ids with the largest inner products, and these; of equal ones the smaller id first."""
    allowed = set(query_filter.allow_ids) or collection.vectors.keys()
    ids = sorted((allowed & collection.vectors.keys()) - set(query_filter.deny_ids))
    if query_filter.HasField("condition"):
        items, condition = collection.items, query_filter.condition
        ids = [item_id for item_id in ids if matches(condition, items[item_id].attributes)]
    scores = collection.matrix(ids) @ query
    best = np.argsort(-scores, kind="stable")[:k]
    return [ids[at] for at in best], scores[best]


def stack(rows: Sequence[Row], cols: int) -> Vectors:
    """A matrix of rows, shape (rows, cols), of no rows too."""
    return np.array(rows, np.float32).reshape(len(rows), cols)

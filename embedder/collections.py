"""Collections: what the store keeps, and the indexes in memory that follow it commit by commit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from google.protobuf.message import Message

from embedder import store
from embedder.index import VectorIndex
from embedder.store import CollectionRow, ItemRow, Store
from embedder.text_cache import Row, TextCache, text_hash
from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from foretell.projection import Projection, from_derived
from foretell.texts import text_id
from foretell.vectors import Vectors
from serving.database import once

ITEMS = "items"
BEHAVIORS = "behaviors"
BUILT_IN = (ITEMS, BEHAVIORS)
"""Text collections that are always there."""

LOADED_TOGETHER = 8_192
"""Rows read from the store at a time."""

M = TypeVar("M", bound=Message)
Apply = Callable[[sqlite3.Connection], M]


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


class Collections:
    """All collections of one store.

    Reads come from any thread. Changes are made in memory on the database's writer thread, after
    the commit and before the acknowledgement, in the order of the commits; a derived collection
    changes together with its source.
    """

    def __init__(self, kept: Store, texts: TextCache, cols: int) -> None:
        self.applied_seq = 0
        self.on_change: Callable[[], None] = lambda: None
        """Called on the writer thread after each change."""
        self._store = kept
        self._texts = texts
        self._cols = cols
        self._by_name: dict[str, Collection] = {}
        self._load()

    # --- what there is ---------------------------------------------------------------------------

    def get(self, name: str, *kinds: pb.CollectionKind.ValueType, default: str = "") -> Collection:
        """A collection by name, empty for `default`; of one of `kinds`, if any are given.

        Raises:
            NotFoundError: there is none.
            InvalidArgumentError: it is of another kind.
        """
        found = self._by_name.get(name or default)
        if found is None:
            raise checks.no_collection(name)
        _check_kind(found.row, kinds, "collection")
        return found

    def source(self, collection: Collection) -> Collection:
        """What a collection is derived from; itself if it is not."""
        for other in list(self._by_name.values()):
            if other.row.number == collection.row.source:
                return other
        return collection

    def messages(self) -> list[pb.Collection]:
        """All collections in the order of their names."""
        return [self._message(one) for _, one in sorted(self._by_name.items())]

    def items(self, collection: Collection, ids: Sequence[str]) -> dict[str, pb.Item]:
        """Items by id, those that exist."""
        row = self.source(collection).row
        connection = self._store.database.connection()
        if row.kind == pb.COLLECTION_KIND_TEXT:
            return store.items_by_id(connection, row.number, ids)
        found = store.existing(connection, row.number, row.kind, ids)
        return {id: pb.Item(id=id) for id in found}

    def items_after(self, collection: Collection, after: str) -> Iterator[pb.Item]:
        """Items with a larger id, in the order of the ids."""
        row = self.source(collection).row
        connection = self._store.database.connection()
        return store.items_after(connection, row.number, row.kind, after)

    # --- writes ----------------------------------------------------------------------------------

    async def create(self, request: pb.CreateCollectionRequest) -> pb.CreateCollectionResponse:
        """Creates a collection; a derived one with the vectors of all its source's items.

        Raises:
            AlreadyExistsError, NotFoundError, InvalidArgumentError, ResourceExhaustedError.
        """
        checks.request_id(request.request_id)
        checks.name(request.name, "name")
        made: list[Collection] = []

        def apply(connection: sqlite3.Connection) -> pb.CreateCollectionResponse:
            made.append(self._create_row(connection, request))
            source = made[0].row.source
            items = 0 if source is None else store.count_items(connection, source)
            message = made[0].message(request.derived.source, items)
            return pb.CreateCollectionResponse(collection=message)

        def change() -> int:
            self._fill(made[0])
            self._by_name = {**self._by_name, request.name: made[0]}
            return made[0].row.created_seq

        return await self._write(apply, change, request, pb.CreateCollectionResponse)

    async def delete(self, request: pb.DeleteCollectionRequest) -> pb.DeleteCollectionResponse:
        """Deletes a collection.

        Raises:
            NotFoundError: there is none.
            FailedPreconditionError: it is built in, or others are derived from it.
        """
        checks.request_id(request.request_id)
        seqs: list[int] = []

        def apply(connection: sqlite3.Connection) -> pb.DeleteCollectionResponse:
            row = _row(connection, request.name, "name")
            if row.name in BUILT_IN:
                raise FailedPreconditionError(
                    f"{row.name} is built in", reason="BUILT_IN", field="name"
                )
            derived = store.derived_from(connection, row.number)
            if derived:
                raise FailedPreconditionError(
                    f"{derived[0].name} is derived from {row.name}; delete it first",
                    reason="HAS_DERIVED",
                    field="name",
                )
            seqs.append(store.drop_collection(connection, row.number))
            return pb.DeleteCollectionResponse()

        def change() -> int:
            remaining = dict(self._by_name)
            remaining.pop(request.name).deleted = True
            self._by_name = remaining
            return seqs[0]

        return await self._write(apply, change, request, pb.DeleteCollectionResponse)

    async def upsert_items(self, request: pb.UpsertItemsRequest) -> pb.UpsertItemsResponse:
        """Inserts or replaces items; texts that are not known yet are encoded.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
            ResourceExhaustedError: too many texts wait for the encoder.
        """
        checks.request_id(request.request_id)
        checks.count(len(request.items), "items", limits.BATCH)
        collection = self.get(request.collection, pb.COLLECTION_KIND_TEXT, default=ITEMS)
        behaviors = collection.row.name == BEHAVIORS
        good, failures = checks.split(
            request.items, checks.behavior_item if behaviors else checks.item
        )
        rows: dict[str, ItemRow] = {}
        for index in good:
            row = _item_row(request.items[index], behaviors)
            rows[row.id] = row
        texts = {row.hash: row.text for row in rows.values() if row.hash is not None}
        encoded = await self._texts.encode(list(texts.values()))
        vectors = dict(zip(texts, encoded.vectors, strict=True))
        blobs = {key: vector.tobytes() for key, vector in vectors.items()}
        written: list[tuple[list[ItemRow], dict[int, dict[str, Row]]]] = []
        response = pb.UpsertItemsResponse(
            upserted=len(rows),
            encoded=encoded.new,
            failures=failures,
            timings=common_pb2.Timings(
                queue_us=encoded.timing.queue_us,
                tokenize_us=encoded.timing.tokenize_us,
                forward_us=encoded.timing.forward_us,
            ),
        )

        def apply(connection: sqlite3.Connection) -> pb.UpsertItemsResponse:
            number = _same(connection, collection).number
            response.seq = store.next_seq(connection)
            moved = store.put_items(connection, number, list(rows.values()), blobs, response.seq)
            store.touch(connection, number, response.seq)
            ids = [row.id for row in moved]
            residuals = {
                derived.number: store.vectors_by_id(connection, derived.number, ids)
                for derived in store.derived_from(connection, number)
            }
            written.append((moved, residuals))
            return response

        def change() -> int:
            moved, residuals = written[0]
            block = np.zeros((len(moved), self._cols), np.float32)
            for position, row in enumerate(moved):
                if row.hash is not None:
                    block[position] = vectors[row.hash]
            self._put(collection, [row.id for row in moved], block, residuals, response.seq)
            return response.seq

        return await self._write(apply, change, request, pb.UpsertItemsResponse)

    async def delete_items(self, request: pb.DeleteItemsRequest) -> pb.DeleteItemsResponse:
        """Deletes items, and their vectors and residuals in derived collections.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
        """
        checks.request_id(request.request_id)
        checks.ids(request.ids, "ids")
        collection = self.get(
            request.collection,
            pb.COLLECTION_KIND_TEXT,
            pb.COLLECTION_KIND_VECTOR,
            default=ITEMS,
        )
        ids = list(dict.fromkeys(request.ids))
        deleted: list[list[str]] = []
        seqs: list[int] = []

        def apply(connection: sqlite3.Connection) -> pb.DeleteItemsResponse:
            row = _same(connection, collection)
            seqs.append(store.next_seq(connection))
            deleted.append(store.delete_ids(connection, row.number, row.kind, ids, seqs[0]))
            store.touch(connection, row.number, seqs[0])
            gone = set(deleted[0])
            return pb.DeleteItemsResponse(
                deleted=len(gone), missing_ids=[id for id in ids if id not in gone], seq=seqs[0]
            )

        def change() -> int:
            collection.remove(deleted[0], seqs[0])
            for derived in self._derived(collection):
                derived.index.remove(deleted[0])
                derived.seq = seqs[0]
            return seqs[0]

        return await self._write(apply, change, request, pb.DeleteItemsResponse)

    async def put_vectors(self, request: pb.PutVectorsRequest) -> pb.PutVectorsResponse:
        """Inserts or replaces vectors of a vector collection or residuals of a derived one.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
        """
        checks.request_id(request.request_id)
        checks.count(len(request.ids), "ids", limits.BATCH)
        collection = self.get(
            request.collection, pb.COLLECTION_KIND_VECTOR, pb.COLLECTION_KIND_DERIVED
        )
        vectors = checks.block(request.vectors, collection.row.cols)
        checks.one_row_each(len(vectors), len(request.ids))
        finite = checks.finite_row(vectors, "vectors")

        def check(id: str, index: int) -> None:
            checks.identifier(id, f"ids[{index}]")
            finite(id, index)

        good, failures = checks.split(request.ids, check)
        rows = {request.ids[index]: vectors[index] for index in good}
        response = pb.PutVectorsResponse()

        def apply(connection: sqlite3.Connection) -> pb.PutVectorsResponse:
            row = _same(connection, collection)
            missing = self._without_source(connection, row, request.ids, good)
            for index in missing:
                rows.pop(request.ids[index], None)
            for one in sorted([*failures, *missing.values()], key=lambda one: one.index):
                response.failures.append(one)
            response.written = len(rows)
            response.seq = store.next_seq(connection)
            blobs = ((id, vector.tobytes()) for id, vector in rows.items())
            store.put_vectors(connection, row.number, blobs, response.seq)
            store.touch(connection, row.number, response.seq)
            return response

        def change() -> int:
            ids = list(rows)
            if collection.projection is None:
                block = np.array([rows[id] for id in ids], np.float32)
                collection.put(ids, block.reshape(-1, collection.row.cols), response.seq)
            else:
                self._put_residuals(collection, rows, response.seq)
            return response.seq

        return await self._write(apply, change, request, pb.PutVectorsResponse)

    # --- inside ----------------------------------------------------------------------------------

    async def _write(
        self, apply: Apply[M], change: Callable[[], int], request: Message, response_type: type[M]
    ) -> M:
        """`apply` in a transaction, once for its request_id; then `change` in memory."""

        def committed(result: tuple[M, bool]) -> None:
            if result[1]:
                self.applied_seq = change()
                self.on_change()

        response, _ = await self._store.database.write(
            once(apply, request, response_type), committed
        )
        return response

    def _load(self) -> None:
        """Reads everything from the store; creates the built-in collections in a new one."""
        self._store.database.submit(self._create_built_in).result()
        with self._store.database.snapshot() as connection:
            for row in store.collections(connection):
                projection = None
                tombstones = store.tombstones(connection, row.number)
                if row.source is not None:
                    source = self._numbered(row.source)
                    tombstones = source.tombstones
                    message = pb.DerivedCollection.FromString(row.definition)
                    projection = from_derived(message, source.row.cols)
                collection = Collection(row, tombstones, projection)
                if projection is None:
                    _load_vectors(connection, collection)
                else:
                    self._fill(collection, connection)
                self._by_name[row.name] = collection
            self.applied_seq = store.current_seq(connection)

    def _create_built_in(self, connection: sqlite3.Connection) -> None:
        for name in BUILT_IN:
            if store.collection(connection, name) is None:
                store.add_collection(connection, name, pb.COLLECTION_KIND_TEXT, self._cols)

    def _create_row(
        self, connection: sqlite3.Connection, request: pb.CreateCollectionRequest
    ) -> Collection:
        """Writes a new collection and makes it, still empty."""
        if store.collection(connection, request.name) is not None:
            raise AlreadyExistsError(
                f"there is a collection {request.name!r} already",
                reason="COLLECTION_EXISTS",
                field="name",
            )
        if len(store.collections(connection)) >= limits.COLLECTIONS:
            raise ResourceExhaustedError(
                f"there are {limits.COLLECTIONS} collections already",
                reason="TOO_MANY_COLLECTIONS",
            )
        match request.WhichOneof("kind"):
            case "text":
                kind = pb.COLLECTION_KIND_TEXT
                return Collection(
                    store.add_collection(connection, request.name, kind, self._cols), {}
                )
            case "vector":
                cols = request.vector.cols
                checks.vector_cols(cols)
                kind = pb.COLLECTION_KIND_VECTOR
                return Collection(store.add_collection(connection, request.name, kind, cols), {})
            case "derived":
                return self._create_derived(connection, request.name, request.derived)
            case _:
                raise InvalidArgumentError("kind is not set", reason="NO_KIND", field="kind")

    def _create_derived(
        self, connection: sqlite3.Connection, name: str, message: pb.DerivedCollection
    ) -> Collection:
        source = _row(connection, message.source, "derived.source")
        _check_kind(source, (pb.COLLECTION_KIND_TEXT,), "derived.source")
        projection = from_derived(message, source.cols)
        row = store.add_collection(
            connection,
            name,
            pb.COLLECTION_KIND_DERIVED,
            projection.cols,
            source.number,
            message.SerializeToString(),
        )
        return Collection(row, self._numbered(source.number).tombstones, projection)

    def _fill(self, collection: Collection, connection: sqlite3.Connection | None = None) -> None:
        """Gives a derived collection the vectors of all its source's items.

        With the residuals that the connection's database has for it; a new one has none.
        """
        if collection.projection is None:
            return
        number, created = collection.row.number, collection.row.created_seq
        residuals: dict[str, Row] = {}
        residual_seqs: dict[str, int] = {}
        if connection is not None:
            for id, blob, seq in store.all_vectors(connection, number, collection.row.kind):
                residuals[id] = np.frombuffer(blob or b"", np.float32)
                residual_seqs[id] = seq
        source = self.source(collection)
        for ids, vectors, seqs in source.index.chunks(LOADED_TOGETHER):
            own = np.array([residual_seqs.get(id, created) for id in ids], np.int64)
            seqs = np.maximum(np.maximum(seqs, created), own)
            collection.index.put(ids, collection.project(ids, vectors, residuals), seqs)
        collection.seq = max(collection.row.seq, source.seq)

    def _put(
        self,
        collection: Collection,
        ids: list[str],
        vectors: Vectors,
        residuals: Mapping[int, Mapping[str, Row]],
        seq: int,
    ) -> None:
        """New vectors of a text collection, there and in all that is derived from it."""
        collection.put(ids, vectors, seq)
        for derived in self._derived(collection):
            own = residuals.get(derived.row.number, {})
            derived.index.put(ids, derived.project(ids, vectors, own), seq)
            derived.seq = seq

    def _put_residuals(self, collection: Collection, rows: Mapping[str, Row], seq: int) -> None:
        source = self.source(collection).index.get(list(rows))
        ids = list(source)
        block = np.array(list(source.values()), np.float32).reshape(-1, self._cols)
        collection.index.put(ids, collection.project(ids, block, rows), seq)
        collection.seq = seq

    def _without_source(
        self,
        connection: sqlite3.Connection,
        row: CollectionRow,
        ids: Sequence[str],
        good: Sequence[int],
    ) -> dict[int, common_pb2.ElementFailure]:
        """Of a derived collection: rows whose id the source lacks, and their failures."""
        if row.source is None:
            return {}
        kind = pb.COLLECTION_KIND_TEXT
        known = store.existing(connection, row.source, kind, [ids[index] for index in good])
        return {
            index: checks.failure(index, checks.no_item(ids[index], f"ids[{index}]"))
            for index in good
            if ids[index] not in known
        }

    def _derived(self, collection: Collection) -> list[Collection]:
        return [one for one in self._by_name.values() if one.row.source == collection.row.number]

    def _numbered(self, number: int) -> Collection:
        return next(one for one in self._by_name.values() if one.row.number == number)

    def _message(self, collection: Collection) -> pb.Collection:
        source = self.source(collection)
        return collection.message("" if source is collection else source.row.name)


def _check_kind(
    row: CollectionRow, kinds: Sequence[pb.CollectionKind.ValueType], field: str
) -> None:
    if kinds and row.kind not in kinds:
        names = (pb.CollectionKind.Name(kind).rsplit("_", 1)[-1].lower() for kind in kinds)
        raise checks.wrong_kind(row.name, f"a {' or '.join(sorted(names))} collection", field)


def _row(connection: sqlite3.Connection, name: str, field: str = "collection") -> CollectionRow:
    row = store.collection(connection, name)
    if row is None:
        raise checks.no_collection(name, field)
    return row


def _same(connection: sqlite3.Connection, collection: Collection) -> CollectionRow:
    """The collection's row, unless it was deleted meanwhile."""
    row = _row(connection, collection.row.name)
    if row.number != collection.row.number:
        raise checks.no_collection(row.name)
    return row


def _item_row(item: pb.Item, behavior: bool) -> ItemRow:
    id = text_id(item.text) if behavior else item.id
    attributes = json.dumps(dict(item.attributes), sort_keys=True, ensure_ascii=False)
    key = text_hash(item.text) if item.text.strip() else None
    return ItemRow(id, item.text, key, attributes)


def _load_vectors(connection: sqlite3.Connection, collection: Collection) -> None:
    row = collection.row
    zero = np.zeros(row.cols, np.float32).tobytes()
    ids: list[str] = []
    blobs: list[bytes] = []
    seqs: list[int] = []

    def put() -> None:
        block = np.frombuffer(b"".join(blobs), np.float32).reshape(-1, row.cols)
        collection.index.put(ids, block, np.array(seqs, np.int64))

    for id, blob, seq in store.all_vectors(connection, row.number, row.kind):
        ids.append(id)
        blobs.append(blob or zero)
        seqs.append(seq)
        if len(ids) == LOADED_TOGETHER:
            put()
            ids, blobs, seqs = [], [], []
    put()

"""Collections: what the store keeps, and the indexes in memory that follow it commit by commit."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from embedder.search.index import DEFAULT_OPTIONS, IndexOptions, VectorIndex
from embedder.storage import records, store
from embedder.storage.collection import Collection, check_kind, row_of
from embedder.storage.conditions import Conditions, Ids
from embedder.storage.snapshot import Snapshots
from embedder.storage.store import CollectionRow, Store
from foretell import checks, limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from foretell.projection import Projection, from_derived
from serving.idempotency import once

ITEMS = "items"
BEHAVIORS = "behaviors"
BUILT_IN = (ITEMS, BEHAVIORS)
"""Text collections that are always there."""

M = TypeVar("M", bound=Message)
Apply = Callable[[sqlite3.Connection], M]


class Collections:
    """All collections of one store.

    Reads come from any thread. Changes are made in memory on the database's writer thread, after
    the commit and before the acknowledgement, in the order of the commits; a derived collection
    changes together with its source.
    """

    def __init__(self, kept: Store, cols: int, options: IndexOptions = DEFAULT_OPTIONS) -> None:
        self.applied_seq = 0
        self.listeners: list[Callable[[], None]] = []
        """Called on the writer thread after each change."""
        self.snapshots = Snapshots(kept.folder / "snapshots", kept.id)
        self._store = kept
        self._cols = cols
        self._options = options
        self._conditions = Conditions()
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
        check_kind(found.row, kinds, "collection")
        return found

    def source(self, collection: Collection) -> Collection:
        """What a collection is derived from; itself if it is not."""
        return collection.source or collection

    def derived(self, collection: Collection) -> list[Collection]:
        """What is derived from a collection."""
        return [one for one in self._by_name.values() if one.row.source == collection.row.number]

    def all(self) -> list[Collection]:
        """All there are now."""
        return list(self._by_name.values())

    def messages(self) -> list[pb.Collection]:
        """All collections in the order of their names."""
        return [one.message() for _, one in sorted(self._by_name.items())]

    def items(self, collection: Collection, ids: Sequence[str]) -> dict[str, pb.Item]:
        """Items by id, those that exist."""
        row = self.source(collection).row
        connection = self._store.database.connection()
        if row.kind == pb.COLLECTION_KIND_TEXT:
            return records.items_by_id(connection, row.number, ids)
        found = records.existing(connection, row.number, row.kind, ids)
        return {id: pb.Item(id=id) for id in found}

    def items_after(self, collection: Collection, after: str) -> Iterator[pb.Item]:
        """Items with a larger id, in the order of the ids."""
        row = self.source(collection).row
        connection = self._store.database.connection()
        return records.items_after(connection, row.number, row.kind, after)

    def matching(
        self,
        collection: Collection,
        conditions: Sequence[pb.Condition],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Ids]:
        """The ids of all items that match each condition, of one moment.

        Args:
            collection: a text collection, or one derived from it.
            conditions: valid ones.
            cancelled: whether nobody waits for the answer any more; ends with an error then.
        """
        source = self.source(collection)
        seq = source.seq  # before the first read: what is read may be newer, never older
        with self._store.database.snapshot() as connection:
            return [
                self._conditions.ids(connection, source.row.number, seq, each, cancelled)
                for each in conditions
            ]

    # --- writes ----------------------------------------------------------------------------------

    async def create(self, request: pb.CreateCollectionRequest) -> pb.CreateCollectionResponse:
        """Creates a collection; a derived one with the vectors of all its source's items.

        Raises:
            AlreadyExistsError, NotFoundError, InvalidArgumentError, ResourceExhaustedError.
        """
        checks.request_id(request.request_id)
        checks.name(request.name, "name")
        written: list[tuple[CollectionRow, Projection | None]] = []

        def apply(connection: sqlite3.Connection) -> pb.CreateCollectionResponse:
            row, projection = self._create_row(connection, request)
            written.append((row, projection))
            items = 0 if row.source is None else records.count_items(connection, row.source)
            message = self._empty(row).message(items)
            message.source = request.derived.source
            return pb.CreateCollectionResponse(collection=message)

        def change() -> int:
            row, projection = written[0]
            # Only now: the source may be of the same group.
            source = None if row.source is None else self._numbered(row.source)
            made = self._empty(row, source, projection)
            # The store may be ahead by writes of the same group; each puts its own vectors next.
            made.replay(self._store.database.connection())
            self._by_name = {**self._by_name, request.name: made}
            return row.created_seq

        return await self.commit(apply, change, request, pb.CreateCollectionResponse)

    async def delete(self, request: pb.DeleteCollectionRequest) -> pb.DeleteCollectionResponse:
        """Deletes a collection.

        Raises:
            NotFoundError: there is none.
            FailedPreconditionError: it is built in, or others are derived from it.
        """
        checks.request_id(request.request_id)
        seqs: list[int] = []

        def apply(connection: sqlite3.Connection) -> pb.DeleteCollectionResponse:
            row = row_of(connection, request.name, "name")
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
            seqs.append(records.drop_collection(connection, row.number))
            return pb.DeleteCollectionResponse()

        def change() -> int:
            remaining = dict(self._by_name)
            remaining.pop(request.name).deleted = True
            self._by_name = remaining
            return seqs[0]

        return await self.commit(apply, change, request, pb.DeleteCollectionResponse)

    # --- inside ----------------------------------------------------------------------------------

    async def commit(
        self, apply: Apply[M], change: Callable[[], int], request: Message, response_type: type[M]
    ) -> M:
        """Runs `apply` in a transaction, once for its request_id; then `change` in memory.

        `change` gives the write's seq.
        """

        def committed(result: tuple[M, bool]) -> None:
            if result[1]:
                self.applied_seq = change()
                for listener in self.listeners:
                    listener()

        response, _ = await self._store.database.write(
            once(apply, request, response_type), committed
        )
        return response

    def _load(self) -> None:
        """Reads snapshots, and from the store what they lack; makes the built-in collections."""
        self._store.database.submit(self._create_built_in).result()
        with self._store.database.snapshot() as connection:
            self.applied_seq = store.current_seq(connection)
            rows = store.collections(connection)
            self.snapshots.keep_only(row.number for row in rows)
            for row in rows:
                self._by_name[row.name] = self._open(connection, row)

    def _open(self, connection: sqlite3.Connection, row: CollectionRow) -> Collection:
        """A collection as the store has it; what it is derived from is open already."""
        snapshot = self.snapshots.load(row, self.applied_seq)
        if snapshot is None:
            after, index = -1, VectorIndex(row.cols, self._options)
        else:
            after = snapshot.manifest.seq
            index = VectorIndex.restored(row.cols, self._options, snapshot.frozen)
        if row.source is None:
            collection = Collection(row, index)
            collection.tombstones.update(records.tombstones(connection, row.number))
        else:
            source = self._numbered(row.source)
            projection = from_derived(store.definition(connection, row.number), source.row.cols)
            collection = Collection(row, index, source, projection)
        collection.replay(connection, after)
        return collection

    def _create_built_in(self, connection: sqlite3.Connection) -> None:
        for name in BUILT_IN:
            if store.collection(connection, name) is None:
                store.add_collection(connection, name, pb.COLLECTION_KIND_TEXT, self._cols)

    def _create_row(
        self, connection: sqlite3.Connection, request: pb.CreateCollectionRequest
    ) -> tuple[CollectionRow, Projection | None]:
        """Writes a new collection; of a derived one gives the projection too."""
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
                return store.add_collection(connection, request.name, kind, self._cols), None
            case "vector":
                cols = request.vector.cols
                checks.vector_cols(cols)
                kind = pb.COLLECTION_KIND_VECTOR
                return store.add_collection(connection, request.name, kind, cols), None
            case "derived":
                return self._create_derived(connection, request.name, request.derived)
            case _:
                raise InvalidArgumentError("kind is not set", reason="NO_KIND", field="kind")

    def _create_derived(
        self, connection: sqlite3.Connection, name: str, message: pb.DerivedCollection
    ) -> tuple[CollectionRow, Projection]:
        source = row_of(connection, message.source, "derived.source")
        check_kind(source, (pb.COLLECTION_KIND_TEXT,), "derived.source")
        projection = from_derived(message, source.cols)
        row = store.add_collection(
            connection,
            name,
            pb.COLLECTION_KIND_DERIVED,
            projection.cols,
            source.number,
            message,
        )
        return row, projection

    def _empty(
        self,
        row: CollectionRow,
        source: Collection | None = None,
        projection: Projection | None = None,
    ) -> Collection:
        return Collection(row, VectorIndex(row.cols, self._options), source, projection)

    def _numbered(self, number: int) -> Collection:
        return next(one for one in self._by_name.values() if one.row.number == number)

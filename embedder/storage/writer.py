"""Writes of items and vectors: checked, encoded, committed, then applied to the indexes."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from embedder.encoding.text_cache import Encoded, TextCache, text_hash
from embedder.storage import records, store
from embedder.storage.collection import Collection, row_of
from embedder.storage.collections import BEHAVIORS, ITEMS, Collections
from embedder.storage.records import ItemRow
from embedder.storage.store import CollectionRow
from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.texts import text_id
from foretell.vectors import Row, Vectors


class Writer:
    """Changes what collections hold; a derived collection changes together with its source."""

    def __init__(self, collections: Collections, texts: TextCache) -> None:
        self._collections = collections
        self._texts = texts

    async def upsert_items(
        self, request: pb.UpsertItemsRequest, deadline: float | None = None
    ) -> pb.UpsertItemsResponse:
        """Inserts or replaces items; texts that are not known yet are encoded.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
            ResourceExhaustedError, DeadlineExceededError: those of `Batcher.encode`, which
                `deadline` is for.
        """
        checks.request_id(request.request_id)
        checks.count(len(request.items), "items", limits.BATCH)
        collection = self._collections.get(
            request.collection, pb.COLLECTION_KIND_TEXT, default=ITEMS
        )
        # In a thread: 10,000 items take 0.1 s, for which the event loop would stand still.
        batch = await asyncio.to_thread(_batch, request, collection.row.name == BEHAVIORS)
        encoded = await self._texts.encode(list(batch.texts.values()), deadline)
        vectors = dict(zip(batch.texts, encoded.vectors, strict=True))
        written: list[tuple[list[ItemRow], dict[int, dict[str, Row]]]] = []
        response = _response(batch, encoded)

        def apply(connection: sqlite3.Connection) -> pb.UpsertItemsResponse:
            number = _same(connection, collection).number
            response.seq = store.next_seq(connection)
            moved = records.put_items(connection, number, batch.rows, vectors, response.seq)
            store.touch(connection, number, response.seq)
            ids = [row.id for row in moved]
            residuals = {
                derived.number: records.vectors_by_id(connection, derived.number, ids)
                for derived in store.derived_from(connection, number)
            }
            written.append((moved, residuals))
            return response

        def change() -> int:
            moved, residuals = written[0]
            block = np.zeros((len(moved), collection.row.cols), np.float32)
            for position, row in enumerate(moved):
                if row.hash is not None:
                    block[position] = vectors[row.hash]
            self._put(collection, moved, block, residuals, response.seq)
            return response.seq

        return await self._collections.commit(apply, change, request, pb.UpsertItemsResponse)

    async def delete_items(self, request: pb.DeleteItemsRequest) -> pb.DeleteItemsResponse:
        """Deletes items, and their vectors and residuals in derived collections.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
        """
        checks.request_id(request.request_id)
        checks.ids(request.ids, "ids")
        collection = self._collections.get(
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
            deleted.append(records.delete_ids(connection, row.number, row.kind, ids, seqs[0]))
            store.touch(connection, row.number, seqs[0])
            gone = set(deleted[0])
            return pb.DeleteItemsResponse(
                deleted=len(gone), missing_ids=[id for id in ids if id not in gone], seq=seqs[0]
            )

        def change() -> int:
            collection.remove(deleted[0], seqs[0])
            for derived in self._collections.derived(collection):
                derived.remove(deleted[0], seqs[0])
            return seqs[0]

        return await self._collections.commit(apply, change, request, pb.DeleteItemsResponse)

    async def put_vectors(self, request: pb.PutVectorsRequest) -> pb.PutVectorsResponse:
        """Inserts or replaces vectors of a vector collection or residuals of a derived one.

        Raises:
            NotFoundError, InvalidArgumentError: a fault of the whole call.
        """
        checks.request_id(request.request_id)
        checks.count(len(request.ids), "ids", limits.BATCH)
        collection = self._collections.get(
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
        texts: dict[str, str] = {}
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
            records.put_vectors(connection, row.number, blobs, response.seq)
            store.touch(connection, row.number, response.seq)
            if row.source is not None:
                texts.update(records.texts_by_id(connection, row.source, list(rows)))
            return response

        def change() -> int:
            ids = list(rows)
            if collection.projection is None:
                block = np.array([rows[id] for id in ids], np.float32)
                collection.put(ids, block.reshape(-1, collection.row.cols), response.seq)
            else:
                self._put_residuals(collection, rows, texts, response.seq)
            return response.seq

        return await self._collections.commit(apply, change, request, pb.PutVectorsResponse)

    def _put(
        self,
        collection: Collection,
        items: Sequence[ItemRow],
        vectors: Vectors,
        residuals: Mapping[int, Mapping[str, Row]],
        seq: int,
    ) -> None:
        """New vectors of a text collection, there and in all that is derived from it."""
        ids, texts = [item.id for item in items], [item.text for item in items]
        collection.put(ids, vectors, seq)
        for derived in self._collections.derived(collection):
            own = _stacked(ids, residuals.get(derived.row.number, {}), derived.row.cols)
            derived.put(ids, derived.project(vectors, texts, own), seq)

    def _put_residuals(
        self, collection: Collection, rows: Mapping[str, Row], texts: Mapping[str, str], seq: int
    ) -> None:
        source = self._collections.source(collection)
        found = source.index.get(list(rows))
        ids = list(found)
        block = np.array(list(found.values()), np.float32).reshape(-1, source.row.cols)
        own = _stacked(ids, rows, collection.row.cols)
        collection.put(ids, collection.project(block, [texts[id] for id in ids], own), seq)

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
        known = records.existing(connection, row.source, kind, [ids[index] for index in good])
        return {
            index: checks.failure(index, checks.no_item(ids[index], f"ids[{index}]"))
            for index in good
            if ids[index] not in known
        }


def _stacked(ids: Sequence[str], known: Mapping[str, Row], cols: int) -> Vectors:
    """One row per id, zero where none is known."""
    rows = np.zeros((len(ids), cols), np.float32)
    for position, id in enumerate(ids):
        if id in known:
            rows[position] = known[id]
    return rows


def _same(connection: sqlite3.Connection, collection: Collection) -> CollectionRow:
    """The collection's row, unless it was deleted meanwhile."""
    row = row_of(connection, collection.row.name)
    if row.number != collection.row.number:
        raise checks.no_collection(row.name)
    return row


def _item_row(item: pb.Item, behavior: bool) -> ItemRow:
    id = text_id(item.text) if behavior else item.id
    attributes = json.dumps(dict(item.attributes), sort_keys=True, ensure_ascii=False)
    key = text_hash(item.text) if item.text.strip() else None
    return ItemRow(id, item.text, key, attributes)


@dataclass(frozen=True)
class _Batch:
    """The good items of a request."""

    rows: list[ItemRow]
    """Of different ids."""
    texts: dict[bytes, str]
    """By hash; without empty ones."""
    failures: list[common_pb2.ElementFailure]


def _batch(request: pb.UpsertItemsRequest, behaviors: bool) -> _Batch:
    good, failures = checks.split(request.items, checks.behavior_item if behaviors else checks.item)
    rows: dict[str, ItemRow] = {}
    for index in good:
        row = _item_row(request.items[index], behaviors)
        rows[row.id] = row  # of items with the same id the last one stands
    texts = {row.hash: row.text for row in rows.values() if row.hash is not None}
    return _Batch(list(rows.values()), texts, failures)


def _response(batch: _Batch, encoded: Encoded) -> pb.UpsertItemsResponse:
    return pb.UpsertItemsResponse(
        upserted=len(batch.rows),
        encoded=encoded.new,
        failures=batch.failures,
        timings=common_pb2.Timings(
            queue_us=encoded.timing.queue_us,
            tokenize_us=encoded.timing.tokenize_us,
            forward_us=encoded.timing.forward_us,
        ),
    )

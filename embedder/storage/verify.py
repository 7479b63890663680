"""The two-way consistency check of a data directory: SQLite, snapshots, indexes.

It only reads, takes no lock, and may run beside an embedder that serves.
"""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from embedder.search.index import DEFAULT_OPTIONS, Frozen, VectorIndex
from embedder.storage import attributes, records, store
from embedder.storage.snapshot import Snapshot, Snapshots
from embedder.storage.store import CollectionRow
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import InvalidArgumentError
from foretell.projection import Projection, from_derived
from foretell.texts import number_of, text_id
from foretell.vectors import Vectors
from serving.database import read_transaction, select_in
from serving.files import DamagedError
from serving.keeping import Report, check_sqlite, reporting_damage

TOGETHER = 8_192
"""Rows compared at a time."""

SAMPLED = 64
"""Vectors by which an accelerator is tried."""

LEAST_RECALL = 4.0
"""Times 1 / sqrt(vectors): recall@10 of these below which the accelerator cannot be one of these
vectors. One of others has half of that at most; random vectors, of which it finds few without much
effort, have four times as much."""

CLOSE = 1e-4
"""Difference of a projected vector from the one in a snapshot, computed in other blocks, as a share
of its largest number."""

UNREADABLE = (ValueError, TypeError, KeyError, InvalidArgumentError, DecodeError)
"""Raised where SQLite holds something else than vectors and projections."""


def verify(folder: Path) -> Report:
    """Checks SQLite by itself, then each snapshot against it.

    Raises:
        FailedPreconditionError: there is no data directory of this version.
        OSError, sqlite3.Error: it cannot be read.
    """
    report = Report("collections", "items", "vectors", "texts", "snapshots")
    with (
        contextlib.closing(store.open_to_read(folder)) as connection,
        reporting_damage(connection, report),
    ):
        _check_all(connection, folder, report)
    return report


def _check_all(connection: sqlite3.Connection, folder: Path, report: Report) -> None:
    with read_transaction(connection):
        _check_file(connection, report)
        _check_items(connection, report)
        _check_attributes(connection, report)
        _check_vectors(connection, report)
        snapshots = Snapshots(folder / "snapshots", store.meta(connection)["store"])
    for path in sorted(snapshots.paths()):
        try:
            snapshot = snapshots.read(path)
        except (DamagedError, OSError) as error:
            if path.exists():  # else a newer one has taken its place
                report.add(f"snapshot {path.name}", error)
            continue
        report.seen["snapshots"] += 1
        # Begun after it was read, the transaction sees all that is in it.
        with read_transaction(connection):
            try:
                _check_snapshot(connection, snapshot, snapshots, report)
            except UNREADABLE as error:  # that is among the findings already
                report.add(f"snapshot {path.name} cannot be compared", error)
        _check_accelerator(snapshot, report)


# --- SQLite --------------------------------------------------------------------------------------


def _check_file(connection: sqlite3.Connection, report: Report) -> None:
    check_sqlite(connection, report)
    current = store.current_seq(connection)
    for table in ("collections", "items", "vectors", "tombstones"):
        query = f"SELECT count(*) FROM {table} WHERE seq > ?"
        if (count := connection.execute(query, (current,)).fetchone()[0]) > 0:
            report.add(f"rows of {table} that are ahead of the store's seq {current}", count)


def _check_items(connection: sqlite3.Connection, report: Report) -> None:
    """Texts, their hashes, vectors and tombstones."""
    for number, id, text, key in connection.execute("SELECT collection, id, text, hash FROM items"):
        report.seen["items"] += 1
        if key != (bytes.fromhex(text_id(text)) if text.strip() else None):
            report.add("item whose hash is not its text's", f"collection {number}, {id!r}")
    pairs = {
        "item whose text has no vector": "SELECT collection, id FROM items WHERE hash IS NOT NULL "
        "AND NOT EXISTS (SELECT 1 FROM texts WHERE texts.hash = items.hash)",
        "item that has a tombstone": "SELECT collection, id FROM items JOIN tombstones "
        "USING (collection, id)",
        "vector that has a tombstone": "SELECT collection, id FROM vectors JOIN tombstones "
        "USING (collection, id)",
        "residual without an item": "SELECT vectors.collection, vectors.id FROM vectors "
        "JOIN collections ON collections.number = vectors.collection "
        "WHERE collections.source IS NOT NULL AND NOT EXISTS (SELECT 1 FROM items "
        "WHERE items.collection = collections.source AND items.id = vectors.id)",
        "item in a collection without texts": "SELECT collection, id FROM items "
        f"JOIN collections ON number = collection WHERE kind != {pb.COLLECTION_KIND_TEXT}",
        "vector in a text collection": "SELECT collection, id FROM vectors "
        f"JOIN collections ON number = collection WHERE kind = {pb.COLLECTION_KIND_TEXT}",
    }
    for kind, query in pairs.items():
        for number, id in connection.execute(query):
            report.add(kind, f"collection {number}, {id!r}")
    unused = connection.execute(
        "SELECT hex(hash) FROM texts "
        "WHERE NOT EXISTS (SELECT 1 FROM items WHERE items.hash = texts.hash)"
    )
    report.all("text vector without an item", (key for (key,) in unused))


def _check_attributes(connection: sqlite3.Connection, report: Report) -> None:
    """The attributes that conditions find, against those in the items."""
    for value, as_number in connection.execute("SELECT value, as_number FROM attribute_values"):
        if as_number != number_of(value):
            report.add("attribute that reads as another number", repr(value))
    count = 0
    for number, id, found in connection.execute("SELECT collection, id, attributes FROM items"):
        try:
            pairs = list(json.loads(found).items())
        except (ValueError, TypeError, AttributeError):
            report.add("item whose attributes are no JSON object", f"collection {number}, {id!r}")
            continue
        for key, value in pairs:
            if attributes.has(connection, number, id, (key, value)):
                count += 1
            else:
                report.add("attribute that no condition finds", f"collection {number}, {id!r}")
    (rows,) = connection.execute("SELECT count(*) FROM item_attributes").fetchone()
    if rows > count:  # each of an item is found by one row
        report.add("attributes without an item", rows - count)


def _check_vectors(connection: sqlite3.Connection, report: Report) -> None:
    """Sizes and numbers of vectors, definitions of derived collections."""
    encoder_cols = 0
    for row in store.collections(connection):
        report.seen["collections"] += 1
        where = f"collection {row.name}"
        if row.kind == pb.COLLECTION_KIND_TEXT:
            encoder_cols = row.cols
            continue
        if row.kind == pb.COLLECTION_KIND_DERIVED:
            try:
                _projection(connection, row)
            except UNREADABLE as error:
                report.add(f"{where}: its definition is bad", error)
        found = connection.execute(
            "SELECT id, vector FROM vectors WHERE collection = ?", (row.number,)
        )
        report.seen["vectors"] += _check_blobs(found, row.cols, where, report)
    texts = connection.execute("SELECT hex(hash), vector FROM texts")
    report.seen["texts"] += _check_blobs(texts, encoder_cols, "text", report)


def _check_blobs(found: Iterator[tuple[str, bytes]], cols: int, where: str, report: Report) -> int:
    """How many vectors there were."""
    count = 0
    while some := list(islice(found, TOGETHER)):
        count += len(some)
        whole = [(id, blob) for id, blob in some if len(blob) == 4 * cols]
        wrong = {id for id, _ in some} - {id for id, _ in whole}
        report.all(f"{where}: a vector has not {4 * cols} bytes", sorted(wrong))
        if whole:
            block = np.frombuffer(b"".join(blob for _, blob in whole), np.float32)
            bad = np.flatnonzero(~np.isfinite(block.reshape(-1, cols)).all(axis=1))
            report.all(f"{where}: a vector is not finite", (whole[place][0] for place in bad))
    return count


def _projection(connection: sqlite3.Connection, row: CollectionRow) -> Projection:
    cols = {one.number: one.cols for one in store.collections(connection)}
    return from_derived(store.definition(connection, row.number), cols[row.source or 0])


# --- snapshots -----------------------------------------------------------------------------------


def _check_snapshot(
    connection: sqlite3.Connection, snapshot: Snapshot, snapshots: Snapshots, report: Report
) -> None:
    """Rows of a snapshot against SQLite, and the other way round."""
    manifest, frozen = snapshot.manifest, snapshot.frozen
    row = next(
        (one for one in store.collections(connection) if one.number == manifest.collection), None
    )
    where = f"snapshot {snapshot.path.name} of {manifest.name}"
    fault = snapshots.fault(manifest, row, store.current_seq(connection))
    if row is None or fault is not None:
        if row is not None:  # else it was deleted; the embedder removes its snapshots
            report.add(where, fault)
        return
    alive = frozen.seqs[: manifest.slots] >= 0
    slots = {frozen.ids[slot]: slot for slot in np.flatnonzero(alive).tolist()}
    for ids, vectors, seqs in _current(connection, row):
        compared: list[tuple[int, int]] = []
        for place, (id, seq) in enumerate(zip(ids, seqs.tolist(), strict=True)):
            slot = slots.pop(id, None)
            if seq > manifest.seq:
                continue  # replayed at the next start, whatever the snapshot has
            if slot is None:
                report.add(f"{where} lacks an id", repr(id))
            elif frozen.seqs[slot] != seq:
                report.add(f"{where} has another change of an id", repr(id))
            else:
                compared.append((place, slot))
        places = np.array(compared, np.int64).reshape(-1, 2)
        ours, theirs = vectors[places[:, 0]], frozen.rows[places[:, 1]]
        if row.source is None:
            same = (ours == theirs).all(axis=1)
        else:
            most = np.abs(ours).max(axis=1, keepdims=True)
            same = (np.abs(ours - theirs) <= CLOSE * np.maximum(1, most)).all(axis=1)
        wrong = (ids[place] for place in places[~same, 0])
        report.all(f"{where} has another vector of an id", map(repr, wrong))
    buried = records.tombstones(connection, row.source or row.number)
    for id in slots:
        if buried.get(id, -1) <= manifest.seq:
            report.add(f"{where} has an id that SQLite has not", repr(id))


def _current(
    connection: sqlite3.Connection, row: CollectionRow
) -> Iterator[tuple[list[str], Vectors, NDArray[np.int64]]]:
    """What a collection's vectors are by SQLite alone, some at a time."""
    if row.source is None:
        found = records.changed_vectors(connection, row.number, row.kind, -1)
        while some := list(islice(found, TOGETHER)):
            vectors = records.stacked([blob for _, blob, _ in some], row.cols)
            yield [id for id, *_ in some], vectors, np.array([seq for *_, seq in some], np.int64)
        return
    projection = _projection(connection, row)
    cols = projection.layers[0].weight.shape[1]
    changed = records.changed_derived(connection, row.number, row.source, -1)
    while group := list(islice(changed, TOGETHER)):
        ids = [id for id, *_ in group]
        query = (
            "SELECT items.id, texts.vector FROM items JOIN texts ON texts.hash = items.hash "
            f"WHERE items.collection = {row.source} AND items.id"
        )
        known = dict(select_in(connection, query, ids))
        vectors = projection.apply(
            records.stacked([known.get(id) for id in ids], cols),
            [text for _, text, _, _ in group],
            records.stacked([blob for _, _, blob, _ in group], row.cols),
        )
        seqs = np.maximum(np.array([seq for *_, seq in group], np.int64), row.created_seq)
        yield ids, vectors, seqs


def _check_accelerator(snapshot: Snapshot, report: Report) -> None:
    """Whether its accelerator finds the rows that it should have."""
    accelerator = snapshot.frozen.accelerator
    if accelerator is None or not accelerator.covered:
        return
    recall = _recall(snapshot.frozen, accelerator.covered)
    if recall < LEAST_RECALL / math.sqrt(accelerator.covered):
        where = f"snapshot {snapshot.path.name} of {snapshot.manifest.name}"
        report.add(f"{where}: its accelerator is none of its vectors; recall@10", f"{recall:.2f}")


def _recall(frozen: Frozen, covered: int) -> float:
    """Recall@10 of some of the accelerator's own vectors against exact search."""
    rows = frozen.rows[: len(frozen.ids)]
    alive = np.flatnonzero(frozen.seqs[: len(rows)] >= 0)
    own = alive[alive < covered]
    if not len(own):
        return 1.0
    queries = rows[own[np.linspace(0, len(own) - 1, SAMPLED).astype(np.int64)]]
    scores = (queries @ rows.T)[:, alive]
    k = min(10, len(alive))
    least = np.partition(scores, -k, axis=1)[:, -k]
    # By score: equal vectors may stand for one another.
    least -= 1e-5 * np.abs(least)
    index = VectorIndex.restored(rows.shape[1], DEFAULT_OPTIONS, frozen)
    found = [hits.scores for hits in index.search(queries, k)]
    return float(np.mean([(one >= low).sum() / k for one, low in zip(found, least, strict=True)]))

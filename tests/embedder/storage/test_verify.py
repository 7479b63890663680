"""The consistency check finds each kind of damage, and nothing where there is none."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedder.__main__ import main
from embedder.search.accelerators import LEAST
from embedder.search.index import IndexOptions, VectorIndex
from embedder.storage.snapshot import Snapshots
from embedder.storage.verify import verify
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows
from foretell.vectors import to_block

COLS = 12
COUNT = LEAST


def put(name: str, ids: list[str], seed: int = 0) -> pb.PutVectorsRequest:
    rows = np.random.default_rng(seed).standard_normal((len(ids), 5)).astype(np.float32)
    return pb.PutVectorsRequest(collection=name, ids=ids, vectors=to_block(rows))


def upsert(**texts: str) -> pb.UpsertItemsRequest:
    return pb.UpsertItemsRequest(items=[pb.Item(id=id, text=text) for id, text in texts.items()])


@pytest.fixture
async def data(open_collections: Callable[[], Any], tmp_path: Path) -> Path:
    """A data directory with snapshots of everything, and changes since."""
    opened = open_collections()
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, COLS)).astype(np.float32)
    terms = TermRows(("red", "blue"), np.ones(2, np.float32), weight[:2, :5])
    projection = Projection((AffineLayer(weight, np.ones(5, np.float32)),), terms=terms)
    create, writer = opened.collections.create, opened.writer
    await create(pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=5)))
    await create(pb.CreateCollectionRequest(name="derived", derived=projection.to_derived("items")))
    await writer.upsert_items(upsert(a="red", b="blue", c="red", d="", e="a red one", f="blue"))
    red = pb.Item(id="a", text="red", attributes={"colour": "red", 'a "key"': "1"})
    await writer.upsert_items(pb.UpsertItemsRequest(items=[red]))
    await writer.put_vectors(put("derived", ["a", "b"]))
    await writer.put_vectors(put("given", [f"id {i}" for i in range(COUNT)]))
    await writer.delete_items(pb.DeleteItemsRequest(ids=["f"]))
    for one in opened.collections.all():
        seq = one.seq
        opened.collections.snapshots.write(one.row, seq, one.index.frozen())
    await writer.upsert_items(upsert(b="green", g="new"))
    await writer.put_vectors(put("derived", ["c"], 1))
    await writer.put_vectors(put("given", ["id 0", "another"], 2))
    await writer.delete_items(pb.DeleteItemsRequest(ids=["e"]))
    await writer.delete_items(pb.DeleteItemsRequest(collection="given", ids=["id 1"]))
    opened.close()
    return tmp_path / "data"


def test_nothing_is_found_where_nothing_is_wrong(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert main(["verify", "--data-dir", str(data)]) == 0
    said = capsys.readouterr().out
    assert (
        f"4 collections, 5 items, {COUNT + 3:,} vectors, 3 texts, 4 snapshots; findings: 0" in said
    )
    after = {path: path.read_bytes() for path in before}
    assert after == before


GIVEN = "collection = (SELECT number FROM collections WHERE name = 'given')"
DERIVED = "collection = (SELECT number FROM collections WHERE name = 'derived')"
INFINITE = np.full(5, np.inf, np.float32).tobytes().hex()
IN_SQLITE = {
    "item whose hash is not its text's": "UPDATE items SET text = 'black' WHERE id = 'a'",
    "collection 1, 'b'": "UPDATE items SET text = CAST(x'ff' AS TEXT) WHERE id = 'b'",
    "item whose text has no vector": "DELETE FROM texts WHERE hash = "
    "(SELECT hash FROM items WHERE id = 'a')",
    "text vector without an item": f"INSERT INTO texts VALUES (x'00', x'{'00' * 48}')",
    "text: a vector has not 48 bytes": "UPDATE texts SET vector = x'00'",
    "text: a vector is not finite": f"UPDATE texts SET vector = x'{'ff' * 48}'",
    "collection given: a vector has not 20 bytes": f"UPDATE vectors SET vector = x'' WHERE {GIVEN}",
    "collection derived: a vector is not finite": f"UPDATE vectors SET vector = x'{INFINITE}' "
    f"WHERE {DERIVED}",
    "item that has a tombstone": "INSERT INTO tombstones "
    "SELECT collection, id, seq FROM items WHERE id = 'a'",
    "vector that has a tombstone": "INSERT INTO tombstones "
    "SELECT collection, id, seq FROM vectors WHERE id = 'id 5'",
    "item whose attributes are no JSON": "UPDATE items SET attributes = '{' WHERE id = 'a'",
    "item whose attributes are no JSON object": "UPDATE items SET attributes = '[]'",
    "residual without an item": "DELETE FROM items WHERE id = 'a'",
    "item in a collection without texts": f"UPDATE items SET {GIVEN} WHERE id = 'a'",
    "vector in a text collection": "UPDATE vectors SET collection = "
    "(SELECT number FROM collections WHERE name = 'items') WHERE id = 'id 5'",
    "row of items whose texts is missing": "UPDATE items SET hash = x'00' WHERE id = 'a'",
    "rows of vectors that are ahead": "UPDATE vectors SET seq = 1000 WHERE id = 'id 5'",
    "derived: its definition is bad": "UPDATE definitions SET definition = x''",
    "derived: its definition is bad: Error": "UPDATE definitions SET definition = x'ff'",
    "row of items whose collections is missing": "DELETE FROM collections WHERE name = 'items'",
    "of given has another vector of an id: 'id 5'": "UPDATE vectors "
    "SET vector = zeroblob(20) WHERE id = 'id 5'",
    "of given lacks an id: 'id 9'": "UPDATE vectors SET id = 'id 9', seq = 5 WHERE id = 'another'",
    "of given has an id that SQLite has not: 'id 5'": "DELETE FROM vectors WHERE id = 'id 5'",
    "of given has another change of an id: 'id 5'": "UPDATE vectors SET seq = 4 WHERE id = 'id 5'",
    "of items has another vector of an id: 'a'": "UPDATE texts SET vector = zeroblob(48) "
    "WHERE hash = (SELECT hash FROM items WHERE id = 'a')",
    "of derived has another vector of an id: 'a'": "UPDATE vectors SET vector = zeroblob(20) "
    f"WHERE id = 'a' AND {DERIVED}",
    "of derived has an id that SQLite has not: 'a'": "DELETE FROM items WHERE id = 'a'",
    "it is of another store": "UPDATE meta SET value = 'another' WHERE key = 'store'",
}


@pytest.mark.parametrize("finding", IN_SQLITE)
def test_damage_in_sqlite_is_found(
    data: Path, capsys: pytest.CaptureFixture[str], finding: str
) -> None:
    connection = sqlite3.connect(data / "embedder.sqlite")
    statement = IN_SQLITE[finding]
    if "id 9'" in statement:
        connection.execute("DELETE FROM vectors WHERE id = 'id 9'")
        statement = statement.replace("id 9", "id 9999")
        finding = finding.replace("id 9", "id 9999")
    connection.execute(statement)
    connection.commit()
    connection.close()
    assert main(["verify", "--data-dir", str(data)]) == 1
    said = capsys.readouterr().out
    assert finding in said, said


def test_a_damaged_page_is_found(data: Path) -> None:
    connection = sqlite3.connect(data / "embedder.sqlite")
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'items_hash'"
    (page,) = connection.execute(query).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    path = data / "embedder.sqlite"
    whole = bytearray(path.read_bytes())
    end = page * size
    whole[end - 60 : end] = bytes(60)
    path.write_bytes(whole)
    assert any(finding.startswith("SQLite file") for finding in verify(data).findings)


def test_a_table_that_cannot_be_read_is_found(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connection = sqlite3.connect(data / "embedder.sqlite")
    query = "SELECT rootpage FROM sqlite_master WHERE name = 'items'"
    (page,) = connection.execute(query).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    path = data / "embedder.sqlite"
    whole = bytearray(path.read_bytes())
    whole[(page - 1) * size : page * size] = b"\xff" * size
    path.write_bytes(whole)
    assert main(["verify", "--data-dir", str(data)]) == 1
    assert "SQLite file that cannot be read to its end" in capsys.readouterr().out


async def test_what_is_replayed_need_not_agree(
    open_collections: Callable[[], Any], data: Path
) -> None:
    opened = open_collections()
    given = opened.collections.get("given")
    seq = given.seq
    await opened.writer.put_vectors(put("given", ["id 2"], 3))
    frozen = given.index.frozen()
    # As of a derived collection that was made in one commit with a later change of its source.
    rows = frozen.rows.copy()
    rows[-1] = 0
    mixed = type(frozen)(frozen.ids, frozen.seqs, rows, None)
    opened.collections.snapshots.write(given.row, seq, mixed)
    assert verify(data).findings == []
    expected = given.index.get(["id 2"])["id 2"]
    opened.close()
    found = open_collections().collections.get("given").index.get(["id 2"])["id 2"]
    np.testing.assert_array_equal(found, expected)


async def test_large_numbers_that_cancel_one_another_are_no_finding(
    open_collections: Callable[[], Any], data: Path
) -> None:
    opened = open_collections()
    weight = 1e6 * np.random.default_rng(2).standard_normal((2_000, COLS)).astype(np.float32)
    projection = Projection((AffineLayer(weight, np.zeros(len(weight), np.float32)),))
    await opened.collections.create(
        pb.CreateCollectionRequest(name="large", derived=projection.to_derived("items"))
    )
    for number in range(40):
        await opened.writer.upsert_items(upsert(**{f"n{number}": f"text {number}"}))
    large = opened.collections.get("large")
    opened.collections.snapshots.write(large.row, large.seq, large.index.frozen())
    opened.close()
    assert verify(data).findings == []


def test_a_damaged_snapshot_is_found(data: Path) -> None:
    path = sorted((data / "snapshots").iterdir())[0] / "ids.txt"
    path.write_bytes(path.read_bytes() + b"x")
    (finding,) = verify(data).findings
    assert "ids.txt has" in finding


def test_an_accelerator_of_other_vectors_is_found(
    open_collections: Callable[[], Any], data: Path
) -> None:
    opened = open_collections()
    given = opened.collections.get("given")
    rows = np.random.default_rng(5).standard_normal((len(given.index) + 2, 5)).astype(np.float32)
    other = VectorIndex(5, IndexOptions(approximate_from=COUNT))
    other.put([f"id {i}" for i in range(len(rows))], rows, 1)
    while other.maintain():
        pass
    frozen, theirs = given.index.frozen(), other.frozen()
    assert theirs.accelerator is not None
    for accelerator, count in ((theirs.accelerator, 1), (None, 0)):
        mixed = type(frozen)(frozen.ids, frozen.seqs, frozen.rows, accelerator)
        opened.collections.snapshots.write(given.row, given.seq, mixed)
        found = [one for one in verify(data).findings if "none of its vectors" in one]
        assert len(found) == count, found
    opened.close()


async def test_an_accelerator_that_finds_few_of_random_vectors_is_no_finding(
    open_collections: Callable[[], Any], data: Path
) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="random", vector=pb.VectorCollection(cols=64))
    await opened.collections.create(create)
    ids = [f"id {i}" for i in range(4 * COUNT)]
    rows = np.random.default_rng(6).random((len(ids), 64), np.float32)
    request = pb.PutVectorsRequest(collection="random", ids=ids, vectors=to_block(rows))
    await opened.writer.put_vectors(request)
    made = opened.collections.get("random")
    index = VectorIndex(64, IndexOptions(approximate_from=COUNT))
    index.put(ids, rows, made.seq)
    while index.maintain():
        pass
    assert index.name != "exact"
    opened.collections.snapshots.write(made.row, made.seq, index.frozen())
    opened.close()
    assert verify(data).findings == []


def test_of_many_findings_some_are_shown(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connection = sqlite3.connect(data / "embedder.sqlite")
    connection.execute(f"UPDATE vectors SET vector = zeroblob(20) WHERE {GIVEN}")
    connection.commit()
    connection.close()
    assert main(["verify", "--data-dir", str(data)]) == 1
    *lines, more, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert more.endswith("and more")
    assert f"findings: {COUNT - 2:,}" in summary


def test_it_runs_beside_an_embedder(open_collections: Callable[[], Any], data: Path) -> None:
    opened = open_collections()
    assert verify(data).findings == []
    assert Snapshots(data / "snapshots", opened.store.id).paths()


def test_without_a_data_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--data-dir", str(tmp_path / "none")]) == 2
    assert "there is no" in capsys.readouterr().err

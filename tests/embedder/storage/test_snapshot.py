"""Snapshots: what was written comes back, and what is damaged counts as missing."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedder.search import accelerators
from embedder.search.accelerators import KINDS, LEAST
from embedder.search.index import Frozen, IndexOptions, VectorIndex
from embedder.storage import snapshot
from embedder.storage.backup import back_up
from embedder.storage.snapshot import Snapshots
from embedder.storage.store import FILE, CollectionRow
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.vectors import to_block
from serving import files
from serving.files import HashedFile

COUNT = LEAST
"""Enough for an accelerator."""

SEQ = COUNT + 1
"""Of what `filled(COUNT)` has."""

ROW = CollectionRow(3, "given", pb.COLLECTION_KIND_VECTOR, None, 16, created_seq=1, seq=1)
APPROXIMATE = IndexOptions(approximate_from=COUNT)

Ids = st.lists(st.sampled_from([f"id {i}" for i in range(12)] + ["é", "日本"]), unique=True)
Change = st.tuples(st.sampled_from(["put", "remove"]), Ids)


def filled(count: int, options: IndexOptions = APPROXIMATE) -> VectorIndex:
    index = VectorIndex(ROW.cols, options)
    rows = np.random.default_rng(count).standard_normal((count, ROW.cols)).astype(np.float32)
    index.put([f"id {i}" for i in range(count)], rows, np.arange(count) + 2)
    while index.maintain():
        pass
    return index


@cache
def frozen(count: int) -> Frozen:
    return filled(count).frozen()


def content(index: VectorIndex) -> dict[str, tuple[bytes, int]]:
    ids, seqs = index.changed_after(-1)
    rows = index.get(ids)
    return {id: (rows[id].tobytes(), int(seq)) for id, seq in zip(ids, seqs, strict=True)}


def loaded(snapshots: Snapshots, seq: int = SEQ + 1) -> VectorIndex | None:
    found = snapshots.load(ROW, seq)
    return None if found is None else VectorIndex.restored(ROW.cols, APPROXIMATE, found.frozen)


@given(st.lists(Change, max_size=8), st.lists(Change, max_size=3))
@settings(max_examples=40, deadline=None)
def test_what_was_written_comes_back(
    before: list[tuple[str, list[str]]], after: list[tuple[str, list[str]]]
) -> None:
    index = VectorIndex(ROW.cols)
    rng = np.random.default_rng(1)

    def change(seq: int, kind: str, ids: list[str], *indexes: VectorIndex) -> None:
        rows = rng.standard_normal((len(ids), ROW.cols)).astype(np.float32)
        for one in indexes:
            one.put(ids, rows, seq) if kind == "put" else one.remove(ids)

    for seq, (kind, ids) in enumerate(before):
        change(seq, kind, ids, index)
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder) / "snapshots", "a store")
        snapshots.write(ROW, 10, index.frozen())
        again = loaded(snapshots)
        assert again is not None
        assert content(again) == content(index)
        # It goes on as the one did that it was made of.
        for seq, (kind, ids) in enumerate(after, 20):
            change(seq, kind, ids, index, again)
        assert content(again) == content(index)


def test_an_accelerator_comes_back(tmp_path: Path) -> None:
    index = filled(COUNT)
    assert index.name != "exact"
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, SEQ, index.frozen())
    again = loaded(snapshots)
    assert again is not None
    assert again.name == index.name
    while again.maintain():  # measures it again
        pass
    queries = np.random.default_rng(0).standard_normal((5, ROW.cols)).astype(np.float32)
    found = [hits.ids for hits in again.search(queries, 10)]
    assert found == [hits.ids for hits in index.search(queries, 10)]


def test_an_accelerator_of_a_machine_with_a_gpu_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled(COUNT)
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, SEQ, index.frozen())
    monkeypatch.setitem(KINDS, index.name, replace(KINDS[index.name], on_gpu=True))
    monkeypatch.setattr(accelerators, "has_gpu", lambda: False)
    again = loaded(snapshots)
    assert again is not None
    assert again.name == "exact"
    assert content(again) == content(index)


def manifest_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "manifest.json").read_text())["content"]
    return content


def signed(path: Path, **changes: Any) -> None:
    """Another manifest whose digest is right."""
    content = manifest_of(path) | changes
    (path / "manifest.json").unlink()
    files.write_signed(path / "manifest.json", content)


def flip(path: Path, place: float) -> None:
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 4
    path.write_bytes(whole)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FILES = ["rows.f32", "seqs.i64", "ids.txt", "accelerator.faiss", "manifest.json"]
Harm = Callable[[Path], object]


def damage_of_files() -> Iterator[tuple[str, tuple[Harm, str]]]:
    """By what it is: what does it to a snapshot, and what must be said of it."""
    for name in FILES:
        yield f"{name} is gone", (partial(within, name, Path.unlink), "is missing")
        yield f"{name} is cut", (partial(within, name, cut), "")
        for place in (0, 0.3, 0.5, 0.999):
            harm = partial(within, name, partial(flip, place=place))
            yield f"{name} has a bit flipped at {place}", (harm, "")


def within(name: str, harm: Harm, path: Path) -> None:
    harm(path / name)


DAMAGE: dict[str, tuple[Harm, str]] = {
    **dict(damage_of_files()),
    "another seq": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace(f'"seq": {SEQ}', f'"seq": {SEQ - 1}')
        ),
        "sha256",
    ),
    "other columns": (lambda p: signed(p, cols=5), "5 columns"),
    "ahead": (lambda p: signed(p, seq=SEQ + 2), f"seq {SEQ + 2}"),
    "before the collection": (lambda p: signed(p, seq=0), "seq 0"),
    "another store": (lambda p: signed(p, store="another"), "another store"),
    "another collection": (lambda p: signed(p, collection=4), "another store or collection"),
    "another format": (lambda p: signed(p, format=2), "format 2"),
    "other slots": (lambda p: signed(p, slots=COUNT - 1), ""),
    "other vectors": (lambda p: signed(p, vectors=COUNT - 1), "as many vectors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, SEQ, frozen(COUNT))
    (path,) = snapshots.paths()
    assert loaded(snapshots) is not None
    harm, reason = DAMAGE[damage]
    harm(path)
    with caplog.at_level(logging.WARNING):
        assert loaded(snapshots) is None
    assert reason in caplog.text
    assert str(path) in caplog.text


def test_an_older_good_one_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, 61, frozen(60))
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "_delete", lambda path: None)  # it was killed before it did that
        snapshots.write(ROW, 71, frozen(70))
    older, newer = sorted(snapshots.paths())
    flip(newer / "rows.f32", 0.5)
    found = snapshots.load(ROW, 1_000)
    assert found is not None
    assert (found.path, found.manifest.seq) == (older, 61)
    snapshots.write(ROW, 81, frozen(80))
    assert len(snapshots.paths()) == 1


def test_files_are_synced_before_the_snapshot_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def note_rename(source: Any, target: Any, **options: Any) -> None:
        events.append(f"rename {Path(source).name} {Path(target).name}")
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder = tmp_path / "snapshots"
    Snapshots(folder, "a store").write(ROW, SEQ, frozen(COUNT))
    assert events == [
        "sync rows.f32",
        "sync seqs.i64",
        "sync ids.txt",
        "sync accelerator.faiss",
        "sync 3-1.new",
        "sync manifest.json",
        "sync 3-1.new",
        "rename 3-1.new 3-1",
        "sync snapshots",
    ]


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, SEQ, frozen(COUNT))
    real = HashedFile.__init__

    def full(self: HashedFile, path: Path) -> None:
        real(self, path)
        if path.name == name:
            self._file.close()
            monkeypatch.setattr(self, "_file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115, PTH123

    monkeypatch.setattr(HashedFile, "__init__", full)
    with pytest.raises(OSError, match="No space left"):
        snapshots.write(ROW, SEQ + 1, frozen(COUNT))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["3-1"]
    assert loaded(snapshots) is not None


def test_what_is_left_over_goes(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, "a store")
    snapshots.write(ROW, 61, frozen(60))
    snapshots.write(replace(ROW, number=4), 61, frozen(60))
    (tmp_path / "3-2.new").mkdir()
    (tmp_path / "3-0.old").mkdir()
    snapshots.keep_only([3])
    assert [path.name for path in tmp_path.iterdir()] == ["3-1"]


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, "a store")
    index = filled(COUNT)
    index.remove(["id 7"])
    snapshots.write(ROW, SEQ, index.frozen())
    found = snapshots.load(ROW, SEQ)
    assert found is not None
    assert asdict(found.manifest) == manifest_of(found.path)
    assert (found.manifest.slots, found.manifest.vectors) == (COUNT, COUNT - 1)
    for name, file in found.manifest.files.items():
        assert file == files.file_digest(found.path / name)


# --- with the store ------------------------------------------------------------------------------


def save(opened: Any) -> None:
    """Snapshots of all collections, as the upkeep writes them."""
    for one in opened.collections.all():
        seq = one.seq
        opened.collections.snapshots.write(one.row, seq, one.index.frozen())


async def put(opened: Any, rows: dict[str, list[float]]) -> None:
    block = to_block(np.array(list(rows.values()), np.float32))
    await opened.writer.put_vectors(
        pb.PutVectorsRequest(collection="given", ids=list(rows), vectors=block)
    )


async def test_changes_between_the_seq_and_the_rows_are_replayed(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=2))
    await opened.collections.create(create)
    await put(opened, {"a": [1, 1], "b": [2, 2], "c": [3, 3], "d": [4, 4]})
    given = opened.collections.get("given")
    seq = given.seq
    delete = pb.DeleteItemsRequest(collection="given", ids=["a", "b"])
    await opened.writer.delete_items(delete)
    await put(opened, {"b": [5, 5], "c": [6, 6]})
    frozen = given.index.frozen()
    await put(opened, {"a": [7, 7], "e": [8, 8]})
    await opened.writer.delete_items(pb.DeleteItemsRequest(collection="given", ids=["d"]))
    opened.collections.snapshots.write(given.row, seq, frozen)
    expected = content(given.index)
    opened.close()
    again = open_collections().collections.get("given")
    assert content(again.index) == expected
    assert again.tombstones == {"d": given.seq}
    assert again.seq == given.seq
    assert 0 < again.changes < 10


async def test_a_damaged_snapshot_is_built_anew(open_collections: Callable[[], Any]) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=2))
    await opened.collections.create(create)
    await put(opened, {"a": [1, 1], "b": [2, 2]})
    save(opened)
    expected = content(opened.collections.get("given").index)
    path = opened.collections.snapshots._of(opened.collections.get("given").row.number)[0]
    opened.close()
    flip(path / "rows.f32", 0.5)
    assert content(open_collections().collections.get("given").index) == expected


async def test_a_snapshot_of_a_state_that_was_put_back_never_comes_back(
    open_collections: Callable[[], Any], tmp_path: Path
) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=2))
    await opened.collections.create(create)
    await put(opened, {"a": [1, 1]})
    back_up(tmp_path / "data", tmp_path / "backup")
    await put(opened, {"b": [2, 2]})
    save(opened)
    opened.close()
    shutil.copy(tmp_path / "backup" / FILE, tmp_path / "data" / FILE)
    opened = open_collections()
    await put(opened, {"c": [3, 3]})  # with the seq that b had
    expected = content(opened.collections.get("given").index)
    assert expected.keys() == {"a", "c"}
    opened.close()
    assert content(open_collections().collections.get("given").index) == expected


async def test_a_deleted_collection_takes_its_snapshot_with_it(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=2))
    await opened.collections.create(create)
    await put(opened, {"a": [1, 1]})
    save(opened)
    await opened.collections.delete(pb.DeleteCollectionRequest(name="given"))
    await opened.collections.create(create)
    opened.close()
    opened = open_collections()
    assert len(opened.collections.get("given").index) == 0
    assert len(opened.collections.snapshots.paths()) == 2  # of the built-in ones

"""WatchItems' domain: whoever applies all messages has what the collection has."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from embedder.storage import watch as watch_module
from embedder.storage.watch import Changes, Watches
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import InvalidArgumentError, NotFoundError, UnavailableError
from foretell.projection import AffineLayer, Projection
from foretell.vectors import Vectors, to_block

COLS = 12


class Follower:
    """Applies messages as a caller would."""

    def __init__(self) -> None:
        self.rows: dict[str, Vectors] = {}
        self.seq = 0
        self.messages: list[Changes] = []

    def apply(self, changes: Changes) -> None:
        assert changes.seq >= self.seq
        self.messages.append(changes)
        self.rows.update(zip(changes.ids, changes.vectors, strict=True))
        for id in changes.deleted_ids:
            self.rows.pop(id, None)
        self.seq = changes.seq

    async def catch_up(self, stream: AsyncIterator[Changes], seq: int) -> None:
        """Reads until everything up to `seq` is known."""
        while self.seq < seq or not self.messages or not self.messages[-1].caught_up:
            self.apply(await asyncio.wait_for(anext(stream), 30))

    def agrees(self, collections: Any, name: str) -> None:
        index = collections.get(name).index
        expected = index.get(list(self.rows))
        assert len(index) == len(self.rows) == len(expected)
        for id, row in expected.items():
            assert np.array_equal(row, self.rows[id])


async def upsert(opened: Any, texts: dict[str, str]) -> int:
    items = [pb.Item(id=id, text=text) for id, text in texts.items()]
    response = await opened.writer.upsert_items(pb.UpsertItemsRequest(items=items))
    return int(response.seq)


async def delete(opened: Any, *ids: str) -> int:
    response = await opened.writer.delete_items(pb.DeleteItemsRequest(ids=ids))
    return int(response.seq)


async def derive(collections: Any, name: str = "d", scale: float = 1.0) -> None:
    layer = AffineLayer(np.eye(COLS, dtype=np.float32)[:4] * scale, np.zeros(4, np.float32))
    definition = pb.DerivedCollection(source="items", layers=Projection((layer,)).to_layers())
    await collections.create(pb.CreateCollectionRequest(name=name, derived=definition))


@pytest.fixture
def opened(open_collections: Callable[[], Any]) -> Any:
    return open_collections()


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three vectors of `items` a message, nine of the derived collection."""
    monkeypatch.setattr(watch_module, "CHUNK_BYTES", 3 * 4 * COLS)


async def test_an_empty_collection_is_caught_up_at_once(opened: Any) -> None:
    follower = Follower()
    stream = Watches(opened.collections).watch("", 0)
    await follower.catch_up(stream, opened.collections.applied_seq)
    assert len(follower.messages) == 1
    assert follower.rows == {}
    assert follower.seq == opened.collections.applied_seq


@pytest.mark.usefixtures("small_messages")
@pytest.mark.parametrize(("name", "expected"), [("items", 7), ("d", 3)])
async def test_catch_up_comes_in_small_messages_then_live(
    opened: Any, name: str, expected: int
) -> None:
    collections = opened.collections
    await derive(collections)
    await upsert(opened, {f"id {i:02}": f"text {i}" for i in range(20)})
    seq = await delete(opened, "id 03")
    follower = Follower()
    stream = Watches(collections).watch(name, 0)
    await follower.catch_up(stream, seq)
    assert len(follower.messages) == expected
    caught_up = [message.caught_up for message in follower.messages]
    assert caught_up == [False] * (expected - 1) + [True]
    follower.agrees(collections, name)
    seq = await upsert(opened, {"id 03": "back", "id 05": "changed"})
    await follower.catch_up(stream, seq)
    assert sorted(follower.messages[-1].ids) == ["id 03", "id 05"]
    seq = await delete(opened, "id 03", "id 07")
    await follower.catch_up(stream, seq)
    assert sorted(follower.messages[-1].deleted_ids) == ["id 03", "id 07"]
    follower.agrees(collections, name)


@pytest.mark.usefixtures("small_messages")
async def test_it_goes_on_from_any_message(opened: Any) -> None:
    """A caller that breaks off after any message and comes back misses nothing."""
    collections = opened.collections
    await upsert(opened, {f"a {i}": f"text {i}" for i in range(8)})
    await upsert(opened, {f"b {i}": f"text {i}" for i in range(8)})
    await delete(opened, "a 1", "b 2")
    watches = Watches(collections)
    complete = Follower()
    await complete.catch_up(watches.watch("items", 0), collections.applied_seq)
    for broken_after in range(1, len(complete.messages)):
        follower = Follower()
        stream = watches.watch("items", 0)
        for _ in range(broken_after):
            follower.apply(await anext(stream))
        await stream.aclose()  # type: ignore[attr-defined]
        seq = await upsert(opened, {f"b {broken_after}": f"changed {broken_after}"})
        seq = await delete(opened, f"a {broken_after}") or seq
        await follower.catch_up(watches.watch("items", follower.seq), seq)
        follower.agrees(collections, "items")


async def test_a_derived_collection_tells_of_source_and_residuals(opened: Any) -> None:
    collections = opened.collections
    await derive(collections)
    seq = await upsert(opened, {"a": "one", "b": "two"})
    follower = Follower()
    stream = Watches(collections).watch("d", 0)
    await follower.catch_up(stream, seq)
    row = np.full((1, 4), 2, np.float32)
    response = await opened.writer.put_vectors(
        pb.PutVectorsRequest(collection="d", ids=["a"], vectors=to_block(row))
    )
    await follower.catch_up(stream, response.seq)
    assert follower.messages[-1].ids == ["a"]
    follower.agrees(collections, "d")


async def test_a_collection_made_anew_is_told_entirely(opened: Any) -> None:
    """Its items are older than what the caller knows, but their vectors are not."""
    collections = opened.collections
    await derive(collections)
    seq = await upsert(opened, {"a": "one", "b": "two"})
    watches, follower = Watches(collections), Follower()
    await follower.catch_up(watches.watch("d", 0), seq)
    await collections.delete(pb.DeleteCollectionRequest(name="d"))
    await derive(collections, scale=3.0)
    await follower.catch_up(watches.watch("d", follower.seq), collections.applied_seq)
    follower.agrees(collections, "d")


async def test_deletions_are_told_after_a_restart(
    open_collections: Callable[[], Any],
) -> None:
    opened = open_collections()
    await derive(opened.collections)
    seq = await upsert(opened, {"a": "one", "b": "two"})
    follower = Follower()
    await follower.catch_up(Watches(opened.collections).watch("d", 0), seq)
    seq = await delete(opened, "a")
    opened.close()
    collections = open_collections().collections
    await follower.catch_up(Watches(collections).watch("d", follower.seq), seq)
    assert follower.messages[-1].deleted_ids == ["a"]
    follower.agrees(collections, "d")


async def test_under_writes_it_ends_up_equal(opened: Any) -> None:
    collections = opened.collections
    await derive(collections)
    watches = Watches(collections)
    followers = [(name, Follower(), watches.watch(name, 0)) for name in ("items", "d", "items")]

    async def write() -> int:
        seq = 0
        for i in range(60):
            seq = await upsert(opened, {f"id {j % 17}": f"{i} {j}" for j in range(i, i + 9)})
            if i % 3 == 0:
                seq = await delete(opened, f"id {i % 17}", f"id {i % 5}")
        return seq

    writing = asyncio.ensure_future(write())
    for _, follower, stream in followers:
        await follower.catch_up(stream, 40)
    seq = await writing
    for name, follower, stream in followers:
        await follower.catch_up(stream, seq)
        follower.agrees(collections, name)


async def test_it_ends_when_the_collection_is_deleted(opened: Any) -> None:
    collections = opened.collections
    await derive(collections)
    stream = Watches(collections).watch("d", 0)
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await collections.delete(pb.DeleteCollectionRequest(name="d"))
    with pytest.raises(NotFoundError):
        await asyncio.wait_for(waiting, 30)


async def test_it_ends_when_the_service_stops(opened: Any) -> None:
    watches = Watches(opened.collections)
    stream = watches.watch("items", 0)
    await anext(stream)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    watches.stop()
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(waiting, 30)
    with pytest.raises(UnavailableError):
        await anext(watches.watch("items", 0))
    assert watches._waiting == set()


async def test_what_cannot_be_watched(opened: Any) -> None:
    watches = Watches(opened.collections)
    with pytest.raises(NotFoundError):
        await anext(watches.watch("none", 0))
    with pytest.raises(InvalidArgumentError) as raised:
        await anext(watches.watch("items", 1_000))
    assert raised.value.reason == "SEQ_AHEAD"

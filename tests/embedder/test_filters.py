"""From the filters of a request to those of the index."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

from embedder.filters import filters_of
from embedder.search.index import VectorIndex
from embedder.storage.collection import Collection
from embedder.storage.collections import Collections
from embedder.storage.store import CollectionRow
from foretell.embedder.v1 import embedder_service_pb2 as pb

COLLECTION = Collection(
    CollectionRow(1, "items", pb.COLLECTION_KIND_TEXT, None, 2, 1, 1), VectorIndex(2)
)
WAIT_S = 60


class Store:
    """In place of the collections: `a` matches 1 and 2, all else nothing."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def matching(
        self, collection: Collection, conditions: Sequence[pb.Condition], cancelled: Any
    ) -> list[tuple[str, ...]]:
        self.asked.append([each.exists for each in conditions])
        return [("1", "2") if each.exists == "a" else () for each in conditions]


def only(key: str, allow: Sequence[str] = ()) -> pb.QueryFilter:
    return pb.QueryFilter(allow_ids=allow, condition=pb.Condition(exists=key))


def filters(store: Any, queries: int, *given: pb.QueryFilter) -> Any:
    request = pb.SearchRequest(filters=given)
    return filters_of(request, queries, COLLECTION, cast("Collections", store))


def test_each_condition_is_evaluated_once_and_equal_filters_are_one() -> None:
    store = Store()
    given = [only("a"), only("b"), only("a", ["2", "3"]), only("a"), pb.QueryFilter()]
    found = asyncio.run(filters(store, 5, *given))
    assert store.asked == [["a", "b"]]
    assert [each.allow for each in found] == [("1", "2"), (), ("2",), ("1", "2"), None]
    assert found[0] is found[3]
    (one, other) = asyncio.run(filters(store, 2, only("a")))
    assert one is other


def test_without_conditions_nothing_is_evaluated() -> None:
    store = Store()
    (one,) = asyncio.run(filters(store, 1, pb.QueryFilter(allow_ids=["1"], deny_ids=["2"])))
    assert (one.allow, one.deny) == (("1",), {"2"})
    assert asyncio.run(filters(store, 3)) == []
    assert store.asked == []


def test_reads_do_not_wait_for_conditions() -> None:
    free = threading.Event()

    class Slow(Store):
        def matching(self, *arguments: Any) -> list[tuple[str, ...]]:
            assert free.wait(WAIT_S)
            return super().matching(*arguments)

    async def read() -> None:
        calls = [asyncio.ensure_future(filters(Slow(), 1, only("a"))) for _ in range(40)]
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.to_thread(free.set), WAIT_S / 4)
        await asyncio.gather(*calls)

    asyncio.run(read())


def test_who_does_not_wait_keeps_no_thread() -> None:
    started, ended = threading.Event(), threading.Event()

    class Slow(Store):
        def matching(
            self,
            collection: Collection,
            conditions: Sequence[pb.Condition],
            cancelled: Callable[[], bool],
        ) -> list[tuple[str, ...]]:
            started.set()
            while not cancelled():
                ended.wait(0.001)
            ended.set()
            return [() for _ in conditions]

    async def leave() -> None:
        call = asyncio.ensure_future(filters(Slow(), 1, only("a")))
        assert await asyncio.to_thread(started.wait, WAIT_S)
        call.cancel()
        assert await asyncio.to_thread(ended.wait, WAIT_S)

    asyncio.run(leave())

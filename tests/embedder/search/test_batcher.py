"""Searches of one index that wait for one another are answered together."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from embedder.search import batcher as batcher_module
from embedder.search.batcher import SearchBatcher
from embedder.search.index import Filter, Hits, VectorIndex
from foretell.vectors import Vectors

COLS = 8
LONG_S = 30


class SlowIndex(VectorIndex):
    """Searches when it is let; notes how many queries came together."""

    def __init__(self) -> None:
        super().__init__(COLS)
        self.calls: list[int] = []
        self.searching, self.go_on = threading.Event(), threading.Event()
        self.fails = False

    def search(self, queries: Vectors, *arguments: Any, **options: Any) -> list[Hits]:
        self.calls.append(len(queries))
        self.searching.set()
        assert self.go_on.wait(LONG_S)
        if self.fails:
            raise ValueError("no")
        return super().search(queries, *arguments, **options)


@pytest.fixture
def rows() -> Vectors:
    return np.random.default_rng(0).standard_normal((100, COLS)).astype(np.float32)


@pytest.fixture
def index(rows: Vectors) -> Iterator[SlowIndex]:
    made = SlowIndex()
    made.put([str(row) for row in range(100)], rows, 1)
    yield made
    made.go_on.set()


@pytest.fixture
def batcher() -> Iterator[SearchBatcher]:
    with ThreadPoolExecutor(2) as executor:
        yield SearchBatcher(executor)


async def begun(
    batcher: SearchBatcher,
    index: VectorIndex,
    queries: Vectors,
    k: int = 3,
    filters: Sequence[Filter] = (),
    include_vectors: bool = False,
) -> asyncio.Task[list[Hits]]:
    """A search that has been handed over."""
    search = batcher.search(index, queries, k, filters, include_vectors=include_vectors)
    task = asyncio.create_task(search)
    await asyncio.sleep(0)
    return task


async def test_what_waits_is_answered_together(
    batcher: SearchBatcher, index: SlowIndex, rows: Vectors
) -> None:
    tasks = [await begun(batcher, index, rows[:1])]
    await asyncio.to_thread(index.searching.wait, LONG_S)
    deny = [Filter(deny=frozenset({"5"}))] * 2
    tasks.append(await begun(batcher, index, rows[5:7], k=1, filters=deny))
    tasks.append(await begun(batcher, index, rows[7:8], k=100))
    tasks.append(await begun(batcher, index, rows[8:9], include_vectors=True))
    tasks.append(await begun(batcher, index, rows[9:10]))
    index.go_on.set()
    answers = await asyncio.gather(*tasks)
    assert index.calls == [1, 3, 1, 1]  # with vectors and without do not go together
    plain = VectorIndex(COLS)
    plain.put([str(row) for row in range(100)], rows, 1)
    wanted = [
        plain.search(rows[:1], 3),
        plain.search(rows[5:7], 1, deny),
        plain.search(rows[7:8], 100),
        plain.search(rows[8:9], 3),
        plain.search(rows[9:10], 3),
    ]
    assert [[hits.ids for hits in each] for each in answers] == [
        [hits.ids for hits in each] for each in wanted
    ]
    assert [each[0].vectors is not None for each in answers] == [False, False, False, True, False]


async def test_only_so_many_go_together(
    batcher: SearchBatcher, index: SlowIndex, rows: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "MOST_QUERIES", 5)
    tasks = [await begun(batcher, index, rows[:1])]
    for _ in range(4):
        tasks.append(await begun(batcher, index, rows[:2]))
    tasks.append(await begun(batcher, index, rows[:20]))
    index.go_on.set()
    await asyncio.gather(*tasks)
    assert index.calls == [1, 4, 4, 20]


async def test_another_index_does_not_wait(
    batcher: SearchBatcher, index: SlowIndex, rows: Vectors
) -> None:
    task = await begun(batcher, index, rows[:1])
    other = VectorIndex(COLS)
    other.put(["a"], rows[:1], 1)
    (hits,) = await (await begun(batcher, other, rows[:1]))
    assert hits.ids == ["a"]
    assert not task.done()
    index.go_on.set()
    await task


async def test_who_leaves_and_what_fails_leave_the_others_alone(
    batcher: SearchBatcher, index: SlowIndex, rows: Vectors
) -> None:
    first = await begun(batcher, index, rows[:1])
    second = await begun(batcher, index, rows[:1])
    third = await begun(batcher, index, rows[:1])
    first.cancel()
    second.cancel()
    index.go_on.set()
    (hits,) = await third
    assert index.calls == [1, 1]  # nothing for the second
    assert hits.ids[0] == index.search(rows[:1], 3)[0].ids[0]
    index.fails = True
    with pytest.raises(ValueError, match="no"):
        await (await begun(batcher, index, rows[:1]))
    index.fails = False
    assert len(await (await begun(batcher, index, rows[:1]))) == 1

"""The background thread: when it writes snapshots, and what happens when it cannot."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from embedder.storage import upkeep
from embedder.storage.upkeep import Upkeep
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.vectors import to_block

LEAST = 10
WAIT_S = 60


@pytest.fixture
def keep_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Upkeep]]:
    monkeypatch.setattr(upkeep, "PAUSE_S", 0.0)
    with ExitStack() as stack:

        def made(opened: Any) -> Upkeep:
            one = Upkeep(opened.collections, LEAST)
            stack.callback(one.close)
            return one

        yield made


async def with_given(open_collections: Callable[[], Any]) -> Any:
    opened = open_collections()
    create = pb.CreateCollectionRequest(name="given", vector=pb.VectorCollection(cols=2))
    await opened.collections.create(create)
    return opened


async def put(opened: Any, first: int, count: int) -> None:
    ids = [f"id {i}" for i in range(first, first + count)]
    block = to_block(np.ones((count, 2), np.float32))
    request = pb.PutVectorsRequest(collection="given", ids=ids, vectors=block)
    await opened.writer.put_vectors(request)


def watched(opened: Any, monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """Set after the first snapshot, the second and so on."""
    events = [threading.Event() for _ in range(3)]
    left = iter(events)
    write = opened.collections.snapshots.write

    def noted(*arguments: Any) -> None:
        write(*arguments)
        next(left).set()

    monkeypatch.setattr(opened.collections.snapshots, "write", noted)
    return events


def seqs(opened: Any) -> list[int]:
    row = opened.collections.get("given").row
    found = opened.collections.snapshots.load(row, 1_000)
    return [] if found is None else [found.manifest.seq]


async def test_a_snapshot_once_enough_has_changed(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = await with_given(open_collections)
    first, second, third = watched(opened, monkeypatch)
    keep_up(opened)
    await put(opened, 0, LEAST - 1)
    await put(opened, 100, 91)
    assert first.wait(WAIT_S)
    # Of a hundred a quarter must change.
    await put(opened, 100, 12)
    await put(opened, 100, 12)
    assert seqs(opened) == [opened.collections.get("given").seq - 2]
    await put(opened, 100, 1)
    assert second.wait(WAIT_S)
    assert seqs(opened) == [opened.collections.get("given").seq]
    assert not third.is_set()


async def test_the_last_snapshot_comes_at_the_end(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = await with_given(open_collections)
    first, second, _ = watched(opened, monkeypatch)
    await put(opened, 0, 200)
    kept_up = keep_up(opened)
    assert first.wait(WAIT_S)
    await put(opened, 0, 30)  # no quarter, but more than a tenth
    assert not second.is_set()
    kept_up.close()
    assert seqs(opened) == [opened.collections.get("given").seq]
    opened.close()
    again = open_collections()
    assert again.collections.get("given").changes == 0


async def test_one_that_cannot_be_written_is_tried_again(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(upkeep, "RETRY_S", 0.05)
    opened = await with_given(open_collections)
    tried = [threading.Event() for _ in range(2)]
    left = iter(tried)

    def full(*_: Any) -> None:
        next(left).set()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(opened.collections.snapshots, "_write_files", full)
        keep_up(opened)
        await put(opened, 0, 20)
        assert all(one.wait(WAIT_S) for one in tried)
        await put(opened, 20, 20)  # it serves on
        assert opened.collections.get("given").index.known(["id 39"]) == [True]
    assert "given: [Errno 28] No space left on device" in caplog.text
    first, *_ = watched(opened, monkeypatch)
    assert first.wait(WAIT_S)
    assert seqs(opened) == [opened.collections.get("given").seq]
    assert [path.name for path in opened.collections.snapshots.folder.iterdir()] == ["3-1"]


async def test_it_does_not_hold_up_the_end(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = await with_given(open_collections)
    begun = threading.Event()
    write = opened.collections.snapshots.write

    def endless(row: Any, seq: int, frozen: Any, check: Callable[[], None]) -> None:
        monkeypatch.setattr(opened.collections.snapshots, "write", write)
        begun.set()
        while True:
            check()

    monkeypatch.setattr(opened.collections.snapshots, "write", endless)
    kept_up = keep_up(opened)
    await put(opened, 0, 20)
    assert begun.wait(WAIT_S)
    kept_up.close()
    assert seqs(opened) == [opened.collections.get("given").seq]  # the one at the end


async def test_snapshots_that_cannot_be_deleted_do_not_end_it(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = await with_given(open_collections)
    failed = threading.Event()

    def keep_only(numbers: Any) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(opened.collections.snapshots, "keep_only", keep_only)
    first, *_ = watched(opened, monkeypatch)
    keep_up(opened)
    assert failed.wait(WAIT_S)
    await put(opened, 0, 2 * LEAST)
    assert first.wait(WAIT_S)
    assert "Input/output error" in caplog.text


async def test_an_index_that_fails_is_left_for_later(
    open_collections: Callable[[], Any],
    keep_up: Callable[..., Upkeep],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(upkeep, "RETRY_S", 0.05)
    opened = await with_given(open_collections)
    given, done = opened.collections.get("given"), threading.Event()
    answers = iter([RuntimeError("out of memory"), True, True, False])

    def maintain() -> bool:
        answer = next(answers, False)
        if isinstance(answer, Exception):
            raise answer
        if not answer:
            done.set()
        return bool(answer)

    monkeypatch.setattr(given.index, "maintain", maintain)
    keep_up(opened)
    assert done.wait(WAIT_S)
    assert "out of memory" in caplog.text

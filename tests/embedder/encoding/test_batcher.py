import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedder.encoding.batcher import Batcher
from foretell.errors import ResourceExhaustedError, UnavailableError


class Gate:
    """Holds the forward pass until it is opened."""

    def __init__(self, backend: Any) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        backend.before = self

    def __call__(self, texts: list[str]) -> None:
        self.entered.set()
        assert self.open.wait(30)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)


async def queued(batcher: Batcher, texts: list[str]) -> asyncio.Task[Any]:
    """A call whose texts are tokenized and wait for the encoder."""
    before = len(batcher._jobs)
    task = asyncio.ensure_future(batcher.encode(texts))
    while len(batcher._jobs) == before:
        await asyncio.sleep(0)
    return task


async def test_vectors_come_in_the_order_of_the_texts(batcher: Batcher, vector_of: Any) -> None:
    texts = [f"{'long ' * (i % 7)}text {i}" for i in range(300)]
    vectors, timing = await batcher.encode(texts)
    assert np.array_equal(vectors, np.array([vector_of(text) for text in texts]))
    assert timing.forward_us > 0
    assert batcher.texts_encoded == 300


async def test_batches_keep_the_token_budget(batcher: Batcher, backend: Any) -> None:
    await batcher.encode([f"text number {i}" for i in range(300)])
    sizes = [sum(map(len, texts)) for texts in backend.batches]
    assert max(sizes) <= backend.batch_tokens  # no text is longer than the budget
    assert len(sizes) <= 2 * sum(sizes) // backend.batch_tokens


async def test_a_text_longer_than_the_budget_is_encoded(batcher: Batcher, vector_of: Any) -> None:
    texts = ["a" * 1_000, "b", "c" * 999]
    vectors, _ = await batcher.encode(texts)
    assert np.array_equal(vectors, np.array([vector_of(text) for text in texts]))


async def test_waiting_calls_share_a_batch(batcher: Batcher, backend: Any, vector_of: Any) -> None:
    gate = Gate(backend)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    await gate.wait()
    rest = [await queued(batcher, [f"call {i}"]) for i in range(5)]
    gate.open.set()
    for i, task in enumerate(rest):
        vectors, timing = await task
        assert np.array_equal(vectors[0], vector_of(f"call {i}"))
        assert timing.queue_us > 0
    await first
    assert [len(texts) for texts in backend.batches] == [1, 5]


async def test_a_small_call_does_not_wait_for_a_large_one(batcher: Batcher, backend: Any) -> None:
    gate = Gate(backend)
    large = asyncio.ensure_future(batcher.encode([f"text number {i:04}" for i in range(1_000)]))
    await gate.wait()
    small = await queued(batcher, ["small"])
    gate.open.set()
    await small
    await large
    # It went ahead of most of the large call, which was there first.
    assert "small" in backend.batches[1]
    assert len(backend.batches) > 3


async def test_many_small_calls_do_not_starve_a_long_text(batcher: Batcher, backend: Any) -> None:
    gate = Gate(backend)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    await gate.wait()
    small = [await queued(batcher, ["s" * 100, "s" * 100]) for _ in range(20)]
    long = await queued(batcher, ["l" * 250])
    gate.open.set()
    await asyncio.gather(first, long, *small)
    order = [text[0] for texts in backend.batches[1:] for text in texts]
    # By its turn each of the 20 calls before it has had one text.
    assert order.index("l") <= 20


async def test_a_call_that_left_is_not_encoded(batcher: Batcher, backend: Any) -> None:
    gate = Gate(backend)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    await gate.wait()
    left = await queued(batcher, ["left"])
    stayed = await queued(batcher, ["stayed"])
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.open.set()
    await asyncio.gather(first, stayed)
    assert backend.batches == [["first"], ["stayed"]]


async def test_an_exception_goes_to_the_calls_of_its_batch_only(
    batcher: Batcher, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(texts: list[str]) -> None:
        if "bad" in texts:
            raise RuntimeError("the network broke")

    backend.before = fail
    with pytest.raises(RuntimeError, match="the network broke"):
        await batcher.encode(["bad"])
    assert "a forward pass failed" in caplog.text
    vectors, _ = await batcher.encode(["good"])
    assert vectors.shape == (1, backend.cols)


async def test_a_full_queue_refuses_at_once(
    make_batcher: Callable[..., Batcher], backend: Any
) -> None:
    batcher = make_batcher(max_queue_texts=10)
    gate = Gate(backend)
    first = asyncio.ensure_future(batcher.encode(["a"] * 8))
    await gate.wait()
    with pytest.raises(ResourceExhaustedError) as raised:
        await batcher.encode(["b"] * 3)
    assert raised.value.reason == "ENCODER_QUEUE_FULL"
    assert raised.value.retry_after_s
    second = await queued(batcher, ["c"] * 2)
    gate.open.set()
    await asyncio.gather(first, second)
    # A call alone is let in whatever its size.
    vectors, _ = await batcher.encode(["d"] * 50)
    assert len(vectors) == 50


async def test_closing_refuses_what_waits(
    make_batcher: Callable[..., Batcher], backend: Any
) -> None:
    batcher = make_batcher()
    gate = Gate(backend)
    running = asyncio.ensure_future(batcher.encode(["running"]))
    await gate.wait()
    waiting = await queued(batcher, ["waiting"])
    closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
    while not batcher._closed:
        await asyncio.sleep(0)
    gate.open.set()
    await closing
    assert len((await running)[0]) == 1
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await batcher.encode(["late"])

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from embedder.encoding.batcher import Batcher, _Job
from embedder.encoding.encoder import TokenBatch
from foretell.errors import DeadlineExceededError, ResourceExhaustedError, UnavailableError


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


async def test_a_batch_too_large_for_the_memory_is_encoded_in_two_halves(
    batcher: Batcher, backend: Any, vector_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(texts: list[str]) -> None:
        if len(texts) > 3:
            raise torch.OutOfMemoryError("out of memory")

    backend.before = no_room
    texts = [f"text {i}" for i in range(6)]
    vectors, _ = await batcher.encode(texts)
    assert np.array_equal(vectors, np.array([vector_of(text) for text in texts]))
    assert [len(texts) for texts in backend.batches] == [3, 3]
    assert "no memory for 6 texts" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):  # halved once only
        await batcher.encode([f"text {i}" for i in range(12)])


async def test_a_tokenizer_that_fails_spares_the_other_calls(backend: Any) -> None:
    busy, go = threading.Event(), threading.Event()

    def tokenize(texts: Sequence[str]) -> TokenBatch:
        if "first" in texts:
            busy.set()
            assert go.wait(30)
        if "bad" in texts:
            raise ValueError("no token for it")
        return TokenBatch.of([[ord(character) for character in text] for text in texts])

    batcher = Batcher(backend, tokenize)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    assert await asyncio.to_thread(busy.wait, 30)
    together = [asyncio.ensure_future(batcher.encode([text])) for text in ("good", "bad", "fine")]
    await asyncio.sleep(0)  # they wait for the tokenizer, all three
    go.set()
    good, bad, fine = await asyncio.gather(*together, return_exceptions=True)
    assert isinstance(bad, ValueError)
    assert not isinstance(good, BaseException)
    assert not isinstance(fine, BaseException)
    await first
    batcher.close()


async def test_a_call_without_memory_for_its_vectors_spares_the_others(
    backend: Any, vector_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, go = threading.Event(), threading.Event()
    add = _Job.add

    def tokenize(texts: Sequence[str]) -> TokenBatch:
        busy.set()
        assert go.wait(30)
        return TokenBatch.of([[ord(character) for character in text] for text in texts])

    def add_if_there_is_room(job: _Job, *arguments: Any) -> bool:
        if job.texts == ["large"]:
            raise MemoryError
        return add(job, *arguments)

    monkeypatch.setattr(_Job, "add", add_if_there_is_room)
    batcher = Batcher(backend, tokenize)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    assert await asyncio.to_thread(busy.wait, 30)
    together = [asyncio.ensure_future(batcher.encode([text])) for text in ("good", "large")]
    await asyncio.sleep(0)  # they wait for the tokenizer, both
    go.set()
    good, large = await asyncio.gather(*together, return_exceptions=True)
    assert isinstance(large, MemoryError)
    assert not isinstance(good, BaseException)
    assert np.array_equal(good[0], [vector_of("good")])
    await first
    batcher.close()


async def test_a_thread_that_dies_tells_its_callers_and_is_started_again(
    batcher: Batcher, backend: Any, vector_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def die(texts: list[str]) -> None:
        raise SystemExit("the thread is over")

    backend.before = die
    with pytest.raises(UnavailableError) as raised:
        await batcher.encode(["lost"])
    assert raised.value.reason == "ENCODER_FAILED"
    assert "it starts again" in caplog.text
    backend.before = lambda texts: None
    vectors, _ = await batcher.encode(["found"])
    assert np.array_equal(vectors[0], vector_of("found"))


async def test_a_second_pass_begins_beside_the_first_where_enough_waits(
    backend: Any, make_batcher: Callable[..., Batcher]
) -> None:
    backend.workers = 2
    batcher = make_batcher()
    gate = Gate(backend)
    first = asyncio.ensure_future(batcher.encode(["first"]))
    await gate.wait()
    gate.entered.clear()
    few = await queued(batcher, ["few"])
    assert not gate.entered.is_set()  # 3 of 256 tokens: it waits for the first to end
    many = asyncio.ensure_future(batcher.encode(["m" * 80]))
    await gate.wait()
    gate.open.set()
    await asyncio.gather(first, few, many)
    assert sorted(map(sorted, backend.batches)) == [["few", "m" * 80], ["first"]]


async def crowded(make_batcher: Callable[..., Batcher], backend: Any, clock: list[float]) -> Any:
    """A batcher of a known rate with calls that wait until the gate opens, and these calls."""
    batcher = make_batcher(max_queue_s=1.0)
    batcher._admission._clock = lambda: clock[0]
    gate = Gate(backend)
    await gate_rate(batcher, gate, clock)
    gate.open.clear()
    gate.entered.clear()
    calls = [asyncio.ensure_future(batcher.encode(["a" * 1_000])) for _ in range(9)]
    await gate.wait()
    return batcher, gate, calls


async def gate_rate(batcher: Batcher, gate: Gate, clock: list[float]) -> None:
    """Teaches the batcher that 2,000 characters take a second."""
    large = asyncio.ensure_future(batcher.encode(["b" * 2_000]))
    await gate.wait()
    clock[0] += 1.0
    gate.open.set()
    await large


async def test_a_call_that_would_wait_long_is_refused_at_once(
    make_batcher: Callable[..., Batcher], backend: Any
) -> None:
    batcher, gate, calls = await crowded(make_batcher, backend, [0.0])
    with pytest.raises(ResourceExhaustedError) as raised:
        await batcher.encode(["c" * 1_000])
    assert raised.value.retry_after_s == pytest.approx(4.5)
    small = await queued(batcher, ["small"])  # waits for five characters of each
    gate.open.set()
    await asyncio.gather(small, *calls)
    assert ["c" * 1_000] not in backend.batches


async def test_a_call_that_cannot_be_in_time_is_not_encoded(
    make_batcher: Callable[..., Batcher], backend: Any
) -> None:
    batcher, gate, calls = await crowded(make_batcher, backend, [0.0])
    now = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceededError):
        await batcher.encode(["d" * 400], now + 0.1)
    with pytest.raises(ResourceExhaustedError):  # 0.2 s alone, and 1.8 s for the others
        await batcher.encode(["d" * 400], now + 1.9)
    in_time = asyncio.ensure_future(batcher.encode(["d" * 10], now + 600))
    gate.open.set()
    await asyncio.gather(in_time, *calls)
    assert ["d" * 400] not in backend.batches


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

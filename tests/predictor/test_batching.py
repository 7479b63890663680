import asyncio
from collections.abc import Sequence

import pytest

from predictor.batching import Batcher


class Recorder:
    """Doubles numbers; waits for `go`; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def run(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        await self.go.wait()
        return [2 * n for n in numbers]


async def test_what_waits_while_a_batch_runs_is_the_next_batch() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=3)
    first = [asyncio.create_task(batcher.submit([n])) for n in (0, 2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = [asyncio.create_task(batcher.submit([n])) for n in (4, 6, 8, 10)]
    await asyncio.sleep(0)
    recorder.go.set()
    answers = await asyncio.gather(*first, *second)
    assert answers == [[0], [4], [8], [12], [16], [20]]
    assert recorder.batches == [[0, 2], [4, 6, 8], [10]]


async def test_what_a_caller_submits_stays_together() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=3)
    recorder.go.set()
    answers = await asyncio.gather(
        *(batcher.submit(numbers) for numbers in ([1, 2], [3, 4], [], [5], [6, 7, 8, 9]))
    )
    assert answers == [[2, 4], [6, 8], [], [10], [12, 14, 16, 18]]
    assert recorder.batches == [[1, 2], [3, 4, 5], [6, 7, 8, 9]]


async def test_who_left_is_not_run_and_holds_nobody_up() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=1)
    running = asyncio.create_task(batcher.submit([2]))
    await asyncio.sleep(0)
    left, stays = asyncio.create_task(batcher.submit([4])), asyncio.create_task(batcher.submit([6]))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    recorder.go.set()
    assert await running == [4]
    assert await stays == [12]
    assert recorder.batches == [[2], [6]]


async def test_a_run_for_nobody_is_cancelled() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=2)
    callers = [asyncio.create_task(batcher.submit([n])) for n in (1, 2)]
    while not recorder.batches:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(batcher.submit([3]))
    callers[0].cancel()
    await asyncio.wait(callers[:1])
    await asyncio.sleep(0)
    assert recorder.batches == [[1, 2]]  # the other one waits for it
    callers[1].cancel()
    while len(recorder.batches) < 2:
        await asyncio.sleep(0)
    recorder.go.set()
    assert await waiting == [6]
    assert recorder.batches == [[1, 2], [3]]


async def test_a_failing_run_fails_its_batch_and_the_next_one_runs() -> None:
    async def run(numbers: Sequence[int]) -> list[int]:
        if 0 in numbers:
            raise ZeroDivisionError
        return list(numbers)

    batcher = Batcher(run, size=9)
    with pytest.raises(ZeroDivisionError):
        await batcher.submit([0])
    assert await batcher.submit([1]) == [1]

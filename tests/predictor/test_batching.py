import asyncio
from collections.abc import Sequence

import pytest

from foretell.errors import ForetellError, NotFoundError
from predictor.batching import Batcher


class Recorder:
    """Doubles numbers; waits for `go`; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()

    async def run(self, numbers: Sequence[int]) -> list[int | ForetellError]:
        self.batches.append(list(numbers))
        await self.go.wait()
        return [NotFoundError("odd") if n % 2 else 2 * n for n in numbers]


async def test_what_waits_while_a_batch_runs_is_the_next_batch() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=3)
    first = [asyncio.create_task(batcher.submit(n)) for n in (0, 2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = [asyncio.create_task(batcher.submit(n)) for n in (4, 6, 8, 10)]
    await asyncio.sleep(0)
    recorder.go.set()
    assert await asyncio.gather(*first, *second) == [0, 4, 8, 12, 16, 20]
    assert recorder.batches == [[0, 2], [4, 6, 8], [10]]


async def test_one_error_is_its_own_elements() -> None:
    recorder = Recorder()
    recorder.go.set()
    batcher = Batcher(recorder.run, size=9)
    good, bad = await asyncio.gather(batcher.submit(2), batcher.submit(3), return_exceptions=True)
    assert good == 4
    assert isinstance(bad, NotFoundError)


async def test_who_left_is_not_run_and_holds_nobody_up() -> None:
    recorder = Recorder()
    batcher = Batcher(recorder.run, size=1)
    running = asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0)
    left, stays = asyncio.create_task(batcher.submit(4)), asyncio.create_task(batcher.submit(6))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.sleep(0)
    recorder.go.set()
    assert await running == 4
    assert await stays == 12
    assert recorder.batches == [[2], [6]]


async def test_a_failing_run_fails_its_batch_and_the_next_one_runs() -> None:
    async def run(numbers: Sequence[int]) -> list[int | ForetellError]:
        if 0 in numbers:
            raise ZeroDivisionError
        return list(numbers)

    batcher = Batcher(run, size=9)
    with pytest.raises(ZeroDivisionError):
        await batcher.submit(0)
    assert await batcher.submit(1) == 1

"""Concurrent requests share one run: what waits while a batch runs is the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from typing import Generic, TypeVar

from foretell.errors import ForetellError
from serving import tracing

Q = TypeVar("Q")
R = TypeVar("R")


class Batcher(Generic[Q, R]):
    """Hands elements to `run` in batches, without ever waiting for one to fill.

    Args:
        run: answers a batch, one result or error per element; only `concurrent` of them run at
            a time.
        size: elements of a batch at most.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Awaitable[Sequence[R | ForetellError]]],
        size: int,
        concurrent: int = 1,
    ) -> None:
        self._run = run
        self._size = size
        self._free = concurrent
        self._waiting: list[tuple[Q, asyncio.Future[R], Context]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, element: Q) -> R:
        """The element's result.

        Raises:
            ForetellError: its own error; any exception of the whole batch.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append((element, future, copy_context()))
        if self._free:
            # Not at once: what else this turn of the loop brings comes along.
            loop.call_soon(self._start)
        return await future

    def _start(self) -> None:
        while self._free and self._waiting:
            batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
            # Who has left (deadline, cancellation) costs nothing more.
            batch = [one for one in batch if not one[1].done()]
            if batch:
                self._free -= 1
                context = tracing.chosen([context for _, _, context in batch])
                task = asyncio.get_running_loop().create_task(
                    self._serve([(element, future) for element, future, _ in batch]),
                    context=context,
                )
                self._tasks.add(task)  # the loop itself keeps no reference
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, batch: list[tuple[Q, asyncio.Future[R]]]) -> None:
        try:
            results = await self._run([element for element, _ in batch])
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, ForetellError):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        finally:
            self._free += 1
            self._start()

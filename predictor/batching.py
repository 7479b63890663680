"""Concurrent requests share one run: what waits while a batch runs is the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from serving import tracing

Q = TypeVar("Q")
R = TypeVar("R")


class _Group(NamedTuple, Generic[Q, R]):
    """Elements of one caller, and where it waits for their results."""

    elements: Sequence[Q]
    future: asyncio.Future[Sequence[R]]
    context: Context


def _leave(
    batch: Sequence[_Group[Any, Any]], task: asyncio.Task[None], left: asyncio.Future[Any]
) -> None:
    """Ends a run that nobody waits for any more."""
    if left.cancelled() and all(group.future.done() for group in batch):
        task.cancel()


class Batcher(Generic[Q, R]):
    """Hands elements to `run` in batches, without ever waiting for one to fill.

    A run whose callers have all left is cancelled.

    Args:
        run: answers a batch, one result per element; only `concurrent` of them run at a time.
        size: elements of a batch at most; a caller's own are never divided.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Awaitable[Sequence[R]]],
        size: int,
        concurrent: int = 1,
    ) -> None:
        self._run = run
        self._size = size
        self._free = concurrent
        self._waiting: list[_Group[Q, R]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, elements: Sequence[Q]) -> Sequence[R]:
        """The elements' results. Raises what the batch raised."""
        if not elements:
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[R]] = loop.create_future()
        self._waiting.append(_Group(elements, future, copy_context()))
        if self._free:
            # Not at once: what else this turn of the loop brings comes along.
            loop.call_soon(self._start)
        return await future

    def _start(self) -> None:
        while self._free and self._waiting:
            batch = self._next()
            if batch:
                self._free -= 1
                context = tracing.chosen([group.context for group in batch])
                task = asyncio.get_running_loop().create_task(self._serve(batch), context=context)
                self._tasks.add(task)  # the loop itself keeps no reference
                task.add_done_callback(self._tasks.discard)
                for group in batch:
                    group.future.add_done_callback(partial(_leave, batch, task))

    def _next(self) -> list[_Group[Q, R]]:
        """The groups that have waited longest and fit together: at least one, if any waits."""
        # Who has left (deadline, cancellation) costs nothing more.
        waiting = [group for group in self._waiting if not group.future.done()]
        count = elements = 0
        for group in waiting:
            elements += len(group.elements)
            if count and elements > self._size:
                break
            count += 1
        self._waiting = waiting[count:]
        return waiting[:count]

    async def _serve(self, batch: list[_Group[Q, R]]) -> None:
        try:
            results = await self._run([element for group in batch for element in group.elements])
        except BaseException as error:
            for group in batch:
                if not group.future.done():
                    group.future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            begin = 0
            for group in batch:
                end = begin + len(group.elements)
                if not group.future.done():
                    group.future.set_result(results[begin:end])
                begin = end
        finally:
            self._free += 1
            self._start()

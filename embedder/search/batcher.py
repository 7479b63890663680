"""Searches of one index, one at a time: those that wait are answered together.

No index on a GPU may be searched by two threads, and on a CPU one product over many queries takes
far less time than one each. Nobody waits for company: an idle index starts at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from embedder.search.exact import Hits
from embedder.search.index import VectorIndex
from embedder.search.searcher import NO_FILTER, Filter
from foretell.vectors import Vectors
from serving.metrics import Observe, unobserved

MOST_QUERIES = 256
"""Queries of several callers that are answered together: so many take a while."""


@dataclass(frozen=True)
class _Job:
    """A caller's queries."""

    queries: Vectors
    k: int
    filters: Sequence[Filter]
    """One per query."""
    include_vectors: bool
    answer: asyncio.Future[list[Hits]]


class SearchBatcher:
    """Runs searches in threads; for the event loop.

    Args:
        executor: its threads.
        observe: is told of each batch: seconds, queries.
    """

    def __init__(self, executor: Executor, observe: Observe = unobserved) -> None:
        self._executor = executor
        self._observe = observe
        self._waiting: dict[VectorIndex, deque[_Job]] = {}
        """By index that is being searched."""

    async def search(
        self,
        index: VectorIndex,
        queries: Vectors,
        k: int,
        filters: Sequence[Filter],
        *,
        include_vectors: bool,
    ) -> list[Hits]:
        """As VectorIndex.search; `filters`: none, or one per query."""
        answer: asyncio.Future[list[Hits]] = asyncio.get_running_loop().create_future()
        job = _Job(queries, k, filters or [NO_FILTER] * len(queries), include_vectors, answer)
        if index in self._waiting:
            self._waiting[index].append(job)
        else:
            self._waiting[index] = deque()
            self._start(index, [job])
        return await answer

    def _start(self, index: VectorIndex, jobs: list[_Job]) -> None:
        running = asyncio.get_running_loop().run_in_executor(
            self._executor, self._search, index, jobs
        )
        running.add_done_callback(partial(self._finish, index, jobs))

    def _finish(
        self, index: VectorIndex, jobs: list[_Job], done: asyncio.Future[list[list[Hits]]]
    ) -> None:
        """Starts the next searches, then hands out the answers."""
        # For callers who have left nothing is searched.
        waiting = deque(job for job in self._waiting[index] if not job.answer.done())
        self._waiting[index] = waiting
        if waiting:
            self._start(index, _together(waiting))
        else:
            del self._waiting[index]
        error = done.exception()
        for number, job in enumerate(jobs):
            if job.answer.done():  # its caller has left
                continue
            if error is not None:
                job.answer.set_exception(error)
            else:
                job.answer.set_result(done.result()[number])

    def _search(self, index: VectorIndex, jobs: Sequence[_Job]) -> list[list[Hits]]:
        """The answers of each job; called in a thread."""
        started = time.perf_counter()
        found = index.search(
            np.concatenate([job.queries for job in jobs]),
            np.repeat([job.k for job in jobs], [len(job.queries) for job in jobs]),
            [one for job in jobs for one in job.filters],
            include_vectors=jobs[0].include_vectors,
        )
        self._observe(time.perf_counter() - started, len(found))
        hits = iter(found)
        return [[next(hits) for _ in job.queries] for job in jobs]


def _together(waiting: deque[_Job]) -> list[_Job]:
    """Takes the next jobs that can be answered together."""
    jobs = [waiting.popleft()]
    count = len(jobs[0].queries)
    while waiting and waiting[0].include_vectors == jobs[0].include_vectors:
        count += len(waiting[0].queries)
        if count > MOST_QUERIES:
            break
        jobs.append(waiting.popleft())
    return jobs

"""Forms batches of the texts of concurrent calls, and encodes them on one thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from embedder.encoding.encoder import Backend, TokenBatch
from foretell.errors import ResourceExhaustedError, UnavailableError
from foretell.vectors import Vectors

log = logging.getLogger(__name__)

TOKENIZED_TOGETHER = 512
"""Texts that the tokenizer takes at once, so that a long call does not hold up short ones."""

SMOOTHING = 0.2
"""Weight of the latest batch in the mean of texts per second."""


@dataclass(frozen=True)
class Timing:
    """Where the time of an `encode` went, in microseconds."""

    queue_us: int = 0
    tokenize_us: int = 0
    forward_us: int = 0


@dataclass(eq=False)
class _Job:
    """The texts of one call."""

    sequences: list[list[int]]
    future: asyncio.Future[tuple[Vectors, Timing]]
    out: Vectors
    order: NDArray[np.int64]
    """Rows by length: neighbours in a batch then need little padding."""
    tokenize_us: int
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    forward_s: float = 0.0
    taken: int = 0

    @property
    def left(self) -> int:
        return len(self.sequences) - self.taken

    def take(self, budget: int, *, at_least_one: bool) -> int:
        """Takes the next rows for up to `budget` tokens, or one longer row; tokens taken."""
        used = 0
        while self.left:
            tokens = len(self.sequences[self.order[self.taken]])
            if used + tokens > budget and (used or not at_least_one):
                break
            used += tokens
            self.taken += 1
        return used


class Batcher:
    """Encodes texts for coroutines. `tokenize` gives token ids; it is called from one thread.

    Texts of all waiting calls share a batch, each call with an equal share of its tokens, so that
    a call of one text does not wait for one of 10,000. There is no added delay: the next batch
    forms while one runs. Calls that were cancelled are dropped before the forward pass. An
    exception of the network goes to the calls in that batch and to no others.
    """

    def __init__(
        self,
        backend: Backend,
        tokenize: Callable[[Sequence[str]], list[list[int]]],
        *,
        batch_tokens: int | None = None,
        max_queue_texts: int = 20_000,
    ) -> None:
        self.texts_encoded = 0
        self._backend = backend
        self._tokenize_some = tokenize
        self._batch_tokens = batch_tokens or backend.batch_tokens
        self._max_queue_texts = max_queue_texts
        self._waiting_texts = 0
        self._texts_per_s = 0.0
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A tokenizer object is not thread-safe, so it has one thread of its own.
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")
        self._worker = threading.Thread(target=self._run, name="encode", daemon=True)
        self._worker.start()

    async def encode(self, texts: Sequence[str]) -> tuple[Vectors, Timing]:
        """Vectors of length 1, shape (texts, cols).

        Raises:
            ResourceExhaustedError: too many texts wait already.
            UnavailableError: the service is shutting down.
        """
        if not texts:
            return np.empty((0, self._backend.cols), np.float32), Timing()
        self._admit(len(texts))
        try:
            job = await self._tokenize(texts)
            with self._changed:
                if self._closed:
                    raise UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")
                self._jobs.append(job)
                self._changed.notify()
            return await job.future
        finally:
            self._waiting_texts -= len(texts)

    def close(self) -> None:
        """Ends the threads; calls that still wait get UNAVAILABLE."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()
        self._tokenizing.shutdown()

    def _admit(self, texts: int) -> None:
        """Counts a call's texts in, unless too many wait. A call alone is always let in."""
        waiting = self._waiting_texts
        if waiting and waiting + texts > self._max_queue_texts:
            wait_s = waiting / self._texts_per_s if self._texts_per_s else 1.0
            raise ResourceExhaustedError(
                f"{waiting:,} texts wait for the encoder",
                reason="ENCODER_QUEUE_FULL",
                retry_after_s=min(max(wait_s, 0.1), 60.0),
            )
        self._waiting_texts += texts

    async def _tokenize(self, texts: Sequence[str]) -> _Job:
        loop = asyncio.get_running_loop()
        sequences: list[list[int]] = []
        spent = 0.0
        for start in range(0, len(texts), TOKENIZED_TOGETHER):
            if self._closed:
                raise UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")
            ids, seconds = await loop.run_in_executor(
                self._tokenizing, self._timed_tokens, texts[start : start + TOKENIZED_TOGETHER]
            )
            sequences += ids
            spent += seconds
        return _Job(
            sequences=sequences,
            future=loop.create_future(),
            out=np.empty((len(texts), self._backend.cols), np.float32),
            order=np.argsort([len(sequence) for sequence in sequences], kind="stable"),
            tokenize_us=int(spent * 1e6),
        )

    def _timed_tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], float]:
        started = time.perf_counter()
        return self._tokenize_some(texts), time.perf_counter() - started

    def _run(self) -> None:
        """The worker: takes a batch, encodes it, hands finished calls back."""
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    left = list(self._jobs)
                    self._jobs.clear()
                    break
                shares = self._take()
            if shares:
                self._encode(shares)
        error = UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")
        _hand_back([(job, error) for job in left])

    def _take(self) -> list[tuple[_Job, NDArray[np.int64]]]:
        """The next batch: rows of the waiting calls. Calls that left are dropped."""
        jobs = [job for job in self._jobs if not job.future.done()]
        before = [job.taken for job in jobs]
        budget = self._batch_tokens
        # First an equal share each, of at least one text while anything is left; then the rest to
        # the first that can use it. Who got nothing is the first in the next batch.
        share = budget // max(1, len(jobs))
        for job in jobs:
            if budget > 0:
                budget -= job.take(min(share, budget), at_least_one=True)
        for job in jobs:
            budget -= job.take(budget, at_least_one=False)
        now = time.perf_counter()
        shares: list[tuple[_Job, NDArray[np.int64]]] = []
        for job, start in zip(jobs, before, strict=True):
            if job.taken > start:
                job.started = job.started or now
                shares.append((job, job.order[start : job.taken]))
        served = [job for job, _ in shares if job.left]
        skipped = [job for job, start in zip(jobs, before, strict=True) if job.taken == start]
        self._jobs = deque(skipped + served)
        return shares

    def _encode(self, shares: list[tuple[_Job, NDArray[np.int64]]]) -> None:
        started = time.perf_counter()
        try:
            vectors = self._backend.encode(
                TokenBatch.of([job.sequences[row] for job, rows in shares for row in rows])
            )
        except Exception as error:
            log.exception("a forward pass failed")
            with self._changed:
                failed = {id(job) for job, _ in shares}
                self._jobs = deque(job for job in self._jobs if id(job) not in failed)
            _hand_back([(job, error) for job, _ in shares])
            return
        seconds = time.perf_counter() - started
        self._note_rate(len(vectors) / max(seconds, 1e-9))
        self.texts_encoded += len(vectors)
        start = 0
        finished: list[tuple[_Job, Exception | None]] = []
        for job, rows in shares:
            job.out[rows] = vectors[start : start + len(rows)]
            start += len(rows)
            job.forward_s += seconds
            if not job.left:
                finished.append((job, None))
        _hand_back(finished)

    def _note_rate(self, texts_per_s: float) -> None:
        mean = self._texts_per_s
        self._texts_per_s = (
            texts_per_s if not mean else (1 - SMOOTHING) * mean + SMOOTHING * texts_per_s
        )


def _hand_back(outcomes: Sequence[tuple[_Job, Exception | None]]) -> None:
    """Resolves the calls' futures, on their event loops."""
    for job, error in outcomes:
        try:
            job.future.get_loop().call_soon_threadsafe(_resolve, job, error)
        except RuntimeError:  # its event loop is gone, and so is whoever waited
            log.debug("a result came after its event loop was closed")


def _resolve(job: _Job, error: Exception | None) -> None:
    if job.future.done():  # cancelled meanwhile
        return
    if error is not None:
        job.future.set_exception(error)
        return
    timing = Timing(
        queue_us=int((job.started - job.submitted) * 1e6),
        tokenize_us=job.tokenize_us,
        forward_us=int(job.forward_s * 1e6),
    )
    job.future.set_result((job.out, timing))

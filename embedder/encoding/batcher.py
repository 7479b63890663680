"""Forms batches of the texts of concurrent calls, and encodes them on threads of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from embedder.encoding.encoder import Backend, TokenBatch
from foretell.errors import ForetellError, UnavailableError
from foretell.vectors import Vectors
from serving.admission import Admission
from serving.metrics import Observe, unobserved

log = logging.getLogger(__name__)

TOKENIZED_TOGETHER = 512
"""Texts that the tokenizer takes at once, so that a long call does not hold up short ones."""

WORTHWHILE = 0.06
"""Part of a batch's tokens that must wait for another pass to begin beside one that runs: small
batches are slow for each text, and while one runs the next one grows."""

CHARACTERS_PER_TOKEN = 4
"""About so many, with which a batch is full."""

READ_CHARACTERS = 2_000
"""Of a text; about what an encoder reads of it at most. A longer one takes hardly more time."""

MAX_QUEUE_S = 0.2
"""How long a call waits for others, by default."""

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Timing:
    """Where the time of an `encode` went, in microseconds; in part shared with other calls."""

    queue_us: int = 0
    """Tokenized, until the first of its texts came into a batch."""
    tokenize_us: int = 0
    forward_us: int = 0
    """While the network worked on some of its texts."""


@dataclass(eq=False)
class _Job:
    """The texts of one call."""

    texts: Sequence[str]
    future: asyncio.Future[tuple[Vectors, Timing]]
    parts: list[TokenBatch] = field(default_factory=list)
    """Of the first `tokenized` texts."""
    tokenized: int = 0
    tokenize_s: float = 0.0
    # From here on when all are.
    tokens: TokenBatch = field(init=False)
    order: NDArray[np.int64] = field(init=False)
    """Rows by length: neighbours in a batch then need little padding."""
    ends: NDArray[np.int64] = field(init=False)
    """Tokens of the rows in that order, summed up."""
    out: Vectors = field(init=False)
    taken: int = 0
    """Rows that a batch took."""
    encoded: int = 0
    submitted: float = 0.0
    started: float = 0.0
    passes: int = 0
    """Forward passes that work on it now, since `forward_began`."""
    forward_began: float = 0.0
    forward_s: float = 0.0

    @property
    def left(self) -> int:
        """Rows that no batch took."""
        return len(self.texts) - self.taken

    @property
    def left_tokens(self) -> int:
        """Their tokens."""
        return int(self.ends[-1]) - self.taken_tokens

    @property
    def taken_tokens(self) -> int:
        """Tokens of the rows that a batch took."""
        return int(self.ends[self.taken - 1]) if self.taken else 0

    def add(self, tokens: TokenBatch, seconds: float, cols: int) -> bool:
        """The next texts are tokenized; whether all are."""
        self.parts.append(tokens)
        self.tokenized += len(tokens)
        self.tokenize_s += seconds
        if self.tokenized < len(self.texts):
            return False
        self.tokens = TokenBatch.joined(self.parts)
        lengths = self.tokens.lengths
        self.order = np.argsort(lengths, kind="stable")
        self.ends = np.cumsum(lengths[self.order])
        self.out = np.empty((len(lengths), cols), np.float32)
        self.submitted = time.perf_counter()
        return True

    def take(self, budget: int, *, at_least_one: bool) -> int:
        """Takes the next rows for up to `budget` tokens, or one longer row; tokens taken."""
        if not self.left or not (budget > 0 or at_least_one):
            return 0
        before = self.taken_tokens
        end = int(np.searchsorted(self.ends, before + budget, side="right"))
        self.taken = max(end, self.taken + at_least_one)
        return self.taken_tokens - before

    def begin(self, now: float) -> None:
        """A forward pass with some of its rows begins."""
        self.started = self.started or now
        if not self.passes:
            self.forward_began = now
        self.passes += 1

    def end(self, rows: NDArray[np.int64], vectors: Vectors, now: float) -> bool:
        """A forward pass ends; whether all rows are encoded."""
        self.out[rows] = vectors
        self.encoded += len(rows)
        self.passes -= 1
        if not self.passes:
            self.forward_s += now - self.forward_began
        return self.encoded == len(self.texts)

    @property
    def timing(self) -> Timing:
        return Timing(
            queue_us=int((self.started - self.submitted) * 1e6),
            tokenize_us=int(self.tokenize_s * 1e6),
            forward_us=int(self.forward_s * 1e6),
        )


_Share = tuple[_Job, NDArray[np.int64]]
"""Rows of a job in a batch."""

_Outcome = tuple[_Job, Exception | None]
"""A job that has ended: with all its vectors, or with an error."""


class Batcher:
    """Encodes texts for coroutines.

    One thread tokenizes the texts of all calls that arrived meanwhile, others form batches and run
    the network. Texts of all waiting calls share a batch, each call with an equal share of its
    tokens, so that a call of one text does not wait for one of 10,000. There is no added delay: the
    next batch forms when the network is free for it. Calls that were cancelled are dropped before
    the forward pass. An exception of the tokenizer or the network goes to the calls in that batch
    and to no others; a batch that is too large for the memory is tried once more in two halves.

    Args:
        backend: the network, called from a thread for each of its `workers`.
        tokenize: gives the token ids of some texts, called from one thread.
        max_queue_s: how long a call may wait for the texts of others; see Admission.
        observe: is told of each forward pass: seconds, texts, tokens.
    """

    def __init__(
        self,
        backend: Backend,
        tokenize: Callable[[Sequence[str]], TokenBatch],
        *,
        max_queue_s: float = MAX_QUEUE_S,
        observe: Observe = unobserved,
    ) -> None:
        self.texts_encoded = 0
        self._observe = observe
        self._backend = backend
        self._tokenize = tokenize
        self.waiting_texts = 0
        """Texts of all calls that wait or are being encoded."""
        slack = backend.batch_tokens * backend.workers * CHARACTERS_PER_TOKEN
        self._admission = Admission(max_queue_s, slack)
        self._lock = threading.Lock()  # of all that follows
        self._arrived = threading.Condition(self._lock)
        self._new: deque[_Job] = deque()
        """Not all of their texts are tokenized."""
        self._ready = threading.Condition(self._lock)
        self._jobs: deque[_Job] = deque()
        """All are, and some are in no batch."""
        self._passes = 0
        """Forward passes that run."""
        self._closed = False
        loops = [self._tokenize_all, *[self._encode_all] * backend.workers]
        self._threads = [
            threading.Thread(target=self._keep_up, args=(each,), name=each.__name__, daemon=True)
            for each in loops
        ]
        for thread in self._threads:
            thread.start()

    async def encode(
        self, texts: Sequence[str], deadline: float | None = None
    ) -> tuple[Vectors, Timing]:
        """Vectors of length 1, shape (texts, cols).

        Args:
            texts: any number.
            deadline: of the event loop's clock, until when they are of use; None: any time.

        Raises:
            ResourceExhaustedError: too many texts wait already.
            DeadlineExceededError: it would take longer than until the deadline.
            UnavailableError: the service is shutting down, or a thread of the encoder failed.
        """
        if not texts:
            return np.empty((0, self._backend.cols), np.float32), Timing()
        loop = asyncio.get_running_loop()
        remaining_s = None if deadline is None else deadline - loop.time()
        with self._admission.admitted(_work(texts), remaining_s), self._counted(len(texts)):
            job = _Job(texts, loop.create_future())
            with self._lock:
                if self._closed:
                    raise _shutting_down()
                self._new.append(job)
                self._arrived.notify()
            return await job.future

    def close(self) -> None:
        """Ends the threads; calls that still wait get UNAVAILABLE."""
        with self._lock:
            self._closed = True
            self._arrived.notify_all()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        self._fail_waiting(_shutting_down())

    @contextmanager
    def _counted(self, texts: int) -> Iterator[None]:
        self.waiting_texts += texts
        try:
            yield
        finally:
            self.waiting_texts -= texts

    def _keep_up(self, loop: Callable[[list[_Job]], None]) -> None:
        """A thread: runs a loop, and again should it fail, of which the calls that wait are told.

        What the loop works on stands in its argument.
        """
        held: list[_Job] = []
        while True:
            try:
                return loop(held)
            except BaseException:
                log.exception("a thread of the encoder failed; it starts again")
                error = UnavailableError("the encoder failed and restarts", reason="ENCODER_FAILED")
                self._fail_waiting(error, held)

    def _fail_waiting(self, error: ForetellError, held: Sequence[_Job] = ()) -> None:
        """Tells the calls that wait, and those of `held`.

        All at once: one that was told earlier may call again, and that call must not fail too.
        """
        with self._lock:
            waiting = [*held, *self._new, *self._jobs]
            self._new.clear()
            self._jobs.clear()
        _hand_back([(job, error) for job in waiting])

    # --- Tokenizing ------------------------------------------------------------------------------

    def _tokenize_all(self, held: list[_Job]) -> None:
        """Tokenizes what arrives, until the end."""
        while some := self._next_texts():
            held[:] = [job for job, _ in some]
            try:
                self._tokenize_some(some)
            except Exception:
                for each in some:
                    self._tokenize_alone(each)
            held.clear()

    def _next_texts(self) -> list[tuple[_Job, Sequence[str]]]:
        """The next texts of the calls that arrived; empty at the end."""
        with self._lock:
            while not self._closed:
                some: list[tuple[_Job, Sequence[str]]] = []
                room = TOKENIZED_TOGETHER
                while self._new and room:
                    job = self._new.popleft()
                    if not job.future.done():
                        texts = job.texts[job.tokenized : job.tokenized + room]
                        room -= len(texts)
                        some.append((job, texts))
                if some:
                    return some
                self._arrived.wait()
        return []

    def _tokenize_some(self, some: Sequence[tuple[_Job, Sequence[str]]]) -> None:
        started = time.perf_counter()
        tokens = self._tokenize([text for _, texts in some for text in texts])
        seconds = time.perf_counter() - started
        start = 0
        ready: list[_Job] = []
        more: list[_Job] = []
        for job, texts in some:
            part = tokens.part(start, start + len(texts))
            start += len(texts)
            try:
                done = job.add(part, seconds, self._backend.cols)
            except Exception as error:  # no memory; to add the others again would double them
                _hand_back([(job, error)])
            else:
                (ready if done else more).append(job)
        with self._lock:
            self._new.extend(more)
            self._jobs.extend(ready)
            if ready:
                self._ready.notify_all()

    def _tokenize_alone(self, one: tuple[_Job, Sequence[str]]) -> None:
        """After a failure: its error goes to no call but its own."""
        try:
            self._tokenize_some([one])
        except Exception as error:
            log.exception("texts could not be tokenized")
            _hand_back([(one[0], error)])

    # --- Encoding --------------------------------------------------------------------------------

    def _encode_all(self, held: list[_Job]) -> None:
        """Encodes what is tokenized, until the end."""
        while shares := self._next_batch():
            held[:] = [job for job, _ in shares]
            try:
                self._encode(shares)
            finally:
                with self._lock:
                    self._passes -= 1
            held.clear()

    def _next_batch(self) -> list[_Share]:
        """Rows of the waiting calls; empty at the end."""
        with self._lock:
            while not self._closed:
                self._jobs = deque(job for job in self._jobs if not job.future.done())
                if self._jobs and self._worthwhile():
                    now = time.perf_counter()
                    shares = self._take()
                    for job, _ in shares:
                        job.begin(now)
                    self._passes += 1
                    return shares
                self._ready.wait()
        return []

    def _worthwhile(self) -> bool:
        """Whether to begin a pass now."""
        if not self._passes:
            return True
        waiting = sum(job.left_tokens for job in self._jobs)
        return waiting >= WORTHWHILE * self._backend.batch_tokens

    def _take(self) -> list[_Share]:
        """The next batch."""
        jobs = list(self._jobs)
        before = [job.taken for job in jobs]
        budget = self._backend.batch_tokens
        # First an equal share each, of at least one text while anything is left; then the rest to
        # the first that can use it. Who got nothing is the first in the next batch.
        share = budget // max(1, len(jobs))
        for job in jobs:
            if budget > 0:
                budget -= job.take(min(share, budget), at_least_one=True)
        for job in jobs:
            budget -= job.take(budget, at_least_one=False)
        shares = [
            (job, job.order[start : job.taken])
            for job, start in zip(jobs, before, strict=True)
            if job.taken > start
        ]
        served = [job for job, _ in shares if job.left]
        skipped = [job for job, start in zip(jobs, before, strict=True) if job.taken == start]
        self._jobs = deque(skipped + served)
        return shares

    def _encode(self, shares: list[_Share]) -> None:
        started = time.perf_counter()
        try:
            batch = _pack(shares)
            vectors = self._forward(batch)
        except Exception as error:
            log.exception("a forward pass failed")
            failed = {job for job, _ in shares}
            with self._lock:
                self._jobs = deque(job for job in self._jobs if job not in failed)
            _hand_back([(job, error) for job in failed])
            return
        now = time.perf_counter()
        self._observe(now - started, len(vectors), int(batch.offsets[-1]))
        start = 0
        finished: list[_Outcome] = []
        with self._lock:
            for job, rows in shares:
                if job.end(rows, vectors[start : start + len(rows)], now):
                    finished.append((job, None))
                start += len(rows)
            self.texts_encoded += len(vectors)
        _hand_back(finished)

    def _forward(self, batch: TokenBatch) -> Vectors:
        try:
            return self._backend.encode(batch)
        except OUT_OF_MEMORY:
            if len(batch) == 1:
                raise
            log.warning("no memory for %d texts at once: in two halves", len(batch))
        middle = int(np.searchsorted(batch.offsets, batch.offsets[-1] // 2))
        middle = min(max(middle, 1), len(batch) - 1)
        halves = batch.part(0, middle), batch.part(middle, len(batch))
        return np.concatenate([self._backend.encode(half) for half in halves])


def _work(texts: Sequence[str]) -> int:
    """What the admission counts: characters that are read."""
    return sum(min(len(text), READ_CHARACTERS) for text in texts)


def _pack(shares: Sequence[_Share]) -> TokenBatch:
    return TokenBatch.joined(
        [job.tokens if len(job.texts) == 1 else job.tokens.of_rows(rows) for job, rows in shares]
    )


def _hand_back(outcomes: Sequence[_Outcome]) -> None:
    """Resolves the calls' futures, on their event loops: each is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for outcome in outcomes:
        by_loop.setdefault(outcome[0].future.get_loop(), []).append(outcome)
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, some)
        except RuntimeError:  # its event loop is gone, and so is whoever waited
            log.debug("a result came after its event loop was closed")


def _resolve(outcomes: Sequence[_Outcome]) -> None:
    for job, error in outcomes:
        if job.future.done():  # cancelled meanwhile
            continue
        if error is None:
            job.future.set_result((job.out, job.timing))
        else:
            job.future.set_exception(error)


def _shutting_down() -> UnavailableError:
    return UnavailableError("the service is shutting down", reason="SHUTTING_DOWN")

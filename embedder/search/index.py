"""Vectors of one collection by id, searched by inner product.

Ids have dense slots (see slots.py). A small collection is searched exactly; a larger one has an
accelerator, an approximate index that covers the first slots, while the slots behind them, the
tail, are searched exactly. No index on a GPU can remove or replace, and the GPU's flat index
silently ignores id selectors, so dead slots stay in the accelerator as well: a search asks for more
hits than it needs and drops the dead ones. `maintain`, called in the background, extends the
accelerator, builds it anew, and drops dead slots.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.search.accelerators import LEAST, Accelerator, has_gpu
from embedder.search.building import TESTED, Asked, Build, tune
from embedder.search.exact import Hits
from embedder.search.lock import ReadWriteLock
from embedder.search.searcher import Filter, Searcher
from embedder.search.slots import Slots, SlotTable
from embedder.settings import IndexKind
from foretell.vectors import Vectors

__all__ = ["Filter", "Frozen", "Hits", "IndexOptions", "VectorIndex"]

APPROXIMATE_FROM = 30_000
"""Where the product for 16 waiting queries of 384 columns begins to take longer than the 16 calls
around it, about 5 ms."""

GPU_APPROXIMATE_FROM = 5_000_000
"""Not measured: there a GPU's memory is read through in about 3 ms at 384 columns."""

DEAD_SHARE = 0.25
"""Share of dead slots from which they are dropped..."""

DEAD_LEAST = 1_024
"""... unless there are fewer than this."""

TAIL_LEAST = 1_024
"""Slots that the accelerator may lack."""

STEP_S = 0.02
"""Seconds that searches may have to wait for the accelerator's extension, about."""


@dataclass(frozen=True)
class IndexOptions:
    """How collections are searched."""

    kind: IndexKind = IndexKind.AUTO
    approximate_from: int = APPROXIMATE_FROM
    """Vectors from which `auto` is approximate; on a GPU GPU_APPROXIMATE_FROM at least."""
    threads: int = 0
    """Of faiss in the background; 0: as many as it likes."""

    def accelerator(self, count: int) -> str | None:
        """Kind of the accelerator for so many vectors; None: exact search without one."""
        if count < LEAST:
            return None
        gpu = has_gpu()
        least = max(self.approximate_from, GPU_APPROXIMATE_FROM if gpu else 0)
        if self.kind is IndexKind.IVF or (self.kind is IndexKind.AUTO and count >= least):
            return "gpu_ivf" if gpu else "ivf_rabitq"
        return "gpu_flat" if gpu else None


DEFAULT_OPTIONS = IndexOptions()


@dataclass(frozen=True)
class Frozen:
    """What an index held at one moment; nothing of it changes any more."""

    ids: list[str]
    """One per slot, dead ones included."""
    seqs: NDArray[np.int64]
    """Of each slot's last change; -1: dead."""
    rows: Vectors
    """float32 (slots, cols), a read-only view."""
    accelerator: Accelerator | None
    """Covers the first slots; for the thread that calls `maintain` only."""


class VectorIndex:
    """Ids and vectors with the seq of each one's last change.

    All methods may be called from any thread. Searches may run side by side; a change excludes
    them for a moment.
    """

    def __init__(self, cols: int, options: IndexOptions = DEFAULT_OPTIONS) -> None:
        self.cols = cols
        self._options = options
        self._table = SlotTable(cols)
        self._accelerator: Accelerator | None = None
        self._lock = ReadWriteLock()
        self._changing = threading.Lock()
        """Held by whoever changes the table, also while searches go on."""
        self._maintaining = threading.Lock()
        self._build: Build | None = None
        self._asked = Asked(cols)
        self._tuned_at = TESTED
        """Queries noted, from which the accelerator is tuned again."""
        self._step_rows = 16
        """Vectors that the accelerator takes in about STEP_S."""

    @classmethod
    def restored(cls, cols: int, options: IndexOptions, frozen: Frozen) -> VectorIndex:
        """An index of what another one held; its arrays may have room behind the slots."""
        index = cls(cols, options)
        index._table = SlotTable.over(list(frozen.ids), frozen.seqs.copy(), frozen.rows)
        index._accelerator = frozen.accelerator
        return index

    def __len__(self) -> int:
        return len(self._table.slots)

    @property
    def name(self) -> str:
        """How it is searched now: the accelerator's kind, or `exact`."""
        accelerator = self._accelerator
        return "exact" if accelerator is None else accelerator.kind

    @property
    def covered(self) -> int:
        """Slots that the accelerator covers, dead ones included."""
        accelerator = self._accelerator
        return 0 if accelerator is None else accelerator.covered

    @property
    def lag(self) -> int:
        """Slots that wait for the accelerator; until it covers them they are searched exactly."""
        if self._accelerator is None and self._options.accelerator(len(self)) is None:
            return 0
        return len(self._table) - self.covered

    @property
    def recall(self) -> float | None:
        """Share of the 10 best that is found; None: not measured yet."""
        accelerator = self._accelerator
        return 1.0 if accelerator is None else accelerator.recall

    # --- changes and reads -----------------------------------------------------------------------

    def put(self, ids: Sequence[str], vectors: Vectors, seqs: int | NDArray[np.int64]) -> None:
        """Inserts or replaces vectors of different ids; `seqs`: of all, or one each."""
        if not ids:
            return
        with self._changing:
            self._table.write(vectors, seqs)
            with self._lock.write():
                self._table.name(ids)

    def remove(self, ids: Sequence[str]) -> None:
        """Deletes those of the ids that are there."""
        with self._changing, self._lock.write():
            self._table.bury(ids)

    def get(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Copies of the vectors of those ids that are there."""
        with self._lock.read():
            table = self._table
            known = [id for id in ids if id in table.slots]
            rows = table.rows[[table.slots[id] for id in known]] if known else ()
            return dict(zip(known, rows, strict=True))

    def known(self, ids: Sequence[str]) -> list[bool]:
        """Whether each id is there."""
        slots = self._table.slots
        return [id in slots for id in ids]

    def chunks(self, size: int = 8_192) -> Iterator[tuple[list[str], Vectors, NDArray[np.int64]]]:
        """All ids, vectors and seqs, some at a time, from the only thread that makes changes."""
        table = self._table
        slots = table.live()
        for start in range(0, len(slots), size):
            some = slots[start : start + size]
            yield [table.ids[slot] for slot in some], table.rows[some], table.seqs[some]

    def changed_after(self, seq: int) -> tuple[list[str], NDArray[np.int64]]:
        """Ids whose last change has a larger seq, in the order of the changes, and those seqs."""
        with self._lock.read():
            table = self._table
            seqs = table.seqs[: len(table)]
            slots = np.flatnonzero(seqs > max(seq, -1))
            slots = slots[np.argsort(seqs[slots], kind="stable")]
            return [table.ids[slot] for slot in slots], seqs[slots]

    def frozen(self) -> Frozen:
        """What it holds now. The rows are not copied."""
        with self._lock.read():
            table = self._table
            rows = table.rows[: len(table)]
            rows.flags.writeable = False
            return Frozen(list(table.ids), table.seqs[: len(table)].copy(), rows, self._accelerator)

    # --- search ----------------------------------------------------------------------------------

    def search(
        self,
        queries: Vectors,
        k: int | Slots,
        filters: Sequence[Filter] | None = None,
        *,
        include_vectors: bool = False,
    ) -> list[Hits]:
        """The `k` best of each query, fewer only where fewer pass its filter.

        Args:
            queries: float32 (queries, cols).
            k: of all queries, or one each.
            filters: none, or one per query.
            include_vectors: whether the hits have their vectors.
        """
        if self._accelerator is not None:
            self._asked.note(queries)
        with self._lock.read():
            return Searcher(self._table, self._accelerator).search(
                queries, k, filters, include_vectors=include_vectors
            )

    # --- upkeep ----------------------------------------------------------------------------------

    def maintain(self) -> bool:
        """A step of upkeep beside searches and changes; whether there was anything to do."""
        with self._maintaining:
            if self._options.threads:
                faiss.omp_set_num_threads(self._options.threads)
            if self._build is None:
                self._build = self._planned()
            if self._build is None:
                return self._extend() or self._tune()
            if self._build.step(self._asked):
                self._install(self._build)
                self._build = None
            return True

    def _planned(self) -> Build | None:
        """What has to be built anew."""
        table, accelerator = self._table, self._accelerator
        compact = table.dead >= max(DEAD_LEAST, DEAD_SHARE * len(table))
        present = None if accelerator is None else accelerator.kind
        # It stays below its size, down to the half: a collection may go back and forth.
        kinds = [self._options.accelerator(count) for count in (len(self), 2 * len(self))]
        kind = present if present in kinds else kinds[0]
        unfit = accelerator is not None and not accelerator.fits(len(self))
        if not compact and not unfit and kind == present:
            return None
        return Build(table, kind, compact=compact)

    def _install(self, build: Build) -> None:
        """Puts it in the place of the present table and accelerator."""
        with self._changing:
            if build.compaction is not None:
                build.compaction.catch_up()
            with self._lock.write():
                self._table = build.table
                self._accelerator = build.accelerator

    def _extend(self) -> bool:
        """Makes the accelerator cover some more slots."""
        accelerator = self._accelerator
        if accelerator is None or len(self._table) - accelerator.covered < TAIL_LEAST:
            return False
        first = accelerator.covered
        end = min(len(self._table), first + self._step_rows)
        rows = self._table.rows[first:end]  # after the length: they may move to a larger array
        with self._lock.write():
            started = time.perf_counter()
            accelerator.add(rows)
            taken = time.perf_counter() - started
        self._step_rows = max(1, min(2 * self._step_rows, int(len(rows) * STEP_S / taken)))
        return True

    def _tune(self) -> bool:
        """Tunes an accelerator that was restored, or when there are new queries to learn from."""
        accelerator, count = self._accelerator, self._asked.count
        if accelerator is None or (accelerator.recall is not None and count < self._tuned_at):
            return False
        tune(self._table, accelerator, self._asked.sample())
        self._tuned_at = max(TESTED, 4 * count)
        return True

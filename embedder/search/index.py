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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedder.search import exact
from embedder.search.accelerators import KINDS, Accelerator
from embedder.search.exact import Hits, Pairs
from embedder.search.lock import ReadWriteLock
from embedder.search.slots import Compaction, Slots, SlotTable
from foretell.vectors import Vectors

__all__ = ["Filter", "Frozen", "Hits", "IndexOptions", "VectorIndex"]

SPARE_HITS = 16
"""Hits beyond k in the first attempt: enough for some dead slots and for ties at the end."""

MOST_DENIED = 1_000
"""Denied ids up to which a search asks for so many more hits; beyond, it looks among the others."""

SELECTED_SHARE = 0.1
"""Share of allowed slots from which the accelerator looks for them; below, they are scored."""

DEAD_SHARE = 0.25
"""Share of dead slots from which they are dropped..."""

DEAD_LEAST = 1_024
"""... unless there are fewer than this."""

TAIL_LEAST = 1_024
"""Slots that the accelerator may lack."""

STEP_S = 0.02
"""Seconds that searches may have to wait for the accelerator's extension, about."""

BUILD_STEP_S = 1.0
"""Seconds of a step beside searches, about."""

ADDED_TOGETHER = 1_024
"""Vectors added to a new accelerator at a time."""


@dataclass(frozen=True)
class IndexOptions:
    """How collections are searched."""

    kind: str = "auto"
    """Of the accelerator: a name in accelerators.KINDS; `exact`: none; `auto`: the best by size."""
    approximate_from: int = 100_000
    """Vectors from which there is an accelerator."""

    def accelerator(self, count: int) -> str | None:
        """Kind for so many vectors; None: exact search."""
        if self.kind == "exact" or count < self.approximate_from:
            return None
        return next(iter(KINDS)) if self.kind == "auto" else self.kind


DEFAULT_OPTIONS = IndexOptions()


@dataclass(frozen=True)
class Filter:
    """What one query may answer. Queries that share one object are searched together."""

    allow: Collection[str] | None = None
    """Only these ids; None: all."""
    deny: Collection[str] = frozenset()
    """None of these ids."""


NO_FILTER = Filter()


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


class _Build:
    """An accelerator in the making, of a table that goes on changing or of its compacted copy."""

    def __init__(self, source: SlotTable, kind: str | None, *, compact: bool) -> None:
        self.compaction = Compaction(source) if compact else None
        self.table = source if self.compaction is None else self.compaction.table
        self.accelerator: Accelerator | None = None
        if kind is not None:
            self.accelerator = Accelerator.trained(kind, self.table.rows[: len(self.table)])

    def step(self) -> bool:
        """Adds some vectors; whether all are in."""
        if self.accelerator is None:
            return True
        until = time.monotonic() + BUILD_STEP_S
        while time.monotonic() < until:
            first = self.accelerator.covered
            end = min(len(self.table), first + ADDED_TOGETHER)
            if first == end:
                return True
            self.accelerator.add(self.table.rows[first:end])
        return False


class VectorIndex:
    """Ids and vectors with the seq of each one's last change.

    All methods may be called from any thread. Searches run side by side; a change excludes them
    for a moment.
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
        self._build: _Build | None = None
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
        """How it is searched: the accelerator's kind, or `exact`."""
        accelerator = self._accelerator
        return "exact" if accelerator is None else accelerator.kind

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
        k: int | Sequence[int],
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
        wanted = np.broadcast_to(np.asarray(k, np.int64), len(queries))
        with self._lock.read():
            parts = [
                Pairs(group[found.query], found.slot)
                for group, found in self._candidates(queries, wanted, filters)
            ]
            return exact.best(queries, Pairs.joined(parts), self._table, wanted, include_vectors)

    def _candidates(
        self, queries: Vectors, k: Slots, filters: Sequence[Filter] | None
    ) -> Iterator[tuple[Slots, Pairs]]:
        """Groups of queries, and slots among which their best are."""
        table = self._table
        filters = filters or [NO_FILTER] * len(queries)
        by_filter: dict[int, list[int]] = {}
        for query, one in enumerate(filters):
            by_filter.setdefault(id(one), []).append(query)
        open_queries: dict[int, list[int]] = {}
        denied: dict[int, Slots] = {}
        for members in by_filter.values():
            one = filters[members[0]]
            without = table.find(one.deny)
            if one.allow is not None or len(without) > MOST_DENIED:
                slots = table.live() if one.allow is None else table.find(one.allow)
                group = np.array(members)
                slots = np.setdiff1d(slots, without)
                yield group, self._among(queries[group], k[group], slots)
                continue
            for query in members:
                hits = _rounded(int(k[query]) + SPARE_HITS + len(without))
                open_queries.setdefault(hits, []).append(query)
                if len(without):
                    denied[query] = without
        for hits, members in open_queries.items():
            group = np.array(members)
            own = {row: denied[query] for row, query in enumerate(members) if query in denied}
            yield group, self._everywhere(queries[group], k[group], hits, own)

    def _everywhere(self, queries: Vectors, k: Slots, hits: int, denied: dict[int, Slots]) -> Pairs:
        """Slots among which the best of each query are, but those denied to it."""
        table, accelerator = self._table, self._accelerator
        covered = 0 if accelerator is None else accelerator.covered
        alive = table.seqs[: len(table)] >= 0
        behind = {row: slots - covered for row, slots in denied.items()}
        rows = table.rows[covered : len(table)]
        tail = exact.nearest(queries, rows, k, hits, alive[covered:], behind)
        tail = Pairs(tail.query, tail.slot + covered)
        if accelerator is None:
            return tail
        first = self._accelerated(accelerator, queries, k, hits, alive[:covered], denied)
        return Pairs.joined([first, tail])

    def _accelerated(
        self,
        accelerator: Accelerator,
        queries: Vectors,
        k: Slots,
        hits: int,
        alive: NDArray[np.bool_],
        denied: dict[int, Slots],
        allowed: NDArray[np.bool_] | None = None,
    ) -> Pairs:
        """What the accelerator finds; exact search where it finds fewer than there are."""
        waiting = np.arange(len(queries))
        parts: list[Pairs] = []
        count = int(np.count_nonzero(alive if allowed is None else allowed))
        least = np.minimum(k, [count - len(denied.get(row, ())) for row in range(len(queries))])
        while len(waiting) and hits <= accelerator.most_hits:
            _, found = accelerator.search(queries[waiting], hits, allowed)
            passing = exact.passes(found, waiting, alive, denied)
            done = np.count_nonzero(passing, axis=1) >= least[waiting]
            row, place = np.nonzero(passing & done[:, None])
            parts.append(Pairs(waiting[row], found[row, place]))
            waiting = waiting[~done]
            hits *= 4
        if len(waiting):
            rows = self._table.rows[: len(alive)]
            own = {
                row: denied[query] for row, query in enumerate(waiting.tolist()) if query in denied
            }
            left = alive if allowed is None else allowed
            rest = exact.nearest(queries[waiting], rows, k[waiting], hits, left, own)
            parts.append(Pairs(waiting[rest.query], rest.slot))
        return Pairs.joined(parts)

    def _among(self, queries: Vectors, k: Slots, slots: Slots) -> Pairs:
        """Those of some slots, ascending and alive, among which the best of each query are."""
        hits = _rounded(int(k.max()) + SPARE_HITS)
        accelerator, rows = self._accelerator, self._table.rows
        parts = []
        if accelerator is not None and accelerator.selects:
            covered = accelerator.covered
            first, rest = np.split(slots, [np.searchsorted(slots, covered)])
            if len(first) >= SELECTED_SHARE * covered:
                slots = rest
                allowed = np.zeros(covered, np.bool_)
                allowed[first] = True
                parts.append(self._accelerated(accelerator, queries, k, hits, allowed, {}, allowed))
        parts.append(exact.nearest_of(queries, rows, slots, k, hits))
        return Pairs.joined(parts)

    # --- upkeep ----------------------------------------------------------------------------------

    def maintain(self) -> bool:
        """A step of upkeep beside searches and changes; whether there was anything to do."""
        with self._maintaining:
            if self._build is None:
                self._build = self._planned()
            if self._build is None:
                return self._extend()
            if self._build.step():
                self._install(self._build)
                self._build = None
            return True

    def _planned(self) -> _Build | None:
        """What has to be built anew."""
        table, accelerator = self._table, self._accelerator
        compact = table.dead >= max(DEAD_LEAST, DEAD_SHARE * len(table))
        kind = self._options.accelerator(len(self))
        other = kind != (None if accelerator is None else accelerator.kind)
        grown = accelerator is not None and len(table) > 2 * accelerator.covered
        return _Build(table, kind, compact=compact) if compact or other or grown else None

    def _install(self, build: _Build) -> None:
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
        rows = self._table.rows[first : min(len(self._table), first + self._step_rows)]
        with self._lock.write():
            started = time.perf_counter()
            accelerator.add(rows)
            taken = time.perf_counter() - started
        self._step_rows = max(1, min(2 * self._step_rows, int(len(rows) * STEP_S / taken)))
        return True


def _rounded(hits: int) -> int:
    """The next power of two, so that queries with about the same number are searched together."""
    return 1 << (hits - 1).bit_length()

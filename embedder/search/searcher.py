"""A search: which slots may be the best, and which of them are."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.search import exact
from embedder.search.accelerators import Accelerator
from embedder.search.exact import Hits, Pairs
from embedder.search.slots import Slots, SlotTable
from foretell.vectors import Vectors

SPARE_HITS = 16
"""Hits beyond k in the first attempt: enough for some dead slots and for ties at the end."""

MOST_DENIED = 1_000
"""Denied ids up to which a search asks for so many more hits; beyond, it looks among the others."""

SELECTED_LEAST = 4_096
"""Allowed slots up to which they are scored rather than looked for with the accelerator..."""

SELECTED_SHARE = 0.02
"""... and their share of its slots."""

QUERIES_A_THREAD = 16
"""Of a search with an accelerator, some 0.5 ms. Threads that share less wait for one another, on a
busy machine for ten times as long."""

AllSlots = NDArray[np.bool_]
"""Which slots are alive, or allowed, shape (slots,)."""


@dataclass(frozen=True)
class Filter:
    """What one query may answer."""

    allow: Collection[str] | None = None
    """Only these ids; None: all. Queries that share one object are searched together."""
    deny: frozenset[str] = frozenset()
    """None of these ids."""


NO_FILTER = Filter()


@dataclass(frozen=True)
class Searcher:
    """Searches a table, which must not change meanwhile, with the help of an accelerator."""

    table: SlotTable
    accelerator: Accelerator | None

    def search(
        self,
        queries: Vectors,
        k: int | Slots,
        filters: Sequence[Filter] | None = None,
        *,
        include_vectors: bool = False,
    ) -> list[Hits]:
        """See `VectorIndex.search`."""
        queries = np.ascontiguousarray(queries, np.float32)
        wanted = np.broadcast_to(np.asarray(k, np.int64), len(queries))
        with _threads(self._worth(len(queries))):
            groups = self._groups(queries, wanted, filters or [NO_FILTER] * len(queries))
            pairs = Pairs.joined([Pairs(group[each.query], each.slot) for group, each in groups])
            return exact.best(queries, pairs, self.table, wanted, include_vectors)

    def _worth(self, queries: int) -> int:
        """Threads that so many queries keep busy."""
        if self.accelerator is not None:
            return queries // QUERIES_A_THREAD
        products: int = queries * self.table.rows.shape[1] * len(self.table)
        return products // exact.A_THREAD

    def _groups(
        self, queries: Vectors, k: Slots, filters: Sequence[Filter]
    ) -> Iterator[tuple[Slots, Pairs]]:
        """Queries that are searched together, and slots among which the best of each are."""
        by_filter: dict[tuple[int, frozenset[str]], list[int]] = {}
        for query, one in enumerate(filters):
            by_filter.setdefault((id(one.allow), one.deny), []).append(query)
        by_hits: dict[int, list[int]] = {}
        denied: dict[int, Slots] = {}
        for members in by_filter.values():
            one = filters[members[0]]
            without = self.table.find(one.deny)
            if one.allow is not None or len(without) > MOST_DENIED:
                group = np.array(members)
                slots = self._passing(one.allow, without)
                yield group, self._among(queries[group], k[group], slots)
                continue
            for query in members:
                by_hits.setdefault(_rounded(int(k[query]) + len(without)), []).append(query)
                if len(without):
                    denied[query] = without
        for hits, members in by_hits.items():
            group = np.array(members)
            own = {row: denied[query] for row, query in enumerate(members) if query in denied}
            yield group, self._everywhere(queries[group], k[group], hits, own)

    def _passing(self, allow: Collection[str] | None, without: Slots) -> Slots:
        """Slots that a filter lets through, ascending."""
        passing = self.table.seqs[: len(self.table)] >= 0
        if allow is not None:
            passing = np.zeros(len(self.table), np.bool_)
            passing[self.table.find(allow)] = True
        passing[without] = False
        return np.flatnonzero(passing)

    def _everywhere(self, queries: Vectors, k: Slots, hits: int, denied: dict[int, Slots]) -> Pairs:
        """Slots among which the best of each query are, but those denied to it."""
        table, accelerator = self.table, self.accelerator
        alive = table.seqs[: len(table)] >= 0
        rows = table.rows[: len(alive)]  # not len(table): `tune` searches beside changes
        if accelerator is None:
            return exact.nearest(queries, rows, k, hits, alive, denied)
        covered = accelerator.covered
        behind = {row: slots - covered for row, slots in denied.items()}
        tail = exact.nearest(queries, rows[covered:], k, hits, alive[covered:], behind)
        first = self._accelerated(accelerator, queries, k, hits, alive[:covered], denied)
        return Pairs.joined([first, Pairs(tail.query, tail.slot + covered)])

    def _among(self, queries: Vectors, k: Slots, slots: Slots) -> Pairs:
        """Those of some slots, ascending and alive, among which the best of each query are."""
        hits = _rounded(int(k.max()))
        accelerator, rows = self.accelerator, self.table.rows
        parts = []
        if accelerator is not None and accelerator.selects:
            covered = accelerator.covered
            first, rest = np.split(slots, [np.searchsorted(slots, covered)])
            if len(first) >= max(SELECTED_LEAST, SELECTED_SHARE * covered):
                slots = rest
                allowed = np.zeros(covered, np.bool_)
                allowed[first] = True
                parts.append(self._accelerated(accelerator, queries, k, hits, allowed, select=True))
        parts.append(exact.nearest_of(queries, rows, slots, k, hits))
        return Pairs.joined(parts)

    def _accelerated(
        self,
        accelerator: Accelerator,
        queries: Vectors,
        k: Slots,
        hits: int,
        passing: AllSlots,
        denied: dict[int, Slots] | None = None,
        *,
        select: bool = False,
    ) -> Pairs:
        """What the accelerator finds; exact search where it finds fewer than k of those there are.

        Args:
            accelerator: of the first slots.
            queries: float32 (queries, cols).
            k: how many of each query.
            hits: to ask it for.
            passing: which slots count, as many as it covers.
            denied: by query, slots that do not count.
            select: whether it is told which slots count, for they may be few.
        """
        denied = denied or {}
        without = np.zeros(len(queries), np.int64)
        for query, slots in denied.items():
            without[query] = np.count_nonzero(slots < len(passing))
        waiting = np.arange(len(queries))
        parts: list[Pairs] = []
        while len(waiting) and hits <= accelerator.most_hits:
            found = accelerator.search(queries[waiting], hits, passing if select else None)
            counted = exact.passes(found, waiting, passing, denied)
            enough = np.count_nonzero(counted, axis=1) >= k[waiting]
            if not enough.all():  # are there more at all?
                left = np.count_nonzero(passing)
                most = left - without[waiting]
                enough = np.count_nonzero(counted, axis=1) >= np.minimum(k[waiting], most)
            row, place = np.nonzero(counted & enough[:, None])
            parts.append(Pairs(waiting[row], found[row, place]))
            waiting = waiting[~enough]
            hits *= 4
        if len(waiting):
            own = {row: denied[each] for row, each in enumerate(waiting.tolist()) if each in denied}
            rows = self.table.rows[: len(passing)]
            hits = _rounded(int(k[waiting].max()))
            rest = exact.nearest(queries[waiting], rows, k[waiting], hits, passing, own)
            parts.append(Pairs(waiting[rest.query], rest.slot))
        return Pairs.joined(parts)


@contextlib.contextmanager
def _threads(worth: int) -> Iterator[None]:
    """Has faiss use no more of this thread's threads than the work is worth."""
    most = faiss.omp_get_max_threads()
    if worth >= most:
        yield
        return
    faiss.omp_set_num_threads(max(1, worth))
    try:
        yield
    finally:
        faiss.omp_set_num_threads(most)


def _rounded(hits: int) -> int:
    """Hits to ask for: a power of two, so that queries with about the same go together."""
    return 1 << (hits + SPARE_HITS - 1).bit_length()

"""Vectors of one collection by id, searched exactly by inner product with FAISS.

FAISS gets dense slots and is only appended to, because no index on a GPU can remove or replace, and
the GPU's flat index silently ignores id selectors. A replaced or deleted vector leaves a dead slot:
a search asks for more hits than it needs and drops the dead ones; when many are dead the index is
built anew.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.search.lock import ReadWriteLock
from foretell.vectors import Vectors

SPARE_HITS = 16
"""Hits beyond k in the first attempt: enough for some dead slots and for ties at the end."""

TIE = 1e-5
"""Scores may differ by this much (relative) with the place of a vector in a matrix product."""

FAISS_GPU_HITS = 2_048
"""Most hits that FAISS' GPU indexes give."""

DEAD_SHARE = 0.25
"""Share of dead slots from which the index is built anew..."""

DEAD_LEAST = 1_024
"""... unless there are fewer than this."""

Slots = NDArray[np.int64]


class FlatIndex(Protocol):
    """What is needed of FAISS: the same for CPU and GPU."""

    name: str
    """As faiss names it."""
    parallel: bool
    """Whether searches may run side by side."""
    most_hits: int
    """Hits that one search may ask for."""

    def add(self, vectors: Vectors) -> None:
        """Appends rows."""

    def search(self, queries: Vectors, hits: int) -> tuple[Vectors, Slots]:
        """Scores and slots, best first, each of shape (queries, hits)."""

    def rows(self) -> Vectors:
        """All vectors, shape (slots, cols): a view, valid until the next `add`."""


class CpuFlatIndex:
    """faiss.IndexFlatIP in memory. Implements `FlatIndex`."""

    name = "IndexFlatIP"
    parallel = True
    most_hits = 2**31 - 1

    def __init__(self, cols: int) -> None:
        self._cols = cols
        self._index = faiss.IndexFlatIP(cols)

    def add(self, vectors: Vectors) -> None:
        """Appends rows."""
        self._index.add(vectors)

    def search(self, queries: Vectors, hits: int) -> tuple[Vectors, Slots]:
        """Scores and slots, best first, each of shape (queries, hits)."""
        return self._index.search(queries, hits)

    def rows(self) -> Vectors:
        """All vectors, shape (slots, cols): a view of FAISS' own memory."""
        count = self._index.ntotal
        if not count:
            return np.empty((0, self._cols), np.float32)
        flat = faiss.rev_swig_ptr(self._index.get_xb(), count * self._cols)
        return np.asarray(flat).reshape(count, self._cols)


class GpuFlatIndex:
    """faiss.GpuIndexFlatIP, and the vectors once more in main memory. Implements `FlatIndex`."""

    name = "GpuIndexFlatIP"
    parallel = False
    most_hits = FAISS_GPU_HITS

    def __init__(self, cols: int) -> None:
        self._host = CpuFlatIndex(cols)
        self._resources = faiss.StandardGpuResources()
        self._index = faiss.GpuIndexFlatIP(self._resources, cols)

    def add(self, vectors: Vectors) -> None:
        """Appends rows."""
        self._host.add(vectors)
        self._index.add(vectors)

    def search(self, queries: Vectors, hits: int) -> tuple[Vectors, Slots]:
        """Scores and slots, best first, each of shape (queries, hits)."""
        return self._index.search(queries, hits)

    def rows(self) -> Vectors:
        """All vectors, shape (slots, cols): a view of the copy in main memory."""
        return self._host.rows()


def flat_index(cols: int) -> FlatIndex:
    """On the GPU where this faiss has one, otherwise on the CPU."""
    on_gpu = getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    return GpuFlatIndex(cols) if on_gpu else CpuFlatIndex(cols)


@dataclass(frozen=True)
class Filter:
    """What one query may answer."""

    allow: tuple[str, ...] | None = None
    """Only these ids; None: all."""
    deny: frozenset[str] = frozenset()
    """None of these ids."""


@dataclass(frozen=True)
class Hits:
    """The answer to one query, best first; equal scores in the order of the ids."""

    ids: list[str]
    scores: NDArray[np.float32]
    """Inner products, shape (hits,)."""
    vectors: Vectors | None
    """Shape (hits, cols), if asked for."""


class VectorIndex:
    """Ids and vectors with the seq of each one's last change.

    Searches may run side by side (on a CPU); a change excludes them.
    """

    def __init__(self, cols: int) -> None:
        self.cols = cols
        self._flat = flat_index(cols)
        self._lock = ReadWriteLock()
        self._gpu = contextlib.nullcontext() if self._flat.parallel else threading.Lock()
        self._slots: dict[str, int] = {}
        self._ids: list[str] = []
        self._seqs = np.empty(0, np.int64)
        """Seq of each slot; -1 where it is dead. Longer than there are slots."""

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def name(self) -> str:
        """The index's kind, as faiss names it."""
        return self._flat.name

    def put(self, ids: Sequence[str], vectors: Vectors, seqs: int | NDArray[np.int64]) -> None:
        """Inserts or replaces vectors of different ids; `seqs`: of all, or one each."""
        if not ids:
            return
        with self._lock.write():
            self._bury(ids)
            first, end = len(self._ids), len(self._ids) + len(ids)
            self._flat.add(np.ascontiguousarray(vectors, np.float32))
            self._ids.extend(ids)
            self._slots.update(zip(ids, range(first, end), strict=True))
            if end > len(self._seqs):
                self._seqs = np.resize(self._seqs, max(end, 2 * len(self._seqs), 64))
            self._seqs[first:end] = seqs
            self._compact()

    def remove(self, ids: Sequence[str]) -> None:
        """Deletes those of the ids that are there."""
        with self._lock.write():
            self._bury(ids)
            self._compact()

    def get(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Copies of the vectors of those ids that are there."""
        with self._lock.read():
            known = [id for id in ids if id in self._slots]
            rows = self._flat.rows()[[self._slots[id] for id in known]] if known else ()
            return dict(zip(known, rows, strict=True))

    def known(self, ids: Sequence[str]) -> list[bool]:
        """Whether each id is there."""
        return [id in self._slots for id in ids]

    def chunks(self, size: int = 8_192) -> Iterator[tuple[list[str], Vectors, NDArray[np.int64]]]:
        """All ids, vectors and seqs, some at a time, from the only thread that makes changes."""
        slots = self._live()
        for start in range(0, len(slots), size):
            some = slots[start : start + size]
            yield [self._ids[slot] for slot in some], self._flat.rows()[some], self._seqs[some]

    def changed_after(self, seq: int) -> tuple[list[str], NDArray[np.int64]]:
        """Ids whose last change has a larger seq, in the order of the changes, and those seqs."""
        with self._lock.read():
            seqs = self._seqs[: len(self._ids)]
            slots = np.flatnonzero(seqs > max(seq, -1))
            slots = slots[np.argsort(seqs[slots], kind="stable")]
            return [self._ids[slot] for slot in slots], seqs[slots]

    def search(
        self,
        queries: Vectors,
        k: int,
        filters: Sequence[Filter] | None = None,
        *,
        include_vectors: bool = False,
    ) -> list[Hits]:
        """The `k` best of each query, fewer only where fewer pass its filter.

        `filters`: none, or one per query.
        """
        filters = filters or [Filter()] * len(queries)
        with self._lock.read():
            slots = self._candidates(queries, k, filters)
            rows = self._flat.rows()
            return [
                self._best(query, found, rows, k, include_vectors)
                for query, found in zip(queries, slots, strict=True)
            ]

    def _candidates(self, queries: Vectors, k: int, filters: Sequence[Filter]) -> list[Slots]:
        """Slots of each query among which its `k` best are, ties with the last one included."""
        found: list[Slots] = [np.empty(0, np.int64)] * len(queries)
        open_queries = []
        for index, filter in enumerate(filters):
            if filter.allow is None:
                open_queries.append(index)
            else:
                allowed = {id for id in filter.allow if id not in filter.deny}
                known = [self._slots[id] for id in allowed if id in self._slots]
                found[index] = np.array(known, np.int64)
        denied = {index: self._denied(filters[index]) for index in open_queries}
        hits = k + SPARE_HITS + max((len(slots) for slots in denied.values()), default=0)
        while open_queries:
            hits = min(hits, len(self._ids))
            if hits > self._flat.most_hits:  # a long list of ties or denials, on a GPU
                for index in open_queries:
                    found[index] = np.setdiff1d(self._live(), denied[index])
                break
            if hits == 0:
                break
            with self._gpu:
                scores, slots = self._flat.search(queries[open_queries], hits)
            again = []
            for row, index in enumerate(open_queries):
                found[index], enough = self._passing(scores[row], slots[row], denied[index], k)
                if not enough and hits < len(self._ids):
                    again.append(index)
            open_queries = again
            hits *= 4
        return found

    def _passing(
        self, scores: NDArray[np.float32], slots: Slots, denied: Slots, k: int
    ) -> tuple[Slots, bool]:
        """Hits that are alive and not denied; whether the `k` best must be among them."""
        keep = (slots >= 0) & (self._seqs[slots] >= 0)  # -1: no hit, where numbers overflow
        if len(denied):
            keep &= ~np.isin(slots, denied)
        passing = scores[keep]
        if len(passing) < k:
            return slots[keep], False
        margin = TIE * max(1.0, abs(float(passing[k - 1])))
        return slots[keep], bool(scores[-1] < passing[k - 1] - margin)

    def _best(
        self, query: NDArray[np.float32], slots: Slots, rows: Vectors, k: int, include: bool
    ) -> Hits:
        """The `k` best of some slots, scored one by one.

        A score from a large matrix product depends in its last bits on the vector's place; so
        that equal vectors tie, each is computed again in one order of additions.
        """
        vectors = rows[slots]
        scores = np.einsum("ij,j->i", vectors, query)
        if len(slots) > k:
            # Before sorting: drop what cannot be among the best.
            least = np.partition(scores, len(scores) - k)[len(scores) - k]
            good = np.flatnonzero(scores >= least)
            slots, scores, vectors = slots[good], scores[good], vectors[good]
        ids = [self._ids[slot] for slot in slots]
        keys = list(zip((-scores).tolist(), ids, strict=True))
        order = sorted(range(len(keys)), key=keys.__getitem__)[:k]
        return Hits(
            [ids[position] for position in order],
            scores[order],
            np.ascontiguousarray(vectors[order]) if include else None,
        )

    def _denied(self, filter: Filter) -> Slots:
        slots = [self._slots[id] for id in filter.deny if id in self._slots]
        return np.array(slots, np.int64)

    def _live(self) -> Slots:
        return np.flatnonzero(self._seqs[: len(self._ids)] >= 0)

    def _bury(self, ids: Sequence[str]) -> None:
        dead = [self._slots.pop(id) for id in ids if id in self._slots]
        self._seqs[dead] = -1

    def _compact(self) -> None:
        """Builds the index anew without its dead slots, if there are many."""
        dead = len(self._ids) - len(self._slots)
        if dead < DEAD_LEAST or dead < DEAD_SHARE * len(self._ids):
            return
        live = self._live()
        flat = flat_index(self.cols)
        rows = self._flat.rows()
        for start in range(0, len(live), 65_536):
            flat.add(np.ascontiguousarray(rows[live[start : start + 65_536]]))
        self._flat = flat
        self._ids = [self._ids[slot] for slot in live]
        self._seqs = self._seqs[live]
        self._slots = {id: slot for slot, id in enumerate(self._ids)}

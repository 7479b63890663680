"""Exact search: matrix products over rows, and the order of hits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.search.slots import Slots, SlotTable
from foretell.vectors import Vectors

TIE = 1e-5
"""Scores may differ by this much (relative) with the place of a vector in a matrix product."""

GATHERED = 32_768
"""Rows that are copied together for a product over some of them: 48 MiB at 384 columns."""

A_THREAD = 50_000_000
"""Multiplications that are worth a thread: some 3 ms. Threads that share less wait for one another
longer than they work."""

if faiss.cvar.distance_compute_blas_threshold > 1_000:
    # From so many numbers in the queries on, a matrix product serves them together. faiss 1.15
    # begins at 128,000; from four queries of 384 on it is faster, at 64 six times.
    faiss.cvar.distance_compute_blas_threshold = 1_536


@dataclass(frozen=True)
class Hits:
    """The answer to one query, best first; equal scores in the order of the ids."""

    ids: list[str]
    scores: NDArray[np.float32]
    """Inner products, shape (hits,)."""
    vectors: Vectors | None
    """Shape (hits, cols), if asked for."""


@dataclass(frozen=True)
class Pairs:
    """Queries, each with slots that may be among its best."""

    query: Slots
    """Row of the query, shape (pairs,)."""
    slot: Slots
    """Shape (pairs,)."""

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """All together."""
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        return cls(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.slot for part in parts]),
        )


def nearest(
    queries: Vectors,
    rows: Vectors,
    k: Slots,
    hits: int,
    alive: NDArray[np.bool_] | None = None,
    denied: Mapping[int, Slots] | None = None,
) -> Pairs:
    """Rows among which the best of each query are, ties with the last one included.

    Args:
        queries: float32 (queries, cols).
        rows: float32 (rows, cols).
        k: how many of each query, shape (queries,).
        hits: of a query in the first attempt; four times as many in each further one.
        alive: which rows count, shape (rows,); None: all.
        denied: by query, rows that do not count.
    """
    waiting = np.arange(len(queries))
    parts: list[Pairs] = []
    while len(waiting) and len(rows):
        hits = min(hits, len(rows))
        scores, found = faiss.knn(queries[waiting], rows, hits, faiss.METRIC_INNER_PRODUCT)
        passing = passes(found, waiting, alive, denied)
        rank = passing.cumsum(axis=1)
        wanted = k[waiting, None]
        full = rank[:, -1:] >= wanted
        last = np.take_along_axis(scores, (rank >= wanted).argmax(axis=1)[:, None], axis=1)
        with np.errstate(invalid="ignore", over="ignore"):  # of numbers that overflow
            least = last - TIE * np.maximum(1, np.abs(last))
            done = (hits == len(rows)) | (full & (scores[:, -1:] < least))[:, 0]
            passing &= ~(full & (scores < least))
        row, place = np.nonzero(passing & done[:, None])
        parts.append(Pairs(waiting[row], found[row, place]))
        waiting = waiting[~done]
        hits *= 4
    return Pairs.joined(parts)


def nearest_of(queries: Vectors, rows: Vectors, slots: Slots, k: Slots, hits: int) -> Pairs:
    """As `nearest`, over some of the rows: their slots, each once."""
    parts = []
    for start in range(0, len(slots), GATHERED):
        some = slots[start : start + GATHERED]
        found = nearest(queries, rows[some], k, hits)
        parts.append(Pairs(found.query, some[found.slot]))
    return Pairs.joined(parts)


def passes(
    found: Slots,
    queries: Slots,
    alive: NDArray[np.bool_] | None,
    denied: Mapping[int, Slots] | None,
) -> NDArray[np.bool_]:
    """Which hits count, shape (queries, hits); `queries`: which ones these are in `denied`."""
    passing = found >= 0  # -1: no hit
    if alive is not None:
        passing &= alive[found]
    for row, query in enumerate(queries.tolist() if denied else ()):
        if len(slots := (denied or {}).get(query, ())):
            passing[row] &= ~np.isin(found[row], slots)
    return passing


def best(
    queries: Vectors, pairs: Pairs, table: SlotTable, k: Slots, include_vectors: bool
) -> list[Hits]:
    """The `k` best of each query among its pairs, each once, scored pair by pair.

    A score from a large matrix product depends in its last bits on the vector's place, and one
    from an approximate index on how it stores it; so each is computed again from the rows, in one
    order of additions, and equal vectors tie.
    """
    rows = table.rows  # held: a change may put a larger array in its place, and free this one
    scores = np.empty(len(pairs.slot), np.float32)
    scored: Any = faiss
    scored.pairwise_indexed_inner_product(
        queries.shape[1],
        len(scores),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(pairs.query),
        faiss.swig_ptr(rows),
        faiss.swig_ptr(pairs.slot),
        faiss.swig_ptr(scores),
    )
    order = np.argsort(_by_query_and_score(pairs.query, scores))
    query, slot, scores = pairs.query[order], pairs.slot[order], scores[order]
    first = np.searchsorted(query, np.arange(len(queries) + 1))
    last = np.minimum(first[1:], first[:-1] + k)
    # Of equal neighbours only those matter that begin among the best.
    equal = np.flatnonzero((scores[1:] == scores[:-1]) & (query[1:] == query[:-1]))
    for index in set(query[equal[equal < last[query[equal]]]].tolist()):
        some = slice(first[index], first[index + 1])
        _by_id(slot[some], scores[some], table.ids)
    taken = np.arange(len(slot)) < last[query]
    slot, scores = slot[taken], scores[taken]
    ids = list(map(table.ids.__getitem__, slot.tolist()))
    bounds = np.concatenate([[0], np.cumsum(last - first[:-1])]).tolist()
    return [
        Hits(ids[a:b], scores[a:b], rows[slot[a:b]] if include_vectors else None)
        for a, b in pairwise(bounds)
    ]


def _by_query_and_score(query: Slots, scores: NDArray[np.float32]) -> Slots:
    """Keys that sort by query, then from the highest score to the lowest: one sort takes a quarter
    of the time of two."""
    bits = scores.view(np.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (query << 32) - ascending


def _by_id(slots: Slots, scores: NDArray[np.float32], ids: Sequence[str]) -> None:
    """Puts slots of equal scores in the order of their ids, in place."""
    keys = list(zip((-scores).tolist(), (ids[slot] for slot in slots.tolist()), strict=True))
    slots[:] = slots[sorted(range(len(keys)), key=keys.__getitem__)]

"""Indexes of faiss that search for a collection: one table of kinds.

`python -m bench.search --kinds` compares them with others that were left out.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from embedder.search.slots import Slots
from foretell.vectors import Vectors

LEAST = 1_024
"""Vectors from which there may be one."""

LEAST_OF_LIST = 39
"""Vectors for each list, at least: below, faiss' k-means warns."""

TRAINED_ON = 64
"""Vectors in a list's training."""

PROBES = 8
"""Lists that are searched for 10 hits at the least effort..."""

PROBES_HITS = 32
"""... that is, for so many hits with the spare ones; for others by the square root of their number:
the 10 nearest of 100,000 item vectors are found to 99.5 % in 8 of 512 lists, the 100 nearest in 24,
the 1,000 nearest to 98 % in 64."""


def lists(count: int) -> int:
    """Lists of an inverted file of so many vectors: the power of two next to 1.5 times the root,
    with LEAST_OF_LIST vectors in each.

    Fewer have longer lists to be searched, more take longer to train and to choose from.
    """
    wanted = round(math.log2(1.5 * math.sqrt(max(count, 1))))
    return 1 << max(0, min(wanted, int(math.log2(max(count, 1) / LEAST_OF_LIST))))


@dataclass(frozen=True)
class Kind:
    """A kind of index."""

    factory: str
    """faiss' factory string; {lists} stands for the number of lists."""
    on_gpu: bool = False
    exact: bool = False
    """Whether it finds everything."""
    most_hits: int = 8_192
    """Hits that one search may ask for."""
    selects: bool = True
    """Whether it heeds id selectors."""


KINDS = {
    # A vector's residual to the centre of its list as one bit a dimension, compared in registers
    # (RaBitQ, Gao and Long 2024, and the fast scan of faiss).
    "ivf_rabitq": Kind("IVF{lists},RaBitQfs"),
    "gpu_flat": Kind("Flat", on_gpu=True, exact=True, most_hits=2_048, selects=False),
    "gpu_ivf": Kind("IVF{lists},Flat", on_gpu=True, most_hits=2_048, selects=False),
}
"""By the name that Collection.index shows."""


def has_gpu() -> bool:
    """Whether this faiss has a GPU."""
    count: Callable[[], int] = getattr(faiss, "get_num_gpus", lambda: 0)
    return count() > 0


def usable(kind: str) -> bool:
    """Whether there is such a kind, and what it needs is here."""
    return kind in KINDS and (has_gpu() or not KINDS[kind].on_gpu)


def factory(kind: str, count: int) -> str:
    """faiss' factory string for so many vectors."""
    return KINDS[kind].factory.format(lists=lists(count))


def probes(hits: int, effort: float) -> int:
    """Lists that are searched for so many hits."""
    return max(1, round(PROBES * effort * math.sqrt(hits / PROBES_HITS)))


class Accelerator:
    """An index of the first slots. It is only appended to.

    On a CPU, searches may run side by side, but not beside `add`; on a GPU one call follows another
    by itself.

    Attributes:
        kind: its name in KINDS.
        effort: factor of the hits and lists that a search looks at; see building.tune.
        recall: share of the 10 best that it finds, once measured.
    """

    def __init__(self, kind: str, index: Any) -> None:
        self.kind = kind
        self.effort = 1
        self.recall: float | None = 1.0 if self.exact else None
        self._index = index
        self._turn = threading.Lock()
        if KINDS[kind].on_gpu:
            self._resources = faiss.StandardGpuResources()
            self._index = faiss.index_cpu_to_gpu(self._resources, 0, index)

    @classmethod
    def trained(cls, kind: str, rows: Vectors, alive: Slots) -> Accelerator:
        """An empty one, for vectors like these; `alive`: slots of `rows` that count."""
        index = faiss.index_factory(
            rows.shape[1], factory(kind, len(alive)), faiss.METRIC_INNER_PRODUCT
        )
        made = cls(kind, index)
        if not index.is_trained:
            wanted = min(len(alive), TRAINED_ON * lists(len(alive)))
            sample = np.random.default_rng(0).choice(alive, wanted, replace=False)
            made._index.train(rows[np.sort(sample)])
        return made

    @classmethod
    def read(cls, path: Path, kind: str) -> Accelerator:
        """From a file of `write`, whose content must be trusted: faiss checks little.

        Raises:
            RuntimeError: it cannot be read.
        """
        return cls(kind, faiss.read_index(str(path)))

    def write(self, write: Callable[[bytes], object]) -> None:
        """Hands what `read` reads to a function, some bytes at a time.

        Not to a path: faiss would say nothing of a disk that is full.
        """
        index = self._index
        if KINDS[self.kind].on_gpu:
            with self._turn:
                index = faiss.index_gpu_to_cpu(index)
        writer = faiss.PyCallbackIOWriter(write, 1024 * 1024)  # type: ignore[attr-defined]
        faiss.write_index(index, writer)

    @property
    def covered(self) -> int:
        """It knows the slots below this one."""
        return int(self._index.ntotal)

    @property
    def exact(self) -> bool:
        """Whether it finds everything."""
        return KINDS[self.kind].exact

    @property
    def most_hits(self) -> int:
        """Hits that one search may ask for."""
        return KINDS[self.kind].most_hits

    @property
    def selects(self) -> bool:
        """Whether it can look among some slots only."""
        return KINDS[self.kind].selects

    def fits(self, count: int) -> bool:
        """Whether its number of lists will do for so many vectors."""
        own = getattr(self._index, "nlist", None)
        return own is None or own // 4 < lists(count) <= own

    def add(self, rows: Vectors) -> None:
        """Appends the next slots' vectors."""
        with self._turn:
            self._index.add(np.ascontiguousarray(rows))

    def search(
        self, queries: Vectors, hits: int, allowed: NDArray[np.bool_] | None = None
    ) -> Slots:
        """Slots, about best first, shape (queries, at least `hits`); -1 where there are no more.

        Args:
            queries: float32 (queries, cols).
            hits: of each query, at most `most_hits`.
            allowed: which of the covered slots may be found, shape (covered,); None: all.
        """
        kind = KINDS[self.kind]
        effort = float(self.effort)
        more: dict[str, Any] = {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            # The bits must outlive the search.
            more["sel"] = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
            # The nearest allowed ones are further apart.
            effort *= math.sqrt(len(allowed) / max(1, int(np.count_nonzero(allowed))))
        parameters = None
        if "{lists}" in kind.factory:
            search_parameters: Any = faiss.SearchParametersIVF
            nprobe = min(probes(hits, effort), self._index.nlist, 2_048)
            parameters = search_parameters(nprobe=nprobe, **more)
        hits = min(hits * self.effort, kind.most_hits)
        if not kind.on_gpu:
            return self._found(queries, hits, parameters)
        with self._turn:
            return self._found(queries, hits, parameters)

    def _found(self, queries: Vectors, hits: int, parameters: Any) -> Slots:
        slots: Slots = self._index.search(queries, hits, params=parameters)[1]
        return slots

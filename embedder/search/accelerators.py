"""Approximate indexes: one table of kinds, and what one of them is asked for."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Kind:
    """A kind of approximate index."""

    factory: Callable[[int], str]
    """faiss' factory string for so many vectors."""
    parameters: Callable[[int, int], dict[str, Any]]
    """Search parameters for so many hits and so many vectors."""
    search_parameters: Any
    """faiss' class of them."""


KINDS: dict[str, Kind] = {
    "hnsw": Kind(
        factory=lambda count: "HNSW32",
        parameters=lambda hits, count: {"efSearch": max(64, hits)},
        search_parameters=faiss.SearchParametersHNSW,  # type: ignore[attr-defined]
    ),
}
"""By name."""


class Accelerator:
    """An approximate index of the first slots. It is only appended to.

    Searches may run side by side, but not beside `add`.
    """

    most_hits = 2_048
    """Hits that one search may ask for."""
    selects = True
    """Whether it searches among some slots only."""

    def __init__(self, kind: str, index: Any) -> None:
        self.kind = kind
        self.recall: float | None = None
        """Share of the 10 best that it finds, measured after it was built."""
        self._index = index
        self._lock = threading.Lock()

    @classmethod
    def trained(cls, kind: str, rows: Vectors) -> Accelerator:
        """An empty one, for about these vectors."""
        factory = KINDS[kind].factory(len(rows))
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(rows)
        return cls(kind, index)

    @classmethod
    def read(cls, path: Path, kind: str) -> Accelerator:
        """From a file of what `write` gave, whose content must be trusted (faiss checks little).

        Raises:
            RuntimeError: it cannot be read.
        """
        return cls(kind, faiss.read_index(str(path)))

    def write(self, write: Callable[[bytes], object]) -> None:
        """Hands what `read` reads to a function, some bytes at a time.

        Not to a path: faiss would say nothing of a disk that is full.
        """
        writer = faiss.PyCallbackIOWriter(write, 1024 * 1024)  # type: ignore[attr-defined]
        faiss.write_index(self._index, writer)

    @property
    def covered(self) -> int:
        """It knows the slots below this one."""
        return int(self._index.ntotal)

    def add(self, rows: Vectors) -> None:
        """Appends the next slots' vectors."""
        self._index.add(rows)

    def search(
        self, queries: Vectors, hits: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[Vectors, Slots]:
        """Scores and slots, best first, each (queries, hits); -1 where it finds no more.

        Args:
            queries: float32 (queries, cols).
            hits: of each query, at most `most_hits`.
            allowed: which of the covered slots may be found, shape (covered,); None: all.
        """
        kind = KINDS[self.kind]
        parameters = kind.search_parameters(**kind.parameters(hits, self.covered))
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            parameters.sel = selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
            assert selector is not None  # kept alive, as are the bits
        scores, slots = self._index.search(queries, hits, params=parameters)
        return scores, slots

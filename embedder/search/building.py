"""Making an accelerator, some steps at a time, and finding out how well it finds."""

from __future__ import annotations

import copy
import time

import numpy as np

from embedder.search.accelerators import Accelerator
from embedder.search.searcher import Searcher
from embedder.search.slots import Compaction, SlotTable
from foretell.vectors import Vectors

STEP_S = 0.5
"""Seconds of a step, about, but for training."""

ADDED_TOGETHER = 4_096
"""Vectors added at a time."""

TESTED = 256
"""Queries of a test of recall: 2,560 neighbours, so that its standard error is about 0.003."""

NOTED_TOGETHER = 8
"""Queries of a call that are kept for tests."""

NOISE = 0.25
"""Of a test's noisy vectors: this much of the difference of two other vectors, which noise has the
covariance of the vectors themselves."""

RECALL = 0.985
"""Recall@10 to be reached by tuning; some more than the 0.98 that is promised."""

EFFORTS = (1, 2, 4, 8, 16)


class Build:
    """A table with an accelerator in the making: the given one, or its copy without dead slots."""

    def __init__(self, source: SlotTable, kind: str | None, *, compact: bool) -> None:
        self.compaction = Compaction(source) if compact else None
        self.table = source if self.compaction is None else self.compaction.table
        self.accelerator: Accelerator | None = None
        if kind is not None:
            alive = self.table.live()  # before the rows, which may move to a larger array
            self.accelerator = Accelerator.trained(kind, self.table.rows, alive)

    def step(self, asked: Asked) -> bool:
        """Adds some vectors; whether it is ready. The table may change meanwhile."""
        if self.accelerator is None:
            return True
        until = time.monotonic() + STEP_S
        while (first := self.accelerator.covered) < len(self.table):
            end = min(len(self.table), first + ADDED_TOGETHER)
            self.accelerator.add(self.table.rows[first:end])
            if time.monotonic() > until:
                return False
        tune(self.table, self.accelerator, asked.sample())
        return True


class Asked:
    """The last queries. What finds noisy vectors of the collection may fail to find the neighbours
    of others: the mean of three items, as a user's vector may be, takes four times the effort."""

    def __init__(self, cols: int) -> None:
        self.count = 0
        """Queries ever noted."""
        self._rows = np.empty((0, cols), np.float32)

    def note(self, queries: Vectors) -> None:
        """Keeps some of a call's queries. Two calls at a time may lose some of each other's."""
        if not len(self._rows):
            self._rows = np.zeros((TESTED, queries.shape[1]), np.float32)
        some = queries[:NOTED_TOGETHER]
        self._rows[(self.count + np.arange(len(some))) % TESTED] = some
        self.count += len(some)

    def sample(self) -> Vectors:
        """A copy of the last ones, shape (at most TESTED, cols)."""
        return self._rows[: self.count].copy()


def tune(table: SlotTable, accelerator: Accelerator, asked: Vectors) -> None:
    """Finds the least effort with which an accelerator reaches RECALL, and its recall then.

    Measured on queries that were asked, and noisy vectors where those are too few.
    """
    live = table.live()
    if not len(live) or accelerator.exact:
        return
    rng = np.random.default_rng(0)
    one, other, another = (table.rows[rng.choice(live, TESTED)] for _ in range(3))
    noisy = one + NOISE * (other - another)
    queries = np.asarray(np.concatenate([asked, noisy])[:TESTED], np.float32)
    truth = Searcher(table, None).search(queries, 10)
    trial = copy.copy(accelerator)
    for effort in EFFORTS:
        trial.effort = effort
        found = Searcher(table, trial).search(queries, 10)
        right = sum(
            int(np.count_nonzero(mine.scores >= best.scores[-1]))
            for mine, best in zip(found, truth, strict=True)
            if len(best.scores)
        )
        recall = right / sum(len(best.scores) for best in truth)
        if recall >= RECALL:
            break
    accelerator.effort, accelerator.recall = effort, recall

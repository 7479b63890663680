"""The items of the model: Search and, where the version has one, the ranker, for all that wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from foretell import limits
from foretell.errors import ForetellError
from foretell.vectors import Vectors
from predictor.activation import ServedModel
from predictor.batching import Batcher
from predictor.events import History
from predictor.ranking import Ranked, RankRequest, rank_batch
from predictor.retrieval import Hits, Retrieval, VectorSearch
from serving import tracing

NOBODY = Ranked((), np.zeros(0, np.float32))


class Wanted(NamedTuple):
    """Whose next items to find."""

    served: ServedModel
    query: Vectors
    """(dims,) of the sequence model."""
    history: History
    k: int
    allow: Sequence[str] | None
    """Only these; None: all."""
    deny: Collection[str]
    repeats: bool
    """Whether the ranker may add items of the user's own."""


@dataclass(slots=True)
class Found:
    """What was found for one who wanted."""

    wanted: Wanted
    search: VectorSearch | None
    """What the embedder is asked; None where the ranker finds enough alone."""
    candidates: Ranked = NOBODY
    """All that were looked at, best first; the ids at least of the best `k`."""
    probabilities: Sequence[float] = ()
    """Of the `k` best, by the level of all."""
    exhausted: bool = False
    """Whether there are no others that may be answered."""
    search_us: int = 0
    rank_us: int = 0
    error: ForetellError | None = None
    """What the embedder answered instead, or that it did not answer."""


class Finder:
    """Answers what waits together with one Search and one pass of the ranker.

    Args:
        retrieval: the way to the embedder.
        worker: runs the ranker.
    """

    def __init__(self, retrieval: Retrieval, worker: Executor) -> None:
        self._retrieval = retrieval
        self._worker = worker
        # Two at a time: one forms and travels while the other is searched.
        self._batcher: Batcher[Wanted, Found] = Batcher(self._find, limits.QUERIES, 2)

    async def find(self, wanted: Sequence[Wanted]) -> Sequence[Found]:
        """What each wanted, or the error of its search."""
        return await self._batcher.submit(wanted)

    async def _find(self, wanted: Sequence[Wanted]) -> list[Found]:
        everyone = [Found(each, _search(each)) for each in wanted]
        await self._search([found for found in everyone if found.search is not None])
        good = [found for found in everyone if found.error is None]
        await self._rank([each for each in good if each.wanted.served.version.ranker is not None])
        _calibrate(good)
        return everyone

    async def _search(self, chosen: Sequence[Found]) -> None:
        if not chosen:
            return
        searches = [found.search for found in chosen if found.search is not None]
        with tracing.span("search"):
            answers = await self._retrieval.search(searches)
        for found, search, answer in zip(chosen, searches, answers, strict=True):
            if isinstance(answer, ForetellError):
                found.error = answer
                continue
            found.search_us = answer.search_us
            found.exhausted = len(answer.scores) < search.scores_k
            found.candidates = _allowed(answer, found.wanted)

    async def _rank(self, chosen: Sequence[Found]) -> None:
        """Has the ranker add candidates and put them in its order."""
        if not chosen:
            return
        begin = time.perf_counter_ns()
        work = partial(rank_batch, [_rank_request(found) for found in chosen])
        with tracing.span("rank"):
            ranked = await asyncio.get_running_loop().run_in_executor(self._worker, work)
        rank_us = (time.perf_counter_ns() - begin) // 1_000
        for found, candidates in zip(chosen, ranked, strict=True):
            found.candidates, found.rank_us = candidates, rank_us


def _search(wanted: Wanted) -> VectorSearch | None:
    """The search for the candidates of one query."""
    served, items = wanted.served, wanted.served.items
    assert items is not None
    asked = served.asked_for(wanted.k)
    if wanted.allow is None and not asked:
        return None
    deny: Sequence[str] = () if wanted.allow else list(wanted.deny)
    # What does not fit into the call's filter is left out afterwards.
    sent, rest = deny[: limits.FILTER_IDS], deny[limits.FILTER_IDS :]
    most = min(limits.K, max(asked, wanted.k) + len(rest))
    # A ranker needs to know all candidates, and so does who must leave some out.
    k = most if rest or served.version.ranker is not None else wanted.k
    return VectorSearch(items.collection, wanted.query, k, most, wanted.allow or (), sent)


def _allowed(hits: Hits, wanted: Wanted) -> Ranked:
    """The hits without denied ids that were too many for the filter: they are no candidates."""
    if wanted.allow or len(wanted.deny) <= limits.FILTER_IDS:
        return Ranked(hits.ids, hits.scores)
    keep = np.array([item_id not in wanted.deny for item_id in hits.ids], np.bool_)
    return Ranked(list(itertools.compress(hits.ids, keep)), hits.scores[keep])


def _rank_request(found: Found) -> RankRequest:
    wanted, hits = found.wanted, found.candidates
    return RankRequest(
        wanted.served,
        wanted.history,
        wanted.query,
        dict(zip(hits.ids, hits.scores.tolist(), strict=True)),
        wanted.allow is None,
        wanted.repeats,
        wanted.deny,
    )


def _calibrate(chosen: Sequence[Found]) -> None:
    """Gives the best items of each their probabilities; those of a version are one computation."""
    by_version: dict[int, list[Found]] = {}
    for found in chosen:
        by_version.setdefault(id(found.wanted.served), []).append(found)
    for group in by_version.values():
        most = max(len(found.candidates.scores) for found in group)
        scores = np.full((len(group), most), -np.inf, np.float32)
        for row, found in zip(scores, group, strict=True):
            row[: len(found.candidates.scores)] = found.candidates.scores
        best = scores[:, : max(found.wanted.k for found in group)]
        version = group[0].wanted.served.version
        probabilities = version.item_probabilities(best, scores).tolist()
        for found, row in zip(group, probabilities, strict=True):
            found.probabilities = row[: min(found.wanted.k, len(found.candidates.ids))]

"""Searches in the embedder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell import limits
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.errors import ForetellError, from_status
from foretell.vectors import Vectors, to_block
from predictor.embedder import Embedder

FILTER_BYTES = 16 * 1024 * 1024
"""Ids in the filters of one call: well below the message limit."""


class VectorSearch(NamedTuple):
    """One query."""

    collection: str
    vector: Vectors
    """(cols,)."""
    k: int
    scores_k: int
    """At least k: scores of so many, the ids only of the first k."""
    allow: Sequence[str]
    deny: Sequence[str]


class Hits(NamedTuple):
    """The nearest items, best first."""

    ids: Sequence[str]
    scores: NDArray[np.float32]
    """Of these, then of as many more as were asked for."""
    search_us: int


class Retrieval:
    """Searches by vectors, and by ids or texts."""

    def __init__(self, embedder: Embedder, deadline_s: float) -> None:
        self._embedder = embedder
        self._deadline_s = deadline_s

    async def search(self, queries: Sequence[VectorSearch]) -> list[Hits | ForetellError]:
        """The items nearest to each vector; an error as the embedder answered, or because it did
        not.

        One call per collection and numbers, or several where the filters are very long.
        """
        groups: dict[tuple[str, int, int], list[list[int]]] = {}
        sizes: dict[tuple[str, int, int], int] = {}
        for at, query in enumerate(queries):
            key = (query.collection, query.k, query.scores_k)
            size = sum(map(len, query.allow)) + sum(map(len, query.deny))
            parts = groups.setdefault(key, [[]])
            if parts[-1] and sizes[key] + size > FILTER_BYTES // 4:  # up to 4 bytes a character
                parts.append([])
                sizes[key] = 0
            parts[-1].append(at)
            sizes[key] = sizes.get(key, 0) + size
        calls = [part for parts in groups.values() for part in parts]
        answers = await asyncio.gather(
            *(self._search_vectors([queries[at] for at in part]) for part in calls)
        )
        results: dict[int, Hits | ForetellError] = {}
        for part, answer in zip(calls, answers, strict=True):
            results.update(zip(part, answer, strict=True))
        return [results[at] for at in range(len(queries))]

    async def similar(
        self, ids: Sequence[str], texts: Sequence[str], k: int, allow: Sequence[str]
    ) -> dict[str, float]:
        """Items of `items` near any of some items and texts: id to the largest cosine.

        Ids that do not exist find nothing.

        Raises:
            ForetellError: as the embedder answered, or because it did not.
        """
        requests = []
        filters = [pb.QueryFilter(allow_ids=allow)] if allow else []
        if ids:
            requests.append(pb.SearchRequest(ids=pb.IdQueries(ids=ids), k=k, filters=filters))
        if texts:
            requests.append(
                pb.SearchRequest(texts=pb.TextQueries(texts=texts), k=k, filters=filters)
            )
        answers = await asyncio.gather(*map(self._search, requests))
        best: dict[str, float] = {}
        for answer in answers:
            for result in answer.results:
                scores = np.frombuffer(result.scores, "<f4")
                for item_id, score in zip(result.ids, scores.tolist(), strict=True):
                    best[item_id] = max(score, best.get(item_id, score))
        return best

    async def missing(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that are not in `items`. Raises as `similar`."""
        missing: set[str] = set()
        for begin in range(0, len(ids), limits.BATCH):
            answer = await self._embedder.call(
                self._embedder.stub.GetItems,
                pb.GetItemsRequest(ids=ids[begin : begin + limits.BATCH]),
                self._deadline_s,
            )
            missing.update(answer.missing_ids)
        return missing

    async def first_items(self, page_token: str) -> tuple[list[str], str]:
        """A page of the ids of `items`, and the token of the next one. Raises as `similar`."""
        answer = await self._embedder.call(
            self._embedder.stub.ListItems,
            pb.ListItemsRequest(page_size=limits.PAGE, page_token=page_token),
            self._deadline_s,
        )
        return [item.id for item in answer.items], answer.next_page_token

    async def embed(self, texts: Sequence[str], collection: str) -> pb.EmbedResponse:
        """Vectors of texts in a derived collection's space. Raises as `similar`."""
        return await self._embedder.call(
            self._embedder.stub.Embed,
            pb.EmbedRequest(texts=texts, collection=collection),
            self._deadline_s,
        )

    async def _search(self, request: pb.SearchRequest) -> pb.SearchResponse:
        return await self._embedder.call(self._embedder.stub.Search, request, self._deadline_s)

    async def _search_vectors(self, queries: Sequence[VectorSearch]) -> list[Hits | ForetellError]:
        filters = []
        if any(query.allow or query.deny for query in queries):
            filters = [pb.QueryFilter(allow_ids=q.allow, deny_ids=q.deny) for q in queries]
        try:
            answer = await self._search(
                pb.SearchRequest(
                    collection=queries[0].collection,
                    vectors=to_block(np.stack([query.vector for query in queries])),
                    k=queries[0].k,
                    scores_k=queries[0].scores_k,
                    filters=filters,
                )
            )
        except ForetellError as error:
            return [error] * len(queries)
        hits: list[Hits | ForetellError] = [
            Hits(result.ids, np.frombuffer(result.scores, "<f4"), answer.timings.search_us)
            for result in answer.results
        ]
        for failure in answer.failures:
            hits[failure.index] = from_status(failure.status)
        return hits

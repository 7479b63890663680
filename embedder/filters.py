"""The filters of a Search: conditions over attributes become the ids that match."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from embedder.search.index import Filter
from embedder.storage.collection import Collection
from embedder.storage.collections import Collections
from embedder.storage.conditions import Ids
from foretell import checks
from foretell.embedder.v1 import embedder_service_pb2 as pb

EVALUATING = ThreadPoolExecutor(4, "conditions")
"""Threads of their own: a condition of 64 leaves may take seconds, for which reads and writes would
wait, which share the event loop's threads."""


async def filters_of(
    request: pb.SearchRequest, queries: int, collection: Collection, collections: Collections
) -> list[Filter]:
    """One filter per query, or none; queries with equal ones share one object.

    Raises:
        InvalidArgumentError: a fault in the filters, or a condition for a vector collection.
    """
    checks.filters(request.filters, queries)
    if any(each.HasField("condition") for each in request.filters):
        if collection.row.kind == pb.COLLECTION_KIND_VECTOR:
            raise checks.no_conditions(request.filters, collection.row.name)
        left = threading.Event()
        try:
            filters = await asyncio.get_running_loop().run_in_executor(
                EVALUATING, _matching, request, collection, collections, left.is_set
            )
        finally:
            left.set()  # a caller who does not wait any more needs no thread
    else:
        filters = [_filter(each) for each in request.filters]
    return filters * (queries if len(filters) == 1 else 1)


def _matching(
    request: pb.SearchRequest,
    collection: Collection,
    collections: Collections,
    cancelled: Callable[[], bool],
) -> list[Filter]:
    """A filter per message; each different condition is evaluated once."""
    conditions = {
        _key(each.condition): each.condition
        for each in request.filters
        if each.HasField("condition")
    }
    found = collections.matching(collection, list(conditions.values()), cancelled)
    ids = dict(zip(conditions, found, strict=True))
    made: dict[bytes, Filter] = {}
    filters = []
    for each in request.filters:
        key = _key(each)
        if key not in made:
            matching = ids[_key(each.condition)] if each.HasField("condition") else None
            made[key] = _filter(each, matching)
        filters.append(made[key])
    return filters


def _key(message: pb.QueryFilter | pb.Condition) -> bytes:
    return message.SerializeToString(deterministic=True)


def _filter(message: pb.QueryFilter, matching: Ids | None = None) -> Filter:
    allow = tuple(message.allow_ids) or None
    if matching is not None:
        allow = matching if allow is None else tuple(set(allow).intersection(matching))
    return Filter(allow, frozenset(message.deny_ids))

"""EmbedderService over gRPC: parse, call, answer."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from embedder.encoding.batcher import Batcher, Timing
from embedder.encoding.choice import Agreement
from embedder.encoding.text_cache import Encoded, TextCache
from embedder.filters import filters_of
from embedder.search.batcher import SearchBatcher
from embedder.search.index import Hits
from embedder.storage.collection import Collection
from embedder.storage.collections import ITEMS, Collections
from embedder.storage.watch import Watches
from embedder.storage.writer import Writer
from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import FailedPreconditionError, InvalidArgumentError
from foretell.vectors import Vectors, to_block
from serving import tracing
from serving.calls import note
from serving.metrics import Observe, unobserved

M = TypeVar("M", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]

NAME = "foretell.embedder.v1.EmbedderService"

CHARACTERS_AT_ONCE = 50_000
"""Of texts whose terms are split in the event loop: more would hold it up for over 10 ms."""

PAGE_BYTES = limits.MESSAGE_BYTES // 2
"""Where a page of very long texts is cut short."""


@dataclass(frozen=True)
class About:
    """What GetInfo says of the process; it does not change."""

    version: str
    encoder: str
    pooling: str
    cols: int
    max_tokens: int
    device: str
    path: str
    agreement: Agreement
    libraries: dict[str, str]


@dataclass(frozen=True)
class _Queries:
    """The queries of a Search."""

    vectors: Vectors
    """Shape (queries, cols); failed ones are zero."""
    failures: list[common_pb2.ElementFailure]
    missing_ids: list[str]
    timing: Timing


class _Kept:
    """What there is with a data directory."""

    def __init__(self, collections: Collections, texts: TextCache) -> None:
        self.collections = collections
        self.writer = Writer(collections, texts)
        self.watches = Watches(collections)


class EmbedderService(rpc.EmbedderServiceServicer):
    """The methods. Without collections (encode-only) just Embed and GetInfo work."""

    def __init__(
        self,
        about: About,
        batcher: Batcher,
        texts: TextCache,
        collections: Collections | None,
        searching: ThreadPoolExecutor,
        observe_search: Observe = unobserved,
    ) -> None:
        self._about = about
        self._batcher = batcher
        self._texts = texts
        self._kept_or_none = None if collections is None else _Kept(collections, texts)
        self._searches = SearchBatcher(searching, observe_search)

    def stop_watches(self) -> None:
        """Ends all open WatchItems with UNAVAILABLE, so that the server can stop."""
        if self._kept_or_none is not None:
            self._kept_or_none.watches.stop()

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        """Encodes texts, in a collection's space if one is named."""
        started = time.perf_counter()
        element_type = checks.element_type(request.element_type)
        note(batch=len(request.texts))
        checks.count(len(request.texts), "texts", limits.BATCH)
        collection = None
        if request.collection:
            collection = self._kept.collections.get(request.collection, pb.COLLECTION_KIND_DERIVED)
        cols = self._about.cols if collection is None else collection.row.cols
        _check_answer(len(request.texts) * cols * 4, "texts")
        good, failures = checks.split(
            request.texts, lambda text, index: checks.text(text, f"texts[{index}]")
        )
        texts = [request.texts[index] for index in good]
        with tracing.span("encode"):
            encoded = await self._texts.encode(texts, _deadline(context))
        vectors = np.zeros((len(request.texts), cols), np.float32)
        if good:
            vectors[good] = await _in_space(collection, encoded.vectors, texts)
        return pb.EmbedResponse(
            vectors=to_block(vectors, element_type),
            failures=failures,
            timings=_timings(started, encoded.timing),
        )

    async def UpsertItems(
        self, request: pb.UpsertItemsRequest, context: Context
    ) -> pb.UpsertItemsResponse:
        """Inserts or replaces items of a text collection."""
        started = time.perf_counter()
        note(batch=len(request.items))
        response = await self._kept.writer.upsert_items(request, _deadline(context))
        response.timings.total_us = _since(started)
        return response

    async def PutVectors(
        self, request: pb.PutVectorsRequest, context: Context
    ) -> pb.PutVectorsResponse:
        """Inserts or replaces vectors or residuals."""
        return await self._kept.writer.put_vectors(request)

    async def GetItems(self, request: pb.GetItemsRequest, context: Context) -> pb.GetItemsResponse:
        """Reads items by id."""
        checks.ids(request.ids, "ids")
        collection = self._kept.collections.get(request.collection, default=ITEMS)
        if request.include_vectors:
            _check_answer(len(request.ids) * collection.row.cols * 4, "ids")
        return await asyncio.to_thread(self._items, collection, request)

    async def ListItems(
        self, request: pb.ListItemsRequest, context: Context
    ) -> pb.ListItemsResponse:
        """Lists items in the order of their ids."""
        page_size = checks.page_size(request.page_size)
        collection = self._kept.collections.get(request.collection, default=ITEMS)
        after = _read_page_token(request.page_token, collection.row.name)
        return await asyncio.to_thread(self._page, collection, after, page_size)

    async def DeleteItems(
        self, request: pb.DeleteItemsRequest, context: Context
    ) -> pb.DeleteItemsResponse:
        """Deletes items."""
        return await self._kept.writer.delete_items(request)

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """Finds the nearest vectors of many queries."""
        started = time.perf_counter()
        collection = self._kept.collections.get(request.collection, default=ITEMS)
        count = checks.queries(request)
        note(batch=count)
        k, scores_k = checks.hits(request)
        if request.include_vectors:
            _check_answer(count * min(k, len(collection.index)) * collection.row.cols * 4, "k")
        filters = await filters_of(request, count, collection, self._kept.collections)
        queries = await self._queries(request, collection, _deadline(context))
        searching = time.perf_counter()
        with tracing.span("search"):
            hits = await self._searches.search(
                collection.index,
                queries.vectors,
                scores_k,
                filters,
                include_vectors=request.include_vectors,
            )
        failed = {failure.index for failure in queries.failures}
        response = pb.SearchResponse(
            failures=queries.failures,
            missing_ids=dict.fromkeys([*queries.missing_ids, *_unknown(collection, request)]),
            timings=_timings(started, queries.timing, search_us=_since(searching)),
        )
        for index, each in enumerate(hits):
            result = response.results.add()
            if index not in failed:
                _fill(result, each, k)
        return _fitting(response, "k")

    async def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: Context
    ) -> pb.CreateCollectionResponse:
        """Creates a collection."""
        return await self._kept.collections.create(request)

    async def ListCollections(
        self, request: pb.ListCollectionsRequest, context: Context
    ) -> pb.ListCollectionsResponse:
        """Lists all collections."""
        return pb.ListCollectionsResponse(collections=self._kept.collections.messages())

    async def DeleteCollection(
        self, request: pb.DeleteCollectionRequest, context: Context
    ) -> pb.DeleteCollectionResponse:
        """Deletes a collection."""
        return await self._kept.collections.delete(request)

    async def WatchItems(
        self, request: pb.WatchItemsRequest, context: Context
    ) -> AsyncIterator[pb.WatchItemsResponse]:
        """Follows the vectors of a collection."""
        async for changes in self._kept.watches.watch(request.collection, request.after_seq):
            yield pb.WatchItemsResponse(
                ids=changes.ids,
                vectors=to_block(changes.vectors),
                deleted_ids=changes.deleted_ids,
                seq=changes.seq,
                caught_up=changes.caught_up,
            )

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """Says what runs here."""
        return pb.GetInfoResponse(
            version=self._about.version,
            encoder=self._about.encoder,
            pooling=self._about.pooling,
            cols=self._about.cols,
            max_tokens=self._about.max_tokens,
            device=self._about.device,
            path=self._about.path,
            agreement_cosine=self._about.agreement.cosine,
            agreement_recall_at_10=self._about.agreement.recall_at_10,
            libraries=self._about.libraries,
            has_store=self._kept_or_none is not None,
            texts_encoded=self._batcher.texts_encoded,
            texts_cached=self._texts.texts_cached,
        )

    @property
    def _kept(self) -> _Kept:
        if self._kept_or_none is None:
            raise FailedPreconditionError(
                "this embedder only encodes: it was started without a data directory",
                reason="NO_STORE",
            )
        return self._kept_or_none

    def _items(self, collection: Collection, request: pb.GetItemsRequest) -> pb.GetItemsResponse:
        """The items asked for; called in a thread."""
        found = self._kept.collections.items(collection, request.ids)
        vectors = collection.index.get(request.ids) if request.include_vectors else None
        if vectors is not None:  # deleted between the two reads
            found = {id: item for id, item in found.items() if id in vectors}
        present = [id for id in request.ids if id in found]
        response = pb.GetItemsResponse(
            items=[found[id] for id in present],
            missing_ids=dict.fromkeys(id for id in request.ids if id not in found),
        )
        if vectors is not None:
            block = np.array([vectors[id] for id in present], np.float32)
            response.vectors.CopyFrom(to_block(block.reshape(-1, collection.row.cols)))
        return _fitting(response, "ids")

    def _page(self, collection: Collection, after: str, page_size: int) -> pb.ListItemsResponse:
        """A page of items; called in a thread."""
        response = pb.ListItemsResponse()
        size = 0
        for item in self._kept.collections.items_after(collection, after):
            if len(response.items) == page_size or size > PAGE_BYTES:
                response.next_page_token = _page_token(response.items[-1].id, collection.row.name)
                break
            size += item.ByteSize()
            response.items.append(item)
        return response

    async def _queries(
        self, request: pb.SearchRequest, collection: Collection, deadline: float | None
    ) -> _Queries:
        """Reads the queries, and has texts encoded."""
        match request.WhichOneof("queries"):
            case "vectors":
                vectors = checks.block(request.vectors, collection.row.cols)
                good, failures = checks.split(vectors, checks.finite_row(vectors, "vectors"))
                return _queries(collection, len(vectors), good, vectors[good], failures)
            case "texts":
                return await self._text_queries(request.texts.texts, collection, deadline)
            case _:
                return _id_queries(request.ids.ids, collection)

    async def _text_queries(
        self, texts: Sequence[str], collection: Collection, deadline: float | None
    ) -> _Queries:
        if collection.row.kind == pb.COLLECTION_KIND_VECTOR:
            raise checks.wrong_kind(collection.row.name, "searched by text")
        good, failures = checks.split(
            texts, lambda text, index: checks.text(text, f"texts.texts[{index}]")
        )
        good_texts = [texts[index] for index in good]
        with tracing.span("encode"):
            encoded: Encoded = await self._texts.encode(good_texts, deadline)
        vectors = await _in_space(collection, encoded.vectors, good_texts)
        return _queries(collection, len(texts), good, vectors, failures, encoded.timing)


def _deadline(context: Context) -> float | None:
    """The caller's, of the event loop's clock."""
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s


def _queries(
    collection: Collection,
    count: int,
    good: Sequence[int],
    vectors: Vectors,
    failures: list[common_pb2.ElementFailure],
    timing: Timing | None = None,
    missing_ids: Sequence[str] = (),
) -> _Queries:
    """Puts the vectors of the good queries in their places."""
    if len(good) == count:
        return _Queries(vectors, failures, list(missing_ids), timing or Timing())
    block = np.zeros((count, collection.row.cols), np.float32)
    if len(good):
        block[list(good)] = vectors
    return _Queries(block, failures, list(missing_ids), timing or Timing())


def _id_queries(ids: Sequence[str], collection: Collection) -> _Queries:
    known = collection.index.get(ids)

    def check(id: str, index: int) -> None:
        checks.identifier(id, f"ids.ids[{index}]")
        if id not in known:
            raise checks.no_item(id, f"ids.ids[{index}]")

    good, failures = checks.split(ids, check)
    vectors = np.array([known[ids[index]] for index in good], np.float32)
    missing = [ids[each.index] for each in failures if ids[each.index] not in known]
    return _queries(collection, len(ids), good, vectors, failures, missing_ids=missing)


async def _in_space(
    collection: Collection | None, vectors: Vectors, texts: Sequence[str]
) -> Vectors:
    """Text vectors in a collection's space."""
    if collection is None or collection.projection is None:
        return vectors
    if sum(map(len, texts)) > CHARACTERS_AT_ONCE:
        return await asyncio.to_thread(collection.projection.apply, vectors, texts)
    return collection.projection.apply(vectors, texts)


def _unknown(collection: Collection, request: pb.SearchRequest) -> list[str]:
    """Ids of allow lists that the collection lacks."""
    asked = list(dict.fromkeys(id for each in request.filters for id in each.allow_ids))
    return [id for id, known in zip(asked, collection.index.known(asked), strict=True) if not known]


def _fill(result: pb.SearchResult, hits: Hits, k: int) -> None:
    # In place: a message that is made and then copied into another takes twice the time.
    result.ids.extend(hits.ids[:k])
    result.scores = hits.scores.astype("<f4", copy=False).tobytes()
    if hits.vectors is not None:
        result.vectors.CopyFrom(to_block(hits.vectors))


def _timings(started: float, timing: Timing, search_us: int = 0) -> common_pb2.Timings:
    return common_pb2.Timings(
        total_us=_since(started),
        queue_us=timing.queue_us,
        tokenize_us=timing.tokenize_us,
        forward_us=timing.forward_us,
        search_us=search_us,
    )


def _since(started: float) -> int:
    return int((time.perf_counter() - started) * 1e6)


def _check_answer(size: int, field: str) -> None:
    """Refuses a request whose answer no message can hold."""
    if size > limits.MESSAGE_BYTES:
        raise InvalidArgumentError(
            f"the answer would have {size:,} bytes; a message has at most "
            f"{limits.MESSAGE_BYTES:,}: ask for less at once",
            reason="ANSWER_TOO_LARGE",
            field=field,
        )


def _fitting(response: M, field: str) -> M:
    _check_answer(response.ByteSize(), field)
    return response


def _page_token(last_id: str, collection: str) -> str:
    # Neither a name nor an id has control characters.
    return base64.urlsafe_b64encode(f"{collection}\n{last_id}".encode()).decode()


def _read_page_token(token: str, collection: str) -> str:
    """The last id of the page before; empty for the first page."""
    if not token:
        return ""
    try:
        name, last_id = base64.b64decode(token, altchars=b"-_", validate=True).decode().split("\n")
    except ValueError:
        raise checks.bad_page_token() from None
    if name != collection:
        raise checks.bad_page_token()
    return last_id

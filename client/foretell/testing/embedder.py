"""An embedder in memory: exact search over dictionaries."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Final

import numpy as np

from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as pb_grpc
from foretell.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from foretell.projection import from_derived
from foretell.testing.collections import COLS, Collection, Row, encode, nearest, stack
from foretell.testing.paging import make_token, read_token
from foretell.testing.server import Context
from foretell.texts import text_id
from foretell.vectors import to_block

_BUILT_IN: Final = ("items", "behaviors")
_TEXT: Final = frozenset({pb.COLLECTION_KIND_TEXT})
_VECTOR: Final = frozenset({pb.COLLECTION_KIND_VECTOR})
_DERIVED: Final = frozenset({pb.COLLECTION_KIND_DERIVED})


class FakeEmbedder(pb_grpc.EmbedderServiceServicer):
    """EmbedderService as its contract says; what is acknowledged lasts as long as the object.

    Its methods are called one at a time, except WatchItems, which waits for `changed`.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.collections = {
            name: Collection(name, pb.COLLECTION_KIND_TEXT, COLS) for name in _BUILT_IN
        }
        self._changed = changed
        self._encoded: dict[str, Row] = {}
        self._cached = 0
        self._seq = 0

    def vector(self, text: str) -> Row:
        """A text's vector; shape (COLS,)."""
        if not text.strip():
            return np.zeros(COLS, np.float32)
        if text in self._encoded:
            self._cached += 1
        else:
            self._encoded[text] = encode(text)
        return self._encoded[text]

    def keep_behaviors(self, texts: Iterable[str]) -> None:
        """Puts texts into `behaviors`."""
        behaviors = self.collections["behaviors"]
        for text in texts:
            self._put(behaviors, pb.Item(id=text_id(text), text=text), self.vector(text))
        self._commit()

    def drop_behaviors(self, texts: Iterable[str]) -> None:
        """Deletes texts from `behaviors`."""
        self._delete(self.collections["behaviors"], [text_id(text) for text in texts])

    def Embed(self, request: pb.EmbedRequest, context: object) -> pb.EmbedResponse:
        """Encodes texts."""
        element_type = checks.element_type(request.element_type)
        checks.count(len(request.texts), "texts", limits.BATCH)
        projection = None
        if request.collection:
            projection = self._find(request.collection, _DERIVED).projection
        good, failures = checks.split(
            request.texts, lambda text, index: checks.text(text, f"texts[{index}]")
        )
        texts = [request.texts[index] for index in good]
        found = stack([self.vector(text) for text in texts], COLS)
        found = found if projection is None else projection.apply(found, texts)
        vectors = np.zeros((len(request.texts), found.shape[1]), np.float32)
        vectors[good] = found
        return pb.EmbedResponse(vectors=to_block(vectors, element_type), failures=failures)

    def UpsertItems(
        self, request: pb.UpsertItemsRequest, context: object
    ) -> pb.UpsertItemsResponse:
        """Inserts or replaces items; collections derived from theirs follow."""
        collection = self._find(request.collection, _TEXT)
        checks.count(len(request.items), "items", limits.BATCH)
        behaviors = collection.name == "behaviors"
        good, failures = checks.split(
            request.items, checks.behavior_item if behaviors else checks.item
        )
        items: dict[str, pb.Item] = {}
        for index in good:
            item = pb.Item()
            item.CopyFrom(request.items[index])
            item.id = item.id or text_id(item.text)
            items[item.id] = item
        known = len(self._encoded)
        for item in items.values():
            self._put(collection, item, self.vector(item.text))
        return pb.UpsertItemsResponse(
            upserted=len(items),
            encoded=len(self._encoded) - known,
            failures=failures,
            seq=self._commit(),
        )

    def PutVectors(self, request: pb.PutVectorsRequest, context: object) -> pb.PutVectorsResponse:
        """Inserts or replaces vectors, or residuals of a derived collection."""
        collection = self._find(request.collection, _VECTOR | _DERIVED, default="")
        checks.count(len(request.ids), "ids", limits.BATCH)
        vectors = checks.block(request.vectors, collection.cols)
        checks.one_row_each(len(vectors), len(request.ids))
        finite = checks.finite_row(vectors, "vectors")

        def check(item_id: str, index: int) -> None:
            checks.identifier(item_id, f"ids[{index}]")
            finite(item_id, index)
            if collection.projection is not None and item_id not in collection.items:
                raise checks.no_item(item_id, f"ids[{index}]")

        good, failures = checks.split(request.ids, check)
        rows = {request.ids[index]: np.array(vectors[index]) for index in good}
        for item_id, row in rows.items():
            if collection.projection is None:
                collection.put(pb.Item(id=item_id), row, self._next())
            else:
                collection.residuals[item_id] = row
                source = self.collections[collection.source].vectors[item_id]
                item = collection.items[item_id]
                vector = collection.derive(source, item.text, item_id)
                collection.put(item, vector, self._next())
        return pb.PutVectorsResponse(written=len(rows), failures=failures, seq=self._commit())

    def GetItems(self, request: pb.GetItemsRequest, context: object) -> pb.GetItemsResponse:
        """Reads items by id."""
        collection = self._find(request.collection)
        checks.ids(request.ids, "ids")
        found = [item_id for item_id in request.ids if item_id in collection.items]
        return pb.GetItemsResponse(
            items=[collection.items[item_id] for item_id in found],
            vectors=to_block(collection.matrix(found)) if request.include_vectors else None,
            missing_ids=_missing(request.ids, collection),
        )

    def ListItems(self, request: pb.ListItemsRequest, context: object) -> pb.ListItemsResponse:
        """Lists items in the order of their ids."""
        collection = self._find(request.collection)
        size = checks.page_size(request.page_size)
        after = read_token(request.page_token, collection.name)
        ids = sorted(item_id for item_id in collection.items if item_id > after)
        return pb.ListItemsResponse(
            items=[collection.items[item_id] for item_id in ids[:size]],
            next_page_token=make_token(ids[size - 1], collection.name) if len(ids) > size else "",
        )

    def DeleteItems(
        self, request: pb.DeleteItemsRequest, context: object
    ) -> pb.DeleteItemsResponse:
        """Deletes items, also from the collections derived from theirs."""
        collection = self._find(request.collection, _TEXT | _VECTOR)
        checks.ids(request.ids, "ids")
        missing = _missing(request.ids, collection)
        deleted = self._delete(collection, request.ids)
        return pb.DeleteItemsResponse(deleted=deleted, missing_ids=missing, seq=self._seq)

    def Search(self, request: pb.SearchRequest, context: object) -> pb.SearchResponse:
        """Finds the nearest vectors by inner product: exact, over all."""
        collection = self._find(request.collection)
        number = checks.queries(request)
        k, scores_k = checks.hits(request)
        checks.filters(request.filters, number)
        conditions = any(each.HasField("condition") for each in request.filters)
        if conditions and collection.kind == pb.COLLECTION_KIND_VECTOR:
            raise checks.no_conditions(request.filters, collection.name)
        queries, failures = self._queries(request, collection)
        named = [i for each in request.filters for i in each.allow_ids] + list(request.ids.ids)
        response = pb.SearchResponse(
            failures=failures, missing_ids=_missing(filter(None, named), collection)
        )
        filters = list(request.filters) or [pb.QueryFilter()]
        for index in range(number):
            result = response.results.add()
            if index in queries:
                query_filter = filters[index if len(filters) > 1 else 0]
                ids, scores = nearest(collection, queries[index], scores_k, query_filter)
                result.ids.extend(ids[:k])
                result.scores = scores.astype("<f4").tobytes()
                if request.include_vectors:
                    result.vectors.CopyFrom(to_block(collection.matrix(ids)))
        return response

    def _queries(
        self, request: pb.SearchRequest, collection: Collection
    ) -> tuple[dict[int, Row], list[common_pb2.ElementFailure]]:
        """Vectors of the queries by their position; failures of the others."""
        match request.WhichOneof("queries"):
            case "vectors":
                rows = checks.block(request.vectors, collection.cols)
                good, failures = checks.split(rows, checks.finite_row(rows, "vectors"))
                return {index: rows[index] for index in good}, failures
            case "texts":
                texts = request.texts.texts
                if collection.kind == pb.COLLECTION_KIND_VECTOR:
                    raise checks.wrong_kind(collection.name, "searched by text")
                good, failures = checks.split(
                    texts, lambda text, index: checks.text(text, f"texts.texts[{index}]")
                )
                vectors = {index: self.vector(texts[index]) for index in good}
                if collection.projection is not None:
                    vectors = {i: collection.derive(v, texts[i], "") for i, v in vectors.items()}
                return vectors, failures
        ids = request.ids.ids

        def check(item_id: str, index: int) -> None:
            checks.identifier(item_id, f"ids.ids[{index}]")
            if item_id not in collection.vectors:
                raise checks.no_item(item_id, f"ids.ids[{index}]")

        good, failures = checks.split(ids, check)
        return {index: collection.vectors[ids[index]] for index in good}, failures

    def CreateCollection(
        self, request: pb.CreateCollectionRequest, context: object
    ) -> pb.CreateCollectionResponse:
        """Creates a collection; a derived one has its source's items at once."""
        checks.name(request.name, "name")
        collection = self._new(request)
        if request.name in self.collections:
            raise AlreadyExistsError(
                f"there is a collection {request.name!r}", reason="COLLECTION_EXISTS", field="name"
            )
        if len(self.collections) >= limits.COLLECTIONS:
            raise ResourceExhaustedError(
                f"there are {limits.COLLECTIONS} collections; delete one",
                reason="TOO_MANY_COLLECTIONS",
            )
        collection.seq = self._next()
        if collection.source:
            source = self.collections[collection.source]
            for item_id, item in source.items.items():
                vector = collection.derive(source.vectors[item_id], item.text, item_id)
                collection.put(item, vector, self._next())
        self.collections[request.name] = collection
        self._commit()
        return pb.CreateCollectionResponse(collection=collection.message())

    def _new(self, request: pb.CreateCollectionRequest) -> Collection:
        match request.WhichOneof("kind"):
            case "text":
                return Collection(request.name, pb.COLLECTION_KIND_TEXT, COLS)
            case "vector":
                checks.vector_cols(request.vector.cols)
                return Collection(request.name, pb.COLLECTION_KIND_VECTOR, request.vector.cols)
            case "derived":
                source = self._find(request.derived.source, _TEXT, "derived.source", default="")
                projection = from_derived(request.derived, source.cols)
                kind = pb.COLLECTION_KIND_DERIVED
                return Collection(request.name, kind, projection.cols, source.name, projection)
        raise InvalidArgumentError("kind is not set", reason="NO_KIND", field="kind")

    def ListCollections(
        self, request: pb.ListCollectionsRequest, context: object
    ) -> pb.ListCollectionsResponse:
        """Lists all collections in the order of their names."""
        found = sorted(self.collections.values(), key=lambda collection: collection.name)
        return pb.ListCollectionsResponse(collections=[each.message() for each in found])

    def DeleteCollection(
        self, request: pb.DeleteCollectionRequest, context: object
    ) -> pb.DeleteCollectionResponse:
        """Deletes a collection and all in it."""
        collection = self._find(request.name, field="name", default="")
        derived = [each.name for each in self._derived(collection)]
        if collection.name in _BUILT_IN:
            raise FailedPreconditionError(
                f"{collection.name} is built in", reason="BUILT_IN", field="name"
            )
        if derived:
            raise FailedPreconditionError(
                f"{derived[0]} is derived from {collection.name}; delete it first",
                reason="HAS_DERIVED",
                field="name",
            )
        del self.collections[collection.name]
        collection.deleted = True
        self._commit()
        return pb.DeleteCollectionResponse()

    def WatchItems(
        self, request: pb.WatchItemsRequest, context: Context
    ) -> Iterator[pb.WatchItemsResponse]:
        """Follows the vectors of a collection until the caller leaves or it is deleted."""
        context.add_callback(self._wake)
        with self._changed:
            collection = self._find(request.collection)
            if request.after_seq > self._seq:
                raise InvalidArgumentError(
                    f"after_seq is {request.after_seq}; the last change is {self._seq}",
                    reason="SEQ_AHEAD",
                    field="after_seq",
                )
            message = collection.changes_after(request.after_seq)
        while True:
            yield message
            with self._changed:
                self._wait(collection, message.seq, context)
                if not context.is_active():
                    return
                if collection.deleted:
                    raise checks.no_collection(collection.name)
                message = collection.changes_after(message.seq)

    def _wait(self, collection: Collection, seq: int, context: Context) -> None:
        """Until there is something later than `seq`, or nothing more to come."""
        self._changed.wait_for(
            lambda: collection.deleted or collection.seq > seq or not context.is_active()
        )

    def GetInfo(self, request: pb.GetInfoRequest, context: object) -> pb.GetInfoResponse:
        """Says that this is the fake."""
        return pb.GetInfoResponse(
            version=version("foretell"),
            encoder="fake",
            pooling="mean",
            cols=COLS,
            max_tokens=limits.TEXT_CHARS,
            device="cpu",
            libraries={name: version(name) for name in ("grpcio", "numpy")},
            has_store=True,
            texts_encoded=len(self._encoded),
            texts_cached=self._cached,
            path="hashes",
            agreement_cosine=1.0,
            agreement_recall_at_10=1.0,
        )

    def _find(
        self,
        name: str,
        kinds: frozenset[pb.CollectionKind.ValueType] = frozenset(),
        field: str = "collection",
        default: str = "items",
    ) -> Collection:
        """The collection of a request, of one of the kinds (none given: of any)."""
        collection = self.collections.get(name or default)
        if collection is None:
            raise checks.no_collection(name, field)
        if kinds and collection.kind not in kinds:
            names = (pb.CollectionKind.Name(kind).rsplit("_", 1)[-1].lower() for kind in kinds)
            raise checks.wrong_kind(
                collection.name, f"a {' or '.join(sorted(names))} collection", field
            )
        return collection

    def _derived(self, source: Collection) -> list[Collection]:
        return [each for each in self.collections.values() if each.source == source.name]

    def _put(self, collection: Collection, item: pb.Item, vector: Row) -> None:
        collection.put(item, vector, self._next())
        for each in self._derived(collection):
            each.put(item, each.derive(vector, item.text, item.id), self._next())

    def _delete(self, collection: Collection, ids: Iterable[str]) -> int:
        """How many of the ids there were, each once."""
        found = [item_id for item_id in dict.fromkeys(ids) if item_id in collection.items]
        for item_id in found:
            for each in (collection, *self._derived(collection)):
                each.delete(item_id, self._next())
        self._commit()
        return len(found)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _commit(self) -> int:
        """Wakes those who watch; the position of the last change."""
        self._wake()
        return self._seq

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _missing(ids: Iterable[str], collection: Collection) -> list[str]:
    """Each id once that the collection lacks."""
    return [item_id for item_id in dict.fromkeys(ids) if item_id not in collection.vectors]

"""The client of both services for asyncio; the sync one is generated from this file."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from numpy.typing import ArrayLike

from foretell import _convert, types
from foretell._channel import (
    IMPORT_EVENTS,
    IMPORT_FAILURES,
    IMPORT_ITEMS,
    MAX_ATTEMPTS,
    ClientSettings,
    async_channel,
    batches,
    building,
    call_metadata,
    cut_off,
    new_request_id,
)
from foretell._security import Watched
from foretell.common.v1 import common_pb2
from foretell.conditions import Condition
from foretell.embedder.v1 import embedder_service_pb2 as epb
from foretell.embedder.v1.embedder_service_pb2_grpc import EmbedderServiceStub
from foretell.errors import FailedPreconditionError, InvalidArgumentError, from_rpc_error
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.predictor.v1.event_service_pb2_grpc import EventServiceStub
from foretell.predictor.v1.model_service_pb2_grpc import ModelServiceStub
from foretell.predictor.v1.prediction_service_pb2_grpc import PredictionServiceStub
from foretell.projection import Projection
from foretell.vectors import to_block

if TYPE_CHECKING:
    from foretell._channel import (
        AsyncChannel,
        AsyncEmbedderStub,
        AsyncEventStub,
        AsyncModelStub,
        AsyncPredictionStub,
        AsyncUnary,
    )

Q = TypeVar("Q")
R = TypeVar("R")


class AsyncClient:
    """Calls the embedder and the predictor.

    Every method takes `timeout_s`, its deadline in seconds (None: that of the settings), and
    raises a ForetellError; the errors of single elements of a batch are in the answer's
    `failures` instead. Writes take `request_id` (None: a new one): repeating a write with the
    same one within 24 hours returns the first answer. Calls that meet UNAVAILABLE are repeated
    up to four times; writes wait for an absent service, up to their deadline.

    Close it, or use it as a context manager.

    Args:
        embedder: HOST:PORT of the embedder; None where its methods are not used.
        predictor: HOST:PORT of the predictor, likewise.
        settings: deadlines and more.
        timeout_s: deadline of every call, in place of both of the settings.

    Raises:
        InvalidArgumentError: neither address is given.
    """

    def __init__(
        self,
        embedder: str | None = None,
        predictor: str | None = None,
        *,
        settings: ClientSettings | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not embedder and not predictor:
            raise InvalidArgumentError(
                "a client needs the address of the embedder, the predictor, or both",
                reason="NO_ADDRESS",
            )
        self._addresses = {"embedder": embedder, "predictor": predictor}
        self._settings = settings or ClientSettings()
        self._timeout_s = timeout_s
        security = self._settings.security
        self._metadata = call_metadata(security)
        self._credentials = Watched(security.tls_files, security.credentials)
        self._opened_with = self._credentials.get()
        self._channels: dict[str, AsyncChannel] = {}
        self._stubs: dict[str, Any] = {}
        self._retired: list[AsyncChannel] = []
        self._lock = threading.Lock()
        self._closed = False

    async def close(self) -> None:
        """Closes the connections; calls in flight are cancelled."""
        self._closed = True
        for channel in (*self._channels.values(), *self._retired):
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- Texts, items and vectors -----------------------------------------------------------------

    async def embed(
        self,
        texts: Sequence[str],
        *,
        collection: str = "",
        float16: bool = False,
        timeout_s: float | None = None,
    ) -> types.EmbedResult:
        """Vectors of texts, in the encoder's space or a derived collection's.

        With `float16` half the bytes travel; the result is float32 in either case.
        """
        with building():
            request = epb.EmbedRequest(
                texts=_convert.strings(texts, "texts"),
                collection=collection,
                element_type=_element_type(float16),
            )
        response = await self._write(self._embedder.Embed, request, timeout_s)
        return _convert.embed_from_proto(response)

    async def upsert_items(
        self,
        items: Iterable[types.Item],
        *,
        collection: str = "items",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> types.UpsertResult:
        """Inserts or replaces items of a text collection, in one call.

        On return every collection derived from it has changed too. `import_items` takes any
        number.
        """
        with building():
            request = epb.UpsertItemsRequest(
                collection=collection,
                items=_convert.items_to_proto(items),
                request_id=new_request_id(request_id),
            )
        response = await self._write(self._embedder.UpsertItems, request, timeout_s)
        return _convert.upsert_from_proto(response)

    async def import_items(
        self,
        items: Iterable[types.Item],
        *,
        collection: str = "items",
        progress: Callable[[int], None] | None = None,
        timeout_s: float | None = None,
    ) -> types.ImportResult:
        """Inserts or replaces any number of items, in as many calls as it takes.

        Args:
            items: read as they are sent.
            collection: a text collection.
            progress: called after each call with the number of items done.
            timeout_s: deadline of each call.

        Raises:
            ForetellError: a call failed; what was sent before stays written, and all can be sent
                again without harm.
        """
        sent = written = failed = 0
        failures: list[types.Failure] = []
        for batch in batches(_convert.items_to_proto(items), IMPORT_ITEMS):
            request = epb.UpsertItemsRequest(
                collection=collection, items=batch, request_id=new_request_id(None)
            )
            response = await self._write(self._embedder.UpsertItems, request, timeout_s)
            failures += _convert.failures_from_proto(
                response.failures[: IMPORT_FAILURES - len(failures)], sent
            )
            sent += len(batch)
            written += response.upserted
            failed += len(response.failures)
            if progress is not None:
                progress(sent)
        return types.ImportResult(sent, written, 0, failed, tuple(failures))

    async def put_vectors(
        self,
        collection: str,
        ids: Sequence[str],
        vectors: ArrayLike,
        *,
        float16: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> types.PutResult:
        """Inserts or replaces vectors, shape (ids, cols), of a vector collection, or residuals
        of a derived one."""
        with building():
            request = epb.PutVectorsRequest(
                collection=collection,
                ids=_convert.strings(ids, "ids"),
                vectors=to_block(vectors, _element_type(float16)),
                request_id=new_request_id(request_id),
            )
        response = await self._write(self._embedder.PutVectors, request, timeout_s)
        return _convert.put_from_proto(response)

    async def get_items(
        self,
        ids: Sequence[str],
        *,
        collection: str = "items",
        include_vectors: bool = False,
        timeout_s: float | None = None,
    ) -> types.ItemsResult:
        """Items by id, with their vectors if wanted."""
        with building():
            request = epb.GetItemsRequest(
                collection=collection,
                ids=_convert.strings(ids, "ids"),
                include_vectors=include_vectors,
            )
        response = await self._read(self._embedder.GetItems, request, timeout_s)
        return _convert.items_from_proto(response, include_vectors)

    async def list_items(
        self,
        *,
        collection: str = "items",
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = None,
    ) -> types.Page[types.Item]:
        """A page of a collection's items in the order of their ids; size 0 means 100."""
        with building():
            request = epb.ListItemsRequest(
                collection=collection, page_size=page_size, page_token=page_token
            )
        response = await self._read(self._embedder.ListItems, request, timeout_s)
        items = tuple(_convert.item_from_proto(item) for item in response.items)
        return types.Page(items, response.next_page_token)

    async def delete_items(
        self,
        ids: Sequence[str],
        *,
        collection: str = "items",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> types.DeleteResult:
        """Deletes items of a text or vector collection, and all that is derived from them."""
        with building():
            request = epb.DeleteItemsRequest(
                collection=collection,
                ids=_convert.strings(ids, "ids"),
                request_id=new_request_id(request_id),
            )
        response = await self._write(self._embedder.DeleteItems, request, timeout_s)
        return _convert.delete_from_proto(response)

    async def search(
        self,
        *,
        vectors: ArrayLike | None = None,
        texts: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        collection: str = "items",
        k: int | None = None,
        where: Condition | None = None,
        filters: types.Filter | Sequence[types.Filter] = (),
        include_vectors: bool = False,
        timeout_s: float | None = None,
    ) -> types.SearchResult:
        """The nearest items by inner product, for many queries at once.

        Args:
            vectors: queries of shape (queries, cols), in the collection's space; or
            texts: queries, encoded by the service; or
            ids: items of the collection, which may be among their own hits.
            collection: what is searched.
            k: hits per query; None: 10.
            where: only items with such attributes, such as `attribute("price") < 5`; not in
                vector collections.
            filters: none, one for all queries, or one per query.
            include_vectors: whether to return the hits' vectors.
            timeout_s: see the class.

        Raises:
            InvalidArgumentError: not exactly one kind of queries, or the service says so.
        """
        if sum(queries is not None for queries in (vectors, texts, ids)) != 1:
            raise InvalidArgumentError(
                "search needs exactly one of vectors, texts and ids", reason="NO_QUERIES"
            )
        with building():
            request = epb.SearchRequest(
                collection=collection,
                k=k,
                filters=_convert.filters_to_proto(filters, where),
                include_vectors=include_vectors,
                vectors=None if vectors is None else to_block(vectors),
                texts=None
                if texts is None
                else epb.TextQueries(texts=_convert.strings(texts, "texts")),
                ids=None if ids is None else epb.IdQueries(ids=_convert.strings(ids, "ids")),
            )
        response = await self._read(self._embedder.Search, request, timeout_s)
        return _convert.search_from_proto(response, include_vectors)

    async def watch_items(
        self, *, collection: str = "items", after_seq: int = 0
    ) -> AsyncIterator[types.ItemChanges]:
        """Follows a collection's vectors: all changes after `after_seq`, then new ones.

        It has no deadline and does not reconnect: after an UnavailableError, watch again from
        the last `seq`. Ends with NotFoundError when the collection is deleted.
        """
        with building():
            request = epb.WatchItemsRequest(collection=collection, after_seq=after_seq)
        if self._closed:
            raise _closed()
        call = self._embedder.WatchItems(request, metadata=self._metadata())
        try:
            async for message in call:
                yield _convert.changes_from_proto(message)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    # --- Collections ------------------------------------------------------------------------------

    async def create_text_collection(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> types.Collection:
        """Creates a collection whose vectors the service's encoder makes.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        with building():
            request = epb.CreateCollectionRequest(name=name, text=epb.TextCollection())
        return await self._create(request, request_id, timeout_s)

    async def create_vector_collection(
        self, name: str, cols: int, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> types.Collection:
        """Creates a collection for the caller's vectors of `cols` dimensions.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        with building():
            request = epb.CreateCollectionRequest(name=name, vector=epb.VectorCollection(cols=cols))
        return await self._create(request, request_id, timeout_s)

    async def create_derived_collection(
        self,
        name: str,
        source: str,
        projection: Projection,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> types.Collection:
        """Creates a collection that follows the text collection `source` through `projection`.

        Raises:
            AlreadyExistsError: the name is taken.
            NotFoundError: there is no such source.
        """
        with building():
            derived = projection.to_derived(source)
            request = epb.CreateCollectionRequest(name=name, derived=derived)
        return await self._create(request, request_id, timeout_s)

    async def list_collections(
        self, *, timeout_s: float | None = None
    ) -> tuple[types.Collection, ...]:
        """All collections in the order of their names."""
        response = await self._read(
            self._embedder.ListCollections, epb.ListCollectionsRequest(), timeout_s
        )
        return tuple(_convert.collection_from_proto(one) for one in response.collections)

    async def delete_collection(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Deletes a collection and all in it.

        Raises:
            NotFoundError: there is none of this name.
            FailedPreconditionError: it is built in, or others are derived from it.
        """
        with building():
            request = epb.DeleteCollectionRequest(name=name, request_id=new_request_id(request_id))
        await self._write(self._embedder.DeleteCollection, request, timeout_s)

    async def embedder_info(self, *, timeout_s: float | None = None) -> types.EmbedderInfo:
        """What runs as the embedder."""
        response = await self._read(self._embedder.GetInfo, epb.GetInfoRequest(), timeout_s)
        return _convert.embedder_info_from_proto(response)

    # --- Events -----------------------------------------------------------------------------------

    async def ingest_events(
        self,
        events: Iterable[types.Event],
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> types.IngestResult:
        """Stores events, in one call. `import_events` takes any number."""
        with building():
            request = event_pb.IngestEventsRequest(
                events=_convert.events_to_proto(events), request_id=new_request_id(request_id)
            )
        response = await self._write(self._events.IngestEvents, request, timeout_s)
        return _convert.ingest_from_proto(response)

    async def import_events(
        self,
        events: Iterable[types.Event],
        *,
        progress: Callable[[int], None] | None = None,
        timeout_s: float | None = None,
    ) -> types.ImportResult:
        """Stores any number of events, in as many calls as it takes.

        Args:
            events: read as they are sent.
            progress: called after each call with the number of events done.
            timeout_s: deadline of each call.

        Raises:
            ForetellError: a call failed; what was sent before stays stored. Sent again, events
                with an event_id are known; those without would be stored twice.
        """
        sent = written = duplicates = failed = 0
        failures: list[types.Failure] = []
        for batch in batches(_convert.events_to_proto(events), IMPORT_EVENTS):
            request = event_pb.IngestEventsRequest(events=batch, request_id=new_request_id(None))
            response = await self._write(self._events.IngestEvents, request, timeout_s)
            failures += _convert.failures_from_proto(
                response.failures[: IMPORT_FAILURES - len(failures)], sent
            )
            sent += len(batch)
            written += response.accepted
            duplicates += response.duplicates
            failed += len(response.failures)
            if progress is not None:
                progress(sent)
        return types.ImportResult(sent, written, duplicates, failed, tuple(failures))

    async def list_events(
        self,
        user_id: str,
        *,
        page_size: int = 0,
        page_token: str = "",
        timeout_s: float | None = None,
    ) -> types.Page[types.Event]:
        """A page of a user's events, newest first; size 0 means 100."""
        with building():
            request = event_pb.ListEventsRequest(
                user_id=user_id, page_size=page_size, page_token=page_token
            )
        response = await self._read(self._events.ListEvents, request, timeout_s)
        events = tuple(_convert.event_from_proto(event) for event in response.events)
        return types.Page(events, response.next_page_token)

    async def delete_user(
        self, user_id: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> types.DeletedUser:
        """Deletes a user's events at once, and in the background the texts only theirs."""
        with building():
            request = event_pb.DeleteUserRequest(
                user_id=user_id, request_id=new_request_id(request_id)
            )
        response = await self._write(self._events.DeleteUser, request, timeout_s)
        return types.DeletedUser(response.deletion_id, response.deleted_events)

    # --- Predictions ------------------------------------------------------------------------------

    async def predict(
        self,
        user_id: str = "",
        *,
        history: Sequence[types.Event] = (),
        k: int | None = None,
        allow_item_ids: Sequence[str] = (),
        deny_item_ids: Sequence[str] = (),
        repeats: types.Repeats | None = None,
        timeout_s: float | None = None,
    ) -> types.Prediction:
        """The next behavior types and items of a user; see PredictionQuery for the arguments."""
        query = types.PredictionQuery(user_id, history, k, allow_item_ids, deny_item_ids, repeats)
        with building():
            request = prediction_pb.PredictRequest(query=_convert.query_to_proto(query))
        response = await self._read(self._predictions.Predict, request, timeout_s)
        return _convert.prediction_from_proto(response.prediction, response.timings)

    async def predict_many(
        self, queries: Iterable[types.PredictionQuery], *, timeout_s: float | None = None
    ) -> types.PredictManyResult:
        """Predictions for up to 256 queries, in one call."""
        with building():
            request = prediction_pb.PredictManyRequest(
                queries=[_convert.query_to_proto(query) for query in queries]
            )
        response = await self._read(self._predictions.PredictMany, request, timeout_s)
        return _convert.predictions_from_proto(response)

    async def rank(
        self,
        user_id: str,
        item_ids: Sequence[str],
        *,
        history: Sequence[types.Event] = (),
        k: int | None = None,
        allow_item_ids: Sequence[str] = (),
        deny_item_ids: Sequence[str] = (),
        repeats: types.Repeats | None = None,
        timeout_s: float | None = None,
    ) -> types.Prediction:
        """Orders up to 1,000 items for a user; see PredictionQuery for the other arguments."""
        query = types.PredictionQuery(user_id, history, k, allow_item_ids, deny_item_ids, repeats)
        with building():
            request = prediction_pb.RankRequest(
                query=_convert.query_to_proto(query),
                item_ids=_convert.strings(item_ids, "item_ids"),
            )
        response = await self._read(self._predictions.Rank, request, timeout_s)
        return _convert.prediction_from_proto(response.prediction, response.timings)

    # --- Models -----------------------------------------------------------------------------------

    async def list_models(
        self, *, page_size: int = 0, page_token: str = "", timeout_s: float | None = None
    ) -> types.Page[types.Model]:
        """A page of the registered versions, newest first; size 0 means 100."""
        with building():
            request = model_pb.ListModelsRequest(page_size=page_size, page_token=page_token)
        response = await self._read(self._models.ListModels, request, timeout_s)
        models = tuple(_convert.model_from_proto(model) for model in response.models)
        return types.Page(models, response.next_page_token)

    async def activate_model(
        self, version: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> types.ActivatedModel:
        """Makes a version the one that answers; returns when every predictor process has it.

        Raises:
            NotFoundError: it is not registered.
            DeadlineExceededError: some processes have not confirmed; it names them.
        """
        with building():
            request = model_pb.ActivateModelRequest(
                version=version, request_id=new_request_id(request_id)
            )
        response = await self._write(self._models.ActivateModel, request, timeout_s)
        model = _convert.model_from_proto(response.model)
        return types.ActivatedModel(model, response.previous_version)

    async def delete_model(
        self, version: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Deletes a version and its collections.

        Raises:
            NotFoundError: it is not registered.
            FailedPreconditionError: it is the active one.
        """
        with building():
            request = model_pb.DeleteModelRequest(
                version=version, request_id=new_request_id(request_id)
            )
        await self._write(self._models.DeleteModel, request, timeout_s)

    async def predictor_info(self, *, timeout_s: float | None = None) -> types.PredictorInfo:
        """What runs as the predictor."""
        response = await self._read(self._models.GetInfo, model_pb.GetInfoRequest(), timeout_s)
        return _convert.predictor_info_from_proto(response)

    # --- Calling ----------------------------------------------------------------------------------

    async def _create(
        self, request: epb.CreateCollectionRequest, request_id: str | None, timeout_s: float | None
    ) -> types.Collection:
        with building():
            request.request_id = new_request_id(request_id)
        response = await self._write(self._embedder.CreateCollection, request, timeout_s)
        return _convert.collection_from_proto(response.collection)

    async def _read(self, method: AsyncUnary[Q, R], request: Q, timeout_s: float | None) -> R:
        deadline = self._deadline(timeout_s, self._settings.timeout_s)
        return await self._call(method, request, deadline, wait_for_ready=False)

    async def _write(self, method: AsyncUnary[Q, R], request: Q, timeout_s: float | None) -> R:
        deadline = self._deadline(timeout_s, self._settings.write_timeout_s)
        return await self._call(method, request, deadline, wait_for_ready=True)

    def _deadline(self, given: float | None, usual: float) -> float:
        if given is not None:
            return given
        return usual if self._timeout_s is None else self._timeout_s

    async def _call(
        self, method: AsyncUnary[Q, R], request: Q, timeout_s: float, *, wait_for_ready: bool
    ) -> R:
        if self._closed:
            raise _closed()
        deadline = time.monotonic() + timeout_s
        attempts = 0
        while True:
            attempts += 1
            try:
                return await method(
                    request,
                    timeout=max(0.0, deadline - time.monotonic()),
                    wait_for_ready=wait_for_ready,
                    metadata=self._metadata(),
                )
            except grpc.RpcError as error:
                if attempts == MAX_ATTEMPTS or not cut_off(error):
                    raise from_rpc_error(error) from None

    @property
    def _embedder(self) -> AsyncEmbedderStub:
        stub: AsyncEmbedderStub = self._stub(EmbedderServiceStub, "embedder")
        return stub

    @property
    def _events(self) -> AsyncEventStub:
        stub: AsyncEventStub = self._stub(EventServiceStub, "predictor")
        return stub

    @property
    def _predictions(self) -> AsyncPredictionStub:
        stub: AsyncPredictionStub = self._stub(PredictionServiceStub, "predictor")
        return stub

    @property
    def _models(self) -> AsyncModelStub:
        stub: AsyncModelStub = self._stub(ModelServiceStub, "predictor")
        return stub

    def _stub(self, kind: Callable[[AsyncChannel], Any], service: str) -> Any:
        """The stub, made by the first call so that it belongs to the caller's event loop; and
        made anew when certificates have changed."""
        if self._closed:
            raise _closed()
        with self._lock:
            if self._credentials.get() is not self._opened_with:
                self._opened_with = self._credentials.get()
                # Calls in flight go on; a channel without calls soon lets go of its connections.
                self._retired += self._channels.values()
                self._channels.clear()
                self._stubs.clear()
            stub = self._stubs.get(kind.__name__)
            if stub is None:
                stub = self._stubs[kind.__name__] = kind(self._channel(service))
            return stub

    def _channel(self, service: str) -> AsyncChannel:
        address = self._addresses[service]
        if not address:
            raise FailedPreconditionError(
                f"this client has no address of the {service}; give it as {service}='HOST:PORT'",
                reason="NO_ADDRESS",
            )
        if service not in self._channels:
            self._channels[service] = async_channel(address, self._settings, self._opened_with)
        return self._channels[service]


def _element_type(float16: bool) -> common_pb2.ElementType.ValueType:
    return common_pb2.ELEMENT_TYPE_FLOAT16 if float16 else common_pb2.ELEMENT_TYPE_FLOAT32


def _closed() -> FailedPreconditionError:
    return FailedPreconditionError("this client is closed", reason="CLOSED")

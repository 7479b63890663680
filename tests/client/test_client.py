"""Both clients against a server that answers what the test says and keeps what it was asked."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

import foretell
from foretell import checks
from foretell._channel import batches
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as epb
from foretell.errors import DETAILS_KEY
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.vectors import to_block

Answer = Message | grpc.StatusCode | foretell.ForetellError
REQUESTS: dict[str, type[Message]] = {
    f"/{service.full_name}/{method.name}": method.input_type._concrete_class
    for module in (epb, event_pb, prediction_pb, model_pb)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


class Server(grpc.GenericRpcHandler):
    """Answers each method with the next of its answers; the last one stands."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[Any] = []
        self.remaining_s: list[float] = []
        self.cancelled = threading.Event()
        self.blocked = threading.Event()
        self.server: grpc.Server | None = None

    def start(self, port: int = 0) -> str:
        self.server = grpc.server(
            ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 26)]
        )
        self.server.add_generic_rpc_handlers((self,))
        port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        self.blocked.set()
        if self.server is not None:
            self.server.stop(0).wait()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any]:
        path = handler_call_details.method
        name = path.rpartition("/")[2]

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            return self._answer(name, request, context)

        make = (
            grpc.unary_stream_rpc_method_handler
            if name == "WatchItems"
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            answer,
            request_deserializer=REQUESTS[path].FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.remaining_s.append(context.time_remaining() or float("inf"))
        if name == "WatchItems":
            return self._stream(context)
        answers = self.answers[name]
        return self._give(answers.pop(0) if len(answers) > 1 else answers[0], context)

    def _stream(self, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(self.cancelled.set)
        for answer in self.answers["WatchItems"]:
            yield self._give(answer, context)
        self.blocked.wait()

    def _give(self, answer: Answer, context: grpc.ServicerContext) -> Any:
        if answer is grpc.StatusCode.UNKNOWN:  # stands for an answer that never comes
            self.blocked.wait()
            return None
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "said the test")
        if isinstance(answer, foretell.ForetellError):
            context.set_trailing_metadata(((DETAILS_KEY, answer.to_status().SerializeToString()),))
            context.abort(answer.code, answer.message)
        return answer


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def address(server: Server) -> str:
    return server.start()


class Caller:
    """Calls a method of either client and waits for the result."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, method: str, *args: Any, client: dict[str, Any], **kwargs: Any) -> Any:
        if self.kind == "sync":
            with foretell.Client(**client) as sync_client:
                result = getattr(sync_client, method)(*args, **kwargs)
                return list(result) if inspect.isgenerator(result) else result

        async def call() -> Any:
            async with foretell.AsyncClient(**client) as async_client:
                result = getattr(async_client, method)(*args, **kwargs)
                if inspect.isasyncgen(result):
                    return [each async for each in result]
                return await result

        return asyncio.run(call())


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


FAILURE = checks.failure(1, foretell.InvalidArgumentError("bad", reason="BAD", field="x[1]"))
TIMINGS = common_pb2.Timings(total_us=5, search_us=2)
MOMENT = datetime(2024, 5, 1, 10, 0, 0, 123_456, tzinfo=UTC)
STAMP = Timestamp(seconds=1714557600, nanos=123_456_000)
ITEM = epb.Item(id="i", text="tea", attributes={"a": "b"})
EVENT = event_pb.Event(
    user_id="u", behavior_type="buy", timestamp=STAMP, item_id="i", event_id="e", text="tea"
)
CLIENT_EVENT = foretell.Event("u", "buy", MOMENT, "i", "tea", "e")
COLLECTION = epb.Collection(
    name="c", kind=epb.COLLECTION_KIND_DERIVED, source="items", cols=2, items=3, seq=4, index="Flat"
)
CLIENT_COLLECTION = foretell.Collection(
    "c", foretell.CollectionKind.DERIVED, "items", 2, 3, 4, "Flat"
)
MODEL = model_pb.Model(
    version="v",
    model_type="lstm",
    active=True,
    registered_at=STAMP,
    behavior_types=["buy"],
    items=3,
    repeats=prediction_pb.REPEATS_ALLOWED,
    metrics={"hits@10": 0.5},
    parts=["ranker"],
)
CLIENT_MODEL = foretell.Model(
    "v", "lstm", True, MOMENT, ("buy",), 3, foretell.Repeats.ALLOWED, {"hits@10": 0.5}, ("ranker",)
)
PREDICTION = prediction_pb.Prediction(
    behavior_types=[prediction_pb.BehaviorTypeProbability(behavior_type="buy", probability=1)],
    items=[
        prediction_pb.ScoredItem(
            item_id="i",
            interest_score=2,
            probability=0.5,
            method=prediction_pb.METHOD_POPULAR,
            behavior_types=[
                prediction_pb.BehaviorTypeProbability(behavior_type="buy", probability=1)
            ],
        )
    ],
    model_version="v",
    fallback_reason=prediction_pb.FALLBACK_REASON_NO_HISTORY,
    shortfall_reason=prediction_pb.SHORTFALL_REASON_FILTERED,
    candidates=200,
    missing_ids=["gone"],
    pending_texts=1,
    history_events=2,
    predicted_behavior_type="buy",
    expected_gap_s=60,
)
CLIENT_TIMINGS = foretell.Timings(total_us=5, search_us=2)
CLIENT_PREDICTION = foretell.Prediction(
    (foretell.BehaviorTypeProbability("buy", 1.0),),
    (
        foretell.ScoredItem(
            "i",
            2.0,
            0.5,
            foretell.Method.POPULAR,
            (foretell.BehaviorTypeProbability("buy", 1.0),),
        ),
    ),
    "v",
    foretell.FallbackReason.NO_HISTORY,
    foretell.ShortfallReason.FILTERED,
    200,
    ("gone",),
    1,
    2,
    "buy",
    60.0,
    CLIENT_TIMINGS,
)
QUERY = prediction_pb.PredictionQuery(
    user_id="u",
    history=[event_pb.Event(behavior_type="buy", item_id="i")],
    k=3,
    allow_item_ids=["i"],
    deny_item_ids=["j"],
    repeats=prediction_pb.REPEATS_EXCLUDED,
)
QUERY_ARGS: dict[str, Any] = {
    "history": [foretell.Event("", "buy", item_id="i")],
    "k": 3,
    "allow_item_ids": ["i"],
    "deny_item_ids": ["j"],
    "repeats": foretell.Repeats.EXCLUDED,
}
PROJECTION = foretell.Projection(
    (foretell.AffineLayer(np.ones((2, 3), np.float32), np.zeros(2, np.float32)),), normalize=True
)
MATRIX = np.array([[1, 2], [3, 4]], np.float32)

CASES: list[tuple[str, tuple[Any, ...], dict[str, Any], str, Message, Message, Any]] = [
    (
        "upsert_items",
        ([foretell.Item("i", "tea", {"a": "b"})],),
        {},
        "UpsertItems",
        epb.UpsertItemsRequest(collection="items", items=[ITEM]),
        epb.UpsertItemsResponse(upserted=1, encoded=1, seq=7, timings=TIMINGS),
        foretell.UpsertResult(1, 1, (), 7, CLIENT_TIMINGS),
    ),
    (
        "put_vectors",
        ("c", ["a", "b"], [[1, 2], [3, 4]]),
        {"float16": True},
        "PutVectors",
        epb.PutVectorsRequest(
            collection="c",
            ids=["a", "b"],
            vectors=to_block(MATRIX, common_pb2.ELEMENT_TYPE_FLOAT16),
        ),
        epb.PutVectorsResponse(written=2, seq=3),
        foretell.PutResult(2, (), 3),
    ),
    (
        "list_items",
        (),
        {"collection": "c", "page_size": 1, "page_token": "t"},
        "ListItems",
        epb.ListItemsRequest(collection="c", page_size=1, page_token="t"),
        epb.ListItemsResponse(items=[ITEM], next_page_token="n"),
        foretell.Page((foretell.Item("i", "tea", {"a": "b"}),), "n"),
    ),
    (
        "delete_items",
        (["i", "gone"],),
        {},
        "DeleteItems",
        epb.DeleteItemsRequest(collection="items", ids=["i", "gone"]),
        epb.DeleteItemsResponse(deleted=1, missing_ids=["gone"], seq=2),
        foretell.DeleteResult(1, ("gone",), 2),
    ),
    (
        "create_text_collection",
        ("c",),
        {},
        "CreateCollection",
        epb.CreateCollectionRequest(name="c", text=epb.TextCollection()),
        epb.CreateCollectionResponse(collection=COLLECTION),
        CLIENT_COLLECTION,
    ),
    (
        "create_vector_collection",
        ("c", 2),
        {},
        "CreateCollection",
        epb.CreateCollectionRequest(name="c", vector=epb.VectorCollection(cols=2)),
        epb.CreateCollectionResponse(collection=COLLECTION),
        CLIENT_COLLECTION,
    ),
    (
        "create_derived_collection",
        ("c", "items", PROJECTION),
        {},
        "CreateCollection",
        epb.CreateCollectionRequest(name="c", derived=PROJECTION.to_derived("items")),
        epb.CreateCollectionResponse(collection=COLLECTION),
        CLIENT_COLLECTION,
    ),
    (
        "list_collections",
        (),
        {},
        "ListCollections",
        epb.ListCollectionsRequest(),
        epb.ListCollectionsResponse(collections=[COLLECTION]),
        (CLIENT_COLLECTION,),
    ),
    (
        "delete_collection",
        ("c",),
        {},
        "DeleteCollection",
        epb.DeleteCollectionRequest(name="c"),
        epb.DeleteCollectionResponse(),
        None,
    ),
    (
        "embedder_info",
        (),
        {},
        "GetInfo",
        epb.GetInfoRequest(),
        epb.GetInfoResponse(version="1", encoder="e", cols=3, libraries={"faiss": "1"}),
        foretell.EmbedderInfo("1", "e", "", 3, 0, "", {"faiss": "1"}, False, 0, 0, "", 0.0, 0.0),
    ),
    (
        "ingest_events",
        ([CLIENT_EVENT],),
        {},
        "IngestEvents",
        event_pb.IngestEventsRequest(events=[EVENT]),
        event_pb.IngestEventsResponse(accepted=1, duplicates=2),
        foretell.IngestResult(1, 2, ()),
    ),
    (
        "list_events",
        ("u",),
        {"page_size": 5},
        "ListEvents",
        event_pb.ListEventsRequest(user_id="u", page_size=5),
        event_pb.ListEventsResponse(events=[EVENT]),
        foretell.Page((CLIENT_EVENT,), ""),
    ),
    (
        "delete_user",
        ("u",),
        {},
        "DeleteUser",
        event_pb.DeleteUserRequest(user_id="u"),
        event_pb.DeleteUserResponse(deletion_id="d", deleted_events=3),
        foretell.DeletedUser("d", 3),
    ),
    (
        "predict",
        ("u",),
        QUERY_ARGS,
        "Predict",
        prediction_pb.PredictRequest(query=QUERY),
        prediction_pb.PredictResponse(prediction=PREDICTION, timings=TIMINGS),
        CLIENT_PREDICTION,
    ),
    (
        "rank",
        ("u", ["i", "j"]),
        QUERY_ARGS,
        "Rank",
        prediction_pb.RankRequest(query=QUERY, item_ids=["i", "j"]),
        prediction_pb.RankResponse(prediction=PREDICTION, timings=TIMINGS),
        CLIENT_PREDICTION,
    ),
    (
        "list_models",
        (),
        {},
        "ListModels",
        model_pb.ListModelsRequest(),
        model_pb.ListModelsResponse(models=[MODEL], next_page_token="n"),
        foretell.Page((CLIENT_MODEL,), "n"),
    ),
    (
        "activate_model",
        ("v",),
        {},
        "ActivateModel",
        model_pb.ActivateModelRequest(version="v"),
        model_pb.ActivateModelResponse(model=MODEL, previous_version="w"),
        foretell.ActivatedModel(CLIENT_MODEL, "w"),
    ),
    (
        "delete_model",
        ("v",),
        {},
        "DeleteModel",
        model_pb.DeleteModelRequest(version="v"),
        model_pb.DeleteModelResponse(),
        None,
    ),
    (
        "predictor_info",
        (),
        {},
        "GetInfo",
        model_pb.GetInfoRequest(),
        model_pb.GetInfoResponse(version="1", events=2, users=1, embedder_available=True),
        foretell.PredictorInfo("1", "", 2, 1, 0, "", True, 0, {}),
    ),
]


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "rpc", "request_", "response", "result"),
    CASES,
    ids=[case[0] for case in CASES],
)
def test_requests_and_results(
    call: Caller,
    server: Server,
    address: str,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rpc: str,
    request_: Any,
    response: Message,
    result: Any,
) -> None:
    server.answers[rpc] = [response]
    client = {"embedder": address, "predictor": address}
    assert call(method, *args, client=client, **kwargs) == result
    (asked,) = server.requests
    if "request_id" in asked.DESCRIPTOR.fields_by_name:  # each write carries one
        assert len(asked.request_id) == 32
        asked.request_id = ""
    assert asked == request_


def test_every_rpc_has_a_method() -> None:
    called = {case[3] for case in CASES}
    called |= {"Embed", "GetItems", "Search", "WatchItems", "PredictMany"}  # tests of their own
    assert called == {path.rpartition("/")[2] for path in REQUESTS}


def test_embed(call: Caller, server: Server, address: str) -> None:
    block = to_block(MATRIX, common_pb2.ELEMENT_TYPE_FLOAT16)
    server.answers["Embed"] = [
        epb.EmbedResponse(vectors=block, failures=[FAILURE], timings=TIMINGS)
    ]
    result = call("embed", ["a", "b"], collection="c", float16=True, client={"embedder": address})
    assert server.requests == [
        epb.EmbedRequest(
            texts=["a", "b"], collection="c", element_type=common_pb2.ELEMENT_TYPE_FLOAT16
        )
    ]
    np.testing.assert_array_equal(result.vectors, MATRIX)
    assert result.vectors.dtype == np.float32
    (failure,) = result.failures
    assert failure.index == 1
    assert isinstance(failure.error, foretell.InvalidArgumentError)
    assert (failure.error.reason, failure.error.field) == ("BAD", "x[1]")
    assert result.timings == CLIENT_TIMINGS


@pytest.mark.parametrize("include_vectors", [False, True])
def test_get_items(call: Caller, server: Server, address: str, include_vectors: bool) -> None:
    server.answers["GetItems"] = [
        epb.GetItemsResponse(
            items=[ITEM],
            vectors=to_block(MATRIX[:1]) if include_vectors else None,
            missing_ids=["gone"],
        )
    ]
    result = call(
        "get_items", ["gone", "i"], include_vectors=include_vectors, client={"embedder": address}
    )
    assert result.items == (foretell.Item("i", "tea", {"a": "b"}),)
    assert result.missing_ids == ("gone",)
    if include_vectors:
        np.testing.assert_array_equal(result.vectors, MATRIX[:1])
    else:
        assert result.vectors is None


@pytest.mark.parametrize(
    ("queries", "request_"),
    [
        ({"vectors": MATRIX}, epb.SearchRequest(collection="items", vectors=to_block(MATRIX))),
        (
            {"texts": ["tea"], "k": 2, "filters": foretell.Filter(["i"], ["j"])},
            epb.SearchRequest(
                collection="items",
                texts=epb.TextQueries(texts=["tea"]),
                k=2,
                filters=[epb.QueryFilter(allow_ids=["i"], deny_ids=["j"])],
            ),
        ),
        (
            {
                "ids": ["i", "j"],
                "collection": "c",
                "filters": [foretell.Filter(), foretell.Filter(deny_ids=["i"])],
                "include_vectors": True,
            },
            epb.SearchRequest(
                collection="c",
                ids=epb.IdQueries(ids=["i", "j"]),
                filters=[epb.QueryFilter(), epb.QueryFilter(deny_ids=["i"])],
                include_vectors=True,
            ),
        ),
    ],
)
def test_search(
    call: Caller, server: Server, address: str, queries: dict[str, Any], request_: Message
) -> None:
    scores = np.array([0.5, 0.25], "<f4")
    hits = epb.SearchResult(ids=["i", "j"], scores=scores.tobytes(), vectors=to_block(MATRIX))
    server.answers["Search"] = [
        epb.SearchResponse(
            results=[hits, epb.SearchResult()], failures=[FAILURE], missing_ids=["gone"]
        )
    ]
    result = call("search", client={"embedder": address}, **queries)
    assert server.requests == [request_]
    assert result.hits[0].ids == ("i", "j")
    np.testing.assert_array_equal(result.hits[0].scores, scores)
    if queries.get("include_vectors"):
        np.testing.assert_array_equal(result.hits[0].vectors, MATRIX)
    assert result.hits[1].ids == ()
    assert [failure.index for failure in result.failures] == [1]
    assert result.missing_ids == ("gone",)


def test_predict_many(call: Caller, server: Server, address: str) -> None:
    server.answers["PredictMany"] = [
        prediction_pb.PredictManyResponse(
            predictions=[PREDICTION, prediction_pb.Prediction()],
            failures=[FAILURE],
            timings=TIMINGS,
        )
    ]
    queries = [foretell.PredictionQuery("u", **QUERY_ARGS), foretell.PredictionQuery("")]
    result = call("predict_many", queries, client={"predictor": address})
    assert server.requests == [
        prediction_pb.PredictManyRequest(queries=[QUERY, prediction_pb.PredictionQuery()])
    ]
    assert result.predictions[0] == CLIENT_PREDICTION
    assert result.predictions[1].items == ()
    assert result.predictions[1].fallback_reason is None
    assert [failure.index for failure in result.failures] == [1]


def test_values_newer_than_the_client_are_unknown_and_no_error(
    call: Caller, server: Server, address: str
) -> None:
    newer = prediction_pb.Prediction(
        items=[prediction_pb.ScoredItem(method=99)],  # type: ignore[arg-type]
        fallback_reason=99,  # type: ignore[arg-type]
        shortfall_reason=99,  # type: ignore[arg-type]
    )
    server.answers["Predict"] = [prediction_pb.PredictResponse(prediction=newer)]
    prediction = call("predict", "u", client={"predictor": address})
    assert prediction.items[0].method is foretell.Method.UNKNOWN
    assert prediction.fallback_reason is foretell.FallbackReason.UNKNOWN
    assert prediction.shortfall_reason is foretell.ShortfallReason.UNKNOWN


# --- Watching -------------------------------------------------------------------------------------

CHANGES = epb.WatchItemsResponse(
    ids=["a", "b"], vectors=to_block(MATRIX), deleted_ids=["c"], seq=9, caught_up=True
)


def test_watch_ends_with_the_services_error(server: Server, address: str) -> None:
    server.answers["WatchItems"] = [
        CHANGES,
        epb.WatchItemsResponse(seq=10),
        foretell.NotFoundError("deleted", reason="COLLECTION_NOT_FOUND"),
    ]
    with foretell.Client(address) as client:
        watch = iter(client.watch_items(collection="c", after_seq=4))
        first, second = next(watch), next(watch)
        with pytest.raises(foretell.NotFoundError, match="deleted"):
            next(watch)
    assert server.requests == [epb.WatchItemsRequest(collection="c", after_seq=4)]
    assert server.remaining_s[0] > 1e6  # a watch has no deadline
    assert (first.ids, first.deleted_ids, first.seq, first.caught_up) == (
        ("a", "b"),
        ("c",),
        9,
        True,
    )
    np.testing.assert_array_equal(first.vectors, MATRIX)
    assert (second.ids, len(second.vectors)) == ((), 0)


def test_leaving_a_watch_cancels_the_call(server: Server, address: str) -> None:
    server.answers["WatchItems"] = [CHANGES]
    with foretell.Client(address) as client:
        watch = client.watch_items()
        assert next(iter(watch)).seq == 9
        watch.close()  # type: ignore[attr-defined]
        assert server.cancelled.wait(30)


async def test_leaving_an_async_watch_cancels_the_call(server: Server, address: str) -> None:
    server.answers["WatchItems"] = [CHANGES]

    async def first(watch: AsyncIterator[foretell.ItemChanges]) -> foretell.ItemChanges:
        try:
            async for changes in watch:
                return changes
        finally:
            await watch.aclose()  # type: ignore[attr-defined]
        raise AssertionError

    async with foretell.AsyncClient(address) as client:
        assert (await first(client.watch_items())).seq == 9
        assert await asyncio.to_thread(server.cancelled.wait, 30)


# --- Imports --------------------------------------------------------------------------------------


def test_import_items_in_calls(call: Caller, server: Server, address: str) -> None:
    server.answers["UpsertItems"] = [
        epb.UpsertItemsResponse(upserted=500),
        epb.UpsertItemsResponse(upserted=499, failures=[FAILURE]),
        epb.UpsertItemsResponse(upserted=1),
    ]
    done: list[int] = []
    items = (foretell.Item(str(i)) for i in range(1_001))
    result = call("import_items", items, progress=done.append, client={"embedder": address})
    assert [len(request.items) for request in server.requests] == [500, 500, 1]
    assert len({request.request_id for request in server.requests}) == 3
    assert done == [500, 1_000, 1_001]
    assert (result.sent, result.written, result.failed) == (1_001, 1_000, 1)
    assert [failure.index for failure in result.failures] == [501]


def test_import_events_counts_all_failures_and_keeps_the_first_thousand(
    call: Caller, server: Server, address: str
) -> None:
    server.answers["IngestEvents"] = [
        event_pb.IngestEventsResponse(accepted=4_000, duplicates=100, failures=[FAILURE] * 900),
        event_pb.IngestEventsResponse(accepted=100, failures=[FAILURE] * 200),
    ]
    events = [foretell.Event("u", "buy", item_id="i")] * 5_300
    result = call("import_events", events, client={"predictor": address})
    assert [len(request.events) for request in server.requests] == [5_000, 300]
    assert (result.sent, result.written, result.duplicates, result.failed) == (
        5_300,
        4_100,
        100,
        1_100,
    )
    assert len(result.failures) == 1_000
    assert result.failures[-1].index == 5_001


def test_imports_of_nothing(call: Caller, server: Server, address: str) -> None:
    client = {"embedder": address, "predictor": address}
    assert call("import_items", [], client=client) == foretell.ImportResult(0, 0, 0, 0, ())
    assert call("import_events", [], client=client) == foretell.ImportResult(0, 0, 0, 0, ())
    assert server.requests == []


def test_batches_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell._channel.IMPORT_BYTES", 100)
    items = [epb.Item(id=str(i), text="x" * n) for i, n in enumerate([40, 40, 40, 200, 1])]
    assert [[item.id for item in batch] for batch in batches(items, 10)] == [
        ["0", "1"],
        ["2"],
        ["3"],
        ["4"],
    ]


# --- Retries, deadlines, errors -------------------------------------------------------------------

FAST = foretell.ClientSettings(initial_backoff_s=0.01, max_backoff_s=0.02)


def test_a_large_write_is_repeated_with_the_same_request_id(
    call: Caller, server: Server, address: str
) -> None:
    server.answers["UpsertItems"] = [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAVAILABLE,
        epb.UpsertItemsResponse(upserted=100),
    ]
    items = [foretell.Item(str(i), "x" * 20_000) for i in range(100)]  # 2 MB
    result = call("upsert_items", items, client={"embedder": address, "settings": FAST})
    assert result.upserted == 100
    assert len(server.requests) == 3
    assert len({request.request_id for request in server.requests}) == 1


def test_attempts_end(call: Caller, server: Server, address: str) -> None:
    server.answers["GetInfo"] = [grpc.StatusCode.UNAVAILABLE]
    with pytest.raises(foretell.UnavailableError, match="said the test"):
        call("embedder_info", client={"embedder": address, "settings": FAST})
    assert len(server.requests) == 5


def test_other_errors_are_not_repeated(call: Caller, server: Server, address: str) -> None:
    server.answers["GetInfo"] = [
        foretell.ResourceExhaustedError("full", reason="QUEUE_FULL", retry_after_s=1.5)
    ]
    with pytest.raises(foretell.ResourceExhaustedError, match="full") as caught:
        call("embedder_info", client={"embedder": address, "settings": FAST})
    assert caught.value.retry_after_s == 1.5
    assert caught.value.reason == "QUEUE_FULL"
    assert len(server.requests) == 1


def test_the_callers_request_id_stands(call: Caller, server: Server, address: str) -> None:
    server.answers["DeleteUser"] = [event_pb.DeleteUserResponse()]
    call("delete_user", "u", request_id="mine", client={"predictor": address})
    assert server.requests == [event_pb.DeleteUserRequest(user_id="u", request_id="mine")]


@pytest.mark.parametrize(
    ("client", "kwargs", "seconds"),
    [
        ({}, {}, 30),
        ({"settings": foretell.ClientSettings(timeout_s=50)}, {}, 50),
        ({"timeout_s": 70}, {}, 70),
        ({"timeout_s": 70}, {"timeout_s": 90}, 90),
    ],
)
def test_every_call_has_a_deadline(
    call: Caller,
    server: Server,
    address: str,
    client: dict[str, Any],
    kwargs: dict[str, Any],
    seconds: float,
) -> None:
    server.answers["GetInfo"] = [epb.GetInfoResponse()]
    call("embedder_info", client={"embedder": address, **client}, **kwargs)
    assert seconds - 10 < server.remaining_s[0] < seconds + 2  # gRPC rounds up on the wire


def test_writes_have_a_longer_deadline(call: Caller, server: Server, address: str) -> None:
    server.answers["UpsertItems"] = [epb.UpsertItemsResponse()]
    call("upsert_items", [], client={"embedder": address})
    assert 110 < server.remaining_s[0] < 122


def test_deadline(call: Caller, server: Server, address: str) -> None:
    server.answers["GetInfo"] = [grpc.StatusCode.UNKNOWN]  # never answers
    with pytest.raises(foretell.DeadlineExceededError):
        call("embedder_info", timeout_s=0.1, client={"embedder": address})
    server.blocked.set()


def test_a_read_of_an_absent_service_fails_soon(call: Caller, free_port: Callable[[], int]) -> None:
    with pytest.raises(foretell.UnavailableError):
        call("embedder_info", client={"embedder": f"127.0.0.1:{free_port()}", "settings": FAST})


def test_a_write_waits_for_an_absent_service(
    call: Caller, server: Server, free_port: Callable[[], int]
) -> None:
    port = free_port()
    server.answers["UpsertItems"] = [epb.UpsertItemsResponse(upserted=1)]
    with ThreadPoolExecutor(1) as pool:
        write = pool.submit(
            call, "upsert_items", [foretell.Item("i")], client={"embedder": f"127.0.0.1:{port}"}
        )
        server.start(port)
        assert write.result(60).upserted == 1


# --- The caller's faults --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "args", "kwargs", "message"),
    [
        ("embed", (["\ud800"],), {}, "cannot be sent"),
        ("embed", ("tea",), {}, "texts is one string; give a list of them"),
        ("get_items", ("i1",), {}, "ids is one string"),
        ("search", (), {"texts": "tea"}, "texts is one string"),
        ("search", (), {"ids": ["i"], "filters": foretell.Filter("i")}, "allow_ids is one string"),
        ("rank", ("u", "i1"), {}, "item_ids is one string"),
        ("predict", ("u",), {"deny_item_ids": "i1"}, "deny_item_ids is one string"),
        ("search", (), {}, "exactly one of vectors, texts and ids"),
        ("search", (), {"texts": ["a"], "ids": ["b"]}, "exactly one of"),
        ("search", (), {"texts": ["a"], "k": -1}, "cannot be sent"),
        ("search", (), {"vectors": [[1.0], [1.0, 2.0]]}, "cannot be sent"),
        ("search", (), {"vectors": [1.0]}, "shape"),
        ("put_vectors", ("c", ["a"], [["x"]]), {}, "cannot be sent"),
        ("predict", ("u",), {"k": -1}, "cannot be sent"),
        ("predict", ("u",), {"k": 1 << 40}, "cannot be sent"),
        ("list_models", (), {"page_size": 1 << 40}, "cannot be sent"),
        (
            "ingest_events",
            ([CLIENT_EVENT, foretell.Event("u", "buy", datetime(2024, 5, 1))],),
            {},
            r"events\[1\] cannot be sent: .* has no time zone",
        ),
        (
            "upsert_items",
            ([foretell.Item("i"), foretell.Item("j", "\udcff")],),
            {},
            r"items\[1\] cannot be sent",
        ),
        (
            "predict",
            ("u",),
            {"history": [foretell.Event("", "buy", datetime(2024, 5, 1))]},
            r"history\[0\] cannot be sent",
        ),
        ("create_vector_collection", ("c", -1), {}, "cannot be sent"),
        ("delete_user", ("u",), {"request_id": "\ud800"}, "cannot be sent"),
        ("create_text_collection", ("c",), {"request_id": "\ud800"}, "cannot be sent"),
    ],
)
def test_what_no_message_can_hold(
    call: Caller,
    server: Server,
    address: str,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    message: str,
) -> None:
    client = {"embedder": address, "predictor": address}
    with pytest.raises(foretell.InvalidArgumentError, match=message):
        call(method, *args, client=client, **kwargs)
    assert server.requests == []


def test_addresses(call: Caller, address: str) -> None:
    with pytest.raises(foretell.InvalidArgumentError, match="needs the address"):
        call("embedder_info", client={})
    with pytest.raises(foretell.FailedPreconditionError, match="no address of the embedder"):
        call("embedder_info", client={"predictor": address})
    with pytest.raises(foretell.FailedPreconditionError, match="predictor='HOST:PORT'"):
        call("predict", "u", client={"embedder": address})


def test_a_closed_client_says_so(server: Server, address: str) -> None:
    server.answers["GetInfo"] = [epb.GetInfoResponse()]
    client = foretell.Client(address, address)
    client.embedder_info()
    client.close()
    client.close()
    for use in (
        client.embedder_info,
        client.predictor_info,
        lambda: next(iter(client.watch_items())),
    ):
        with pytest.raises(foretell.FailedPreconditionError, match="closed"):
            use()


def test_threads_share_a_client(server: Server, address: str) -> None:
    server.answers["GetInfo"] = [epb.GetInfoResponse(version="1")]
    with foretell.Client(address) as client, ThreadPoolExecutor(8) as pool:
        infos = list(pool.map(lambda _: client.embedder_info(), range(50)))
    assert {info.version for info in infos} == {"1"}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_settings_are_checked(value: float) -> None:
    with pytest.raises(foretell.InvalidArgumentError, match="timeout_s is"):
        foretell.ClientSettings(timeout_s=value)


# --- One client in two forms ----------------------------------------------------------------------


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
        return {
            name: [
                (p.name, p.kind, p.default) for p in inspect.signature(member).parameters.values()
            ]
            for name, member in vars(kind).items()
            if not name.startswith("_")
        }

    assert public(foretell.Client) == public(foretell.AsyncClient)
    documented = [m for n, m in vars(foretell.Client).items() if not n.startswith("_")]
    assert all(member.__doc__ for member in documented)


def test_all_is_sorted_and_complete() -> None:
    public = [
        name
        for name, value in vars(foretell).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]
    assert sorted(public) == foretell.__all__ == sorted(foretell.__all__)

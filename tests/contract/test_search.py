"""Embed, Search, WatchItems and GetInfo: the contract of the fake and of the real embedder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.vectors import from_block, to_block

if TYPE_CHECKING:
    from tests.contract.conftest import Failed, Refused, Services

COLS = 384
INVALID = "INVALID_ARGUMENT"

ROWS = {"a": [1.0, 0.0], "b": [0.75, 0.5], "c": [0.0, 1.0], "d": [-1.0, 0.0]}
"""Of the collection `plane`; exact in float32."""


@pytest.fixture
def plane(services: Services, unique: str) -> str:
    """A vector collection of 2 dimensions with ROWS."""
    create = pb.CreateCollectionRequest(name=unique, vector=pb.VectorCollection(cols=2))
    services.embedder.CreateCollection(create, timeout=60)
    block = to_block(list(ROWS.values()))
    request = pb.PutVectorsRequest(collection=unique, ids=ROWS, vectors=block)
    services.embedder.PutVectors(request, timeout=60)
    return unique


@pytest.fixture
def drinks(services: Services, unique: str) -> str:
    """A text collection."""
    name = f"{unique}.drinks"
    create = pb.CreateCollectionRequest(name=name, text=pb.TextCollection())
    services.embedder.CreateCollection(create, timeout=60)
    texts = {"t": "green tea with mint", "c": "strong black coffee", "x": "a blue sports car"}
    items = [pb.Item(id=item_id, text=text) for item_id, text in texts.items()]
    services.embedder.UpsertItems(pb.UpsertItemsRequest(collection=name, items=items), timeout=60)
    return name


def search(services: Services, collection: str, queries: Any, **fields: Any) -> pb.SearchResponse:
    """Searches by rows, where `queries` is a list of them."""
    if isinstance(queries, list):
        queries = {"vectors": to_block(np.array(queries, np.float32))}
    request = pb.SearchRequest(collection=collection, **queries, **fields)
    return services.embedder.Search(request, timeout=60)


def hits(result: pb.SearchResult) -> dict[str, float]:
    scores = np.frombuffer(result.scores, "<f4").tolist()
    return dict(zip(result.ids, scores, strict=True))


# --- Embed ----------------------------------------------------------------------------------------


def test_texts_become_vectors_of_length_1_in_their_order(services: Services) -> None:
    texts = ["green tea", "a blue car", "green tea"]
    answer = services.embedder.Embed(pb.EmbedRequest(texts=texts), timeout=60)
    vectors = from_block(answer.vectors)
    assert vectors.shape == (3, COLS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert vectors[0] @ vectors[1] < 0.9
    assert answer.timings.total_us > 0


def test_similar_texts_are_near(services: Services) -> None:
    texts = ["fresh green apples", "green apple", "wireless network cable"]
    answer = services.embedder.Embed(pb.EmbedRequest(texts=texts), timeout=60)
    apples, apple, cable = from_block(answer.vectors)
    assert apples @ apple > apples @ cable + 0.2


def test_vectors_come_in_the_format_asked_for(services: Services) -> None:
    request = pb.EmbedRequest(texts=["tea"])
    exact = services.embedder.Embed(request, timeout=60).vectors
    request.element_type = common_pb2.ELEMENT_TYPE_FLOAT16
    half = services.embedder.Embed(request, timeout=60).vectors
    assert exact.element_type == common_pb2.ELEMENT_TYPE_FLOAT32
    assert (half.element_type, len(half.data)) == (common_pb2.ELEMENT_TYPE_FLOAT16, 2 * COLS)
    np.testing.assert_allclose(from_block(half), from_block(exact), atol=1e-3)


def test_an_unknown_format_is_refused(services: Services, refused: Refused) -> None:
    request = pb.EmbedRequest(texts=["tea"], element_type=9)  # type: ignore[arg-type]
    refused(services.embedder.Embed, request, INVALID, "BAD_ELEMENT_TYPE", "element_type")


def test_faulty_texts_are_named_and_the_others_encoded(services: Services, failed: Failed) -> None:
    texts = ["tea", "", " \t", "x" * 20_001, "word " * 4_000]
    answer = services.embedder.Embed(pb.EmbedRequest(texts=texts), timeout=60)
    assert failed(answer.failures) == {
        1: (INVALID, "EMPTY_TEXT", "texts[1]"),
        2: (INVALID, "EMPTY_TEXT", "texts[2]"),
        3: (INVALID, "TOO_LONG", "texts[3]"),
    }
    vectors = from_block(answer.vectors)
    assert vectors.shape == (5, COLS)
    assert vectors.any(axis=1).tolist() == [True, False, False, False, True]


def test_texts_can_be_embedded_in_a_derived_space(services: Services, unique: str) -> None:
    layer = pb.AffineLayer(weight=to_block(np.eye(4, COLS)), activation=pb.ACTIVATION_IDENTITY)
    derived = pb.DerivedCollection(source="items", layers=[layer])
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=unique, derived=derived))
    texts = ["tea", ""]
    answer = services.embedder.Embed(pb.EmbedRequest(texts=texts, collection=unique))
    plain = services.embedder.Embed(pb.EmbedRequest(texts=texts))
    assert [each.index for each in answer.failures] == [1]
    expected = from_block(plain.vectors)[:, :4]
    np.testing.assert_allclose(from_block(answer.vectors), expected, atol=1e-5)


# --- Search ---------------------------------------------------------------------------------------


def test_the_nearest_come_first_with_their_inner_products(services: Services, plane: str) -> None:
    answer = search(services, plane, [[2.0, 0.0], [0.0, 1.0]])
    first, second = map(hits, answer.results)
    assert list(first) == ["a", "b", "c", "d"]
    assert first == pytest.approx({"a": 2, "b": 1.5, "c": 0, "d": -2}, abs=1e-6)
    assert list(second)[:2] == ["c", "b"]
    assert not answer.results[0].HasField("vectors")


def test_k_bounds_the_hits_and_is_10_by_default(services: Services, plane: str) -> None:
    assert list(hits(search(services, plane, [[1, 0]], k=2).results[0])) == ["a", "b"]
    assert len(search(services, plane, [[1, 0]], k=1_000).results[0].ids) == 4
    block = to_block(np.ones((20, 2), np.float32))
    ids = [f"more{number}" for number in range(20)]
    services.embedder.PutVectors(pb.PutVectorsRequest(collection=plane, ids=ids, vectors=block))
    assert len(search(services, plane, [[1, 0]]).results[0].ids) == 10


def test_scores_go_on_beyond_the_hits_where_they_are_wanted(services: Services, plane: str) -> None:
    def found(**fields: int) -> tuple[list[str], list[float]]:
        result = search(services, plane, [[2, 0]], **fields).results[0]
        return list(result.ids), np.frombuffer(result.scores, "<f4").tolist()

    assert found(k=1, scores_k=3) == (["a"], [2, 1.5, 0])
    assert found(k=2, scores_k=1_000) == (["a", "b"], [2, 1.5, 0, -2])
    assert found(k=3, scores_k=1) == (["a", "b", "c"], [2, 1.5, 0])


def test_vectors_of_hits_come_when_asked_for(services: Services, plane: str) -> None:
    result = search(services, plane, [[0, 1]], k=3, include_vectors=True).results[0]
    expected = [ROWS[item_id] for item_id in result.ids]
    np.testing.assert_allclose(from_block(result.vectors), expected, atol=1e-6)


def test_half_precision_queries_are_taken(services: Services, plane: str) -> None:
    block = to_block([[0.5, 0]], common_pb2.ELEMENT_TYPE_FLOAT16)
    answer = search(services, plane, {"vectors": block}, k=1)
    assert hits(answer.results[0]) == pytest.approx({"a": 0.5})


def test_ids_are_queries_and_not_excluded(services: Services, failed: Failed, plane: str) -> None:
    answer = search(services, plane, {"ids": pb.IdQueries(ids=["c", "nobody", "a", ""])}, k=1)
    assert [list(result.ids) for result in answer.results] == [["c"], [], ["a"], []]
    assert failed(answer.failures) == {
        1: ("NOT_FOUND", "NO_ITEM", "ids.ids[1]"),
        3: (INVALID, "EMPTY_ID", "ids.ids[3]"),
    }
    assert "nobody" in answer.missing_ids


def test_texts_are_queries(services: Services, failed: Failed, drinks: str) -> None:
    queries = pb.TextQueries(texts=["green mint tea", "", "a blue car", "x" * 20_001])
    answer = search(services, drinks, {"texts": queries}, k=1)
    assert [list(result.ids) for result in answer.results] == [["t"], [], ["x"], []]
    assert failed(answer.failures) == {
        1: (INVALID, "EMPTY_TEXT", "texts.texts[1]"),
        3: (INVALID, "TOO_LONG", "texts.texts[3]"),
    }


def test_texts_are_queries_in_a_derived_space(services: Services, drinks: str) -> None:
    layer = pb.AffineLayer(weight=to_block(-np.eye(COLS)), activation=pb.ACTIVATION_IDENTITY)
    derived = pb.DerivedCollection(source=drinks, layers=[layer])
    name = f"{drinks}.negative"
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=name, derived=derived))
    texts = pb.TextQueries(texts=["green tea with mint"])
    found = hits(search(services, name, {"texts": texts}).results[0])
    assert next(iter(found)) == "t"
    assert found["t"] == pytest.approx(1, abs=1e-2)


def test_rows_that_are_not_finite_fail_alone(
    services: Services, failed: Failed, plane: str
) -> None:
    answer = search(services, plane, [[1, 0], [np.nan, 0], [0, np.inf], [0, 1]], k=1)
    assert [list(result.ids) for result in answer.results] == [["a"], [], [], ["c"]]
    assert failed(answer.failures) == {
        1: (INVALID, "NOT_FINITE", "vectors[1]"),
        2: (INVALID, "NOT_FINITE", "vectors[2]"),
    }


def test_filters_allow_and_deny(services: Services, plane: str) -> None:
    one = pb.QueryFilter(allow_ids=["d", "c", "nobody"])
    answer = search(services, plane, [[1, 0], [0, 1]], filters=[one])
    assert [list(result.ids) for result in answer.results] == [["c", "d"], ["c", "d"]]
    assert list(answer.missing_ids) == ["nobody"]
    each = [pb.QueryFilter(deny_ids=["a", "nobody"]), pb.QueryFilter(allow_ids=["a"])]
    answer = search(services, plane, [[1, 0], [0, 1]], filters=each)
    assert [list(result.ids) for result in answer.results] == [["b", "c", "d"], ["a"]]
    assert list(answer.missing_ids) == []
    both = pb.QueryFilter(allow_ids=["a", "b"], deny_ids=["a"])
    assert list(search(services, plane, [[1, 0]], filters=[both]).results[0].ids) == ["b"]


def test_a_filter_that_nothing_passes_answers_nothing(services: Services, plane: str) -> None:
    answer = search(services, plane, [[1, 0]], filters=[pb.QueryFilter(allow_ids=["nobody"])])
    assert hits(answer.results[0]) == {}
    assert list(answer.missing_ids) == ["nobody"]


def test_the_largest_filters_are_taken(services: Services, plane: str) -> None:
    many = [f"{number}" for number in range(9_999)]
    allow = pb.QueryFilter(allow_ids=[*many, "b"])
    assert list(search(services, plane, [[1, 0]], filters=[allow]).results[0].ids) == ["b"]
    deny = pb.QueryFilter(deny_ids=[*many, "a"])
    assert list(search(services, plane, [[1, 0]], k=1, filters=[deny]).results[0].ids) == ["b"]


def test_written_and_deleted_items_are_found_and_not_found_at_once(
    services: Services, plane: str
) -> None:
    services.embedder.PutVectors(
        pb.PutVectorsRequest(collection=plane, ids=["d"], vectors=to_block([[9.0, 0.0]]))
    )
    assert next(iter(hits(search(services, plane, [[1, 0]]).results[0]))) == "d"
    services.embedder.DeleteItems(pb.DeleteItemsRequest(collection=plane, ids=["d", "a"]))
    assert list(hits(search(services, plane, [[1, 0]]).results[0])) == ["b", "c"]


QUERY_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "none": ({}, "EMPTY", "queries"),
    "no texts": ({"texts": pb.TextQueries()}, "EMPTY", "queries"),
    "no ids": ({"ids": pb.IdQueries()}, "EMPTY", "queries"),
    "257 ids": ({"ids": pb.IdQueries(ids=["a"] * 257)}, "TOO_MANY", "queries"),
    "257 texts": ({"texts": pb.TextQueries(texts=["a"] * 257)}, "TOO_MANY", "queries"),
    "257 rows": ({"vectors": to_block(np.ones((257, 2)))}, "TOO_MANY", "queries"),
    "k 0": ({"ids": pb.IdQueries(ids=["a"]), "k": 0}, "BAD_K", "k"),
    "k 1001": ({"ids": pb.IdQueries(ids=["a"]), "k": 1_001}, "BAD_K", "k"),
    "k of 32 bits": ({"ids": pb.IdQueries(ids=["a"]), "k": 2**32 - 1}, "BAD_K", "k"),
    "scores_k 0": ({"ids": pb.IdQueries(ids=["a"]), "scores_k": 0}, "BAD_K", "scores_k"),
    "scores_k 1001": ({"ids": pb.IdQueries(ids=["a"]), "scores_k": 1_001}, "BAD_K", "scores_k"),
    "scores_k with vectors": (
        {"ids": pb.IdQueries(ids=["a"]), "scores_k": 11, "include_vectors": True},
        "BAD_K",
        "scores_k",
    ),
    "dimensions": ({"vectors": to_block(np.ones((1, 3)))}, "WRONG_COLS", "vectors.cols"),
    "bytes": (
        {
            "vectors": common_pb2.VectorBlock(
                data=b"1234567", element_type=common_pb2.ELEMENT_TYPE_FLOAT32, rows=1, cols=2
            )
        },
        "BAD_VECTOR_BLOCK",
        "vectors.data",
    ),
    "two filters": (
        {"ids": pb.IdQueries(ids=["a"] * 3), "filters": [pb.QueryFilter()] * 2},
        "BAD_FILTERS",
        "filters",
    ),
    "long allow list": (
        {
            "ids": pb.IdQueries(ids=["a"]),
            "filters": [pb.QueryFilter(allow_ids=["a"] * 10_001)],
        },
        "TOO_MANY",
        "filters[0].allow_ids",
    ),
    "long deny list": (
        {"ids": pb.IdQueries(ids=["a"]), "filters": [pb.QueryFilter(deny_ids=["a"] * 10_001)]},
        "TOO_MANY",
        "filters[0].deny_ids",
    ),
    "empty allowed id": (
        {"ids": pb.IdQueries(ids=["a"]), "filters": [pb.QueryFilter(allow_ids=["a", ""])]},
        "EMPTY_ID",
        "filters[0].allow_ids[1]",
    ),
    "empty denied id": (
        {"ids": pb.IdQueries(ids=["a"]), "filters": [pb.QueryFilter(deny_ids=[""])]},
        "EMPTY_ID",
        "filters[0].deny_ids[0]",
    ),
}


@pytest.mark.parametrize("case", QUERY_FAULTS)
def test_bad_searches_are_refused(
    services: Services, refused: Refused, plane: str, case: str
) -> None:
    fields, reason, field = QUERY_FAULTS[case]
    request = pb.SearchRequest(collection=plane, **fields)
    refused(services.embedder.Search, request, INVALID, reason, field)


def test_256_queries_are_answered(services: Services, plane: str) -> None:
    answer = search(services, plane, {"ids": pb.IdQueries(ids=["c"] * 256)}, k=1)
    assert [list(result.ids) for result in answer.results] == [["c"]] * 256


# --- WatchItems -----------------------------------------------------------------------------------


class Watch:
    """What a watcher knows of a collection."""

    def __init__(self, calls: Iterator[pb.WatchItemsResponse]) -> None:
        self.calls = calls
        self.vectors: dict[str, list[float]] = {}
        self.deleted: list[str] = []
        self.seq = 0

    def catch_up(self, until: int = 0) -> dict[str, list[float]]:
        """Reads until all that was committed, up to a write at least, is known."""
        while True:
            message = next(self.calls)
            assert message.seq >= self.seq
            self.seq = message.seq
            rows = from_block(message.vectors).tolist() if message.ids else []
            self.vectors |= dict(zip(message.ids, rows, strict=True))
            for item_id in message.deleted_ids:
                self.vectors.pop(item_id, None)
                self.deleted.append(item_id)
            if message.caught_up and self.seq >= until:
                return self.vectors


@contextlib.contextmanager
def watching(services: Services, collection: str, after_seq: int = 0) -> Iterator[Watch]:
    request = pb.WatchItemsRequest(collection=collection, after_seq=after_seq)
    call = services.embedder.WatchItems(request, timeout=60)
    try:
        yield Watch(call)
    finally:
        call.cancel()


def test_a_watch_begins_with_all_and_goes_on_with_changes(services: Services, plane: str) -> None:
    with watching(services, plane) as watch:
        assert watch.catch_up() == ROWS
        row = to_block([[3.0, 4.0]])
        put = pb.PutVectorsRequest(collection=plane, ids=["a"], vectors=row)
        assert watch.catch_up(services.embedder.PutVectors(put).seq)["a"] == [3.0, 4.0]
        deletion = pb.DeleteItemsRequest(collection=plane, ids=["b", "c"])
        assert watch.catch_up(services.embedder.DeleteItems(deletion).seq).keys() == {"a", "d"}


def test_a_watch_goes_on_where_another_ended(services: Services, plane: str) -> None:
    with watching(services, plane) as watch:
        watch.catch_up()
        seq = watch.seq
    put = pb.PutVectorsRequest(collection=plane, ids=["new"], vectors=to_block([[5.0, 0.0]]))
    services.embedder.PutVectors(put)
    deletion = pb.DeleteItemsRequest(collection=plane, ids=["d"])
    until = services.embedder.DeleteItems(deletion).seq
    with watching(services, plane, seq) as watch:
        assert watch.catch_up(until) == {"new": [5.0, 0.0]}
        assert watch.deleted == ["d"]


def test_a_watch_of_an_empty_collection_says_that_this_is_all(
    services: Services, unique: str
) -> None:
    create = pb.CreateCollectionRequest(name=unique, vector=pb.VectorCollection(cols=2))
    services.embedder.CreateCollection(create)
    with watching(services, unique) as watch:
        assert watch.catch_up() == {}


def test_a_watch_of_many_items_gives_each_once(services: Services, plane: str) -> None:
    rows = np.arange(20_000, dtype=np.float32).reshape(10_000, 2)
    ids = [f"{number}" for number in range(10_000)]
    put = pb.PutVectorsRequest(collection=plane, ids=ids, vectors=to_block(rows))
    until = services.embedder.PutVectors(put, timeout=60).seq
    with watching(services, plane) as watch:
        found = watch.catch_up(until)
    assert found == dict(zip(ids, rows.tolist(), strict=True)) | ROWS


def test_a_watch_of_a_derived_collection_follows_the_source(
    services: Services, drinks: str
) -> None:
    layer = pb.AffineLayer(weight=to_block(np.eye(2, COLS)), activation=pb.ACTIVATION_IDENTITY)
    derived = pb.DerivedCollection(source=drinks, layers=[layer])
    name = f"{drinks}.two"
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=name, derived=derived))
    with watching(services, name) as watch:
        assert watch.catch_up().keys() == {"t", "c", "x"}
        items = [pb.Item(id="new", text="lemonade")]
        upsert = pb.UpsertItemsRequest(collection=drinks, items=items)
        assert "new" in watch.catch_up(services.embedder.UpsertItems(upsert).seq)
        before = list(watch.vectors["t"])
        residual = pb.PutVectorsRequest(collection=name, ids=["t"], vectors=to_block([[1.0, 2.0]]))
        after = watch.catch_up(services.embedder.PutVectors(residual).seq)["t"]
        assert after == pytest.approx([before[0] + 1, before[1] + 2], abs=1e-5)
        deletion = pb.DeleteItemsRequest(collection=drinks, ids=["x", "new"])
        assert watch.catch_up(services.embedder.DeleteItems(deletion).seq).keys() == {"t", "c"}


def test_a_watch_ends_when_its_collection_is_deleted(
    services: Services, refused: Refused, plane: str
) -> None:
    with watching(services, plane) as watch:
        watch.catch_up()
        services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=plane))
        refused(
            lambda *_, **__: watch.catch_up(2**63), b"", "NOT_FOUND", "NO_COLLECTION", "collection"
        )


def test_bad_watches_are_refused(services: Services, refused: Refused, unique: str) -> None:
    def watch(request: pb.WatchItemsRequest, timeout: float) -> None:
        list(services.embedder.WatchItems(request, timeout=timeout))

    unknown = pb.WatchItemsRequest(collection=unique)
    refused(watch, unknown, "NOT_FOUND", "NO_COLLECTION", "collection")
    ahead = pb.WatchItemsRequest(after_seq=2**62)
    refused(watch, ahead, INVALID, "SEQ_AHEAD", "after_seq")


def test_a_watch_lasts_until_its_deadline(services: Services, plane: str) -> None:
    call = services.embedder.WatchItems(pb.WatchItemsRequest(collection=plane), timeout=0.5)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


# --- GetInfo --------------------------------------------------------------------------------------


def test_info_says_what_runs(services: Services) -> None:
    services.embedder.Embed(pb.EmbedRequest(texts=["tea", "tea"]))
    info = services.embedder.GetInfo(pb.GetInfoRequest(), timeout=60)
    assert info.has_store
    assert info.cols == COLS
    assert info.pooling in ("mean", "cls", "last_token")
    assert info.device in ("cpu", "cuda")
    assert all((info.version, info.encoder, info.max_tokens, info.libraries["grpcio"]))
    assert info.texts_encoded > 0
    assert info.texts_cached > 0

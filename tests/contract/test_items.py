"""Items and vectors of the embedder: the contract of the fake and of the real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.projection import AffineLayer, Projection
from foretell.terms import TermRows, fit_vocabulary
from foretell.texts import text_id
from foretell.vectors import Vectors, from_block, to_block

if TYPE_CHECKING:
    from tests.contract.conftest import Failed, Refused, Services

COLS = 384
INVALID = "INVALID_ARGUMENT"


@pytest.fixture
def texts(services: Services, unique: str) -> str:
    """An empty text collection."""
    request = pb.CreateCollectionRequest(name=unique, text=pb.TextCollection())
    services.embedder.CreateCollection(request, timeout=60)
    return unique


@pytest.fixture
def vectors(services: Services, unique: str) -> str:
    """An empty vector collection of 3 dimensions."""
    name = f"{unique}.vectors"
    request = pb.CreateCollectionRequest(name=name, vector=pb.VectorCollection(cols=3))
    services.embedder.CreateCollection(request, timeout=60)
    return name


@pytest.fixture
def halves(services: Services, texts: str) -> str:
    """A collection derived from `texts`: half the first 4 numbers of the text's vector."""
    weight = to_block(np.eye(4, COLS) / 2)
    layers = [pb.AffineLayer(weight=weight, activation=pb.ACTIVATION_IDENTITY)]
    derived = pb.DerivedCollection(source=texts, layers=layers)
    request = pb.CreateCollectionRequest(name=f"{texts}.halves", derived=derived)
    services.embedder.CreateCollection(request, timeout=60)
    return f"{texts}.halves"


def upsert(services: Services, collection: str, *items: pb.Item) -> pb.UpsertItemsResponse:
    request = pb.UpsertItemsRequest(collection=collection, items=items)
    return services.embedder.UpsertItems(request, timeout=60)


def put(services: Services, collection: str, rows: dict[str, Any]) -> pb.PutVectorsResponse:
    block = to_block(np.array(list(rows.values()), np.float32))
    request = pb.PutVectorsRequest(collection=collection, ids=rows, vectors=block)
    return services.embedder.PutVectors(request, timeout=60)


def get(services: Services, collection: str, *ids: str) -> pb.GetItemsResponse:
    request = pb.GetItemsRequest(collection=collection, ids=ids, include_vectors=True)
    return services.embedder.GetItems(request, timeout=60)


def vector(services: Services, collection: str, item_id: str) -> Vectors:
    answer = get(services, collection, item_id)
    assert [item.id for item in answer.items] == [item_id]
    row: Vectors = from_block(answer.vectors)[0]
    return row


def ids_of(services: Services, collection: str) -> list[str]:
    request = pb.ListItemsRequest(collection=collection, page_size=1_000)
    return [item.id for item in services.embedder.ListItems(request, timeout=60).items]


# --- upserts --------------------------------------------------------------------------------------


def test_an_item_is_read_as_it_was_written(services: Services, texts: str) -> None:
    item = pb.Item(id="a", text="green tea", attributes={"brand": "x", "size": "l"})
    answer = upsert(services, texts, item)
    assert (answer.upserted, len(answer.failures)) == (1, 0)
    assert answer.seq > 0
    found = get(services, texts, "a")
    assert list(found.items) == [item]
    assert np.linalg.norm(from_block(found.vectors)[0]) == pytest.approx(1, abs=1e-3)


def test_vectors_come_only_when_asked_for(services: Services, texts: str) -> None:
    upsert(services, texts, pb.Item(id="a", text="tea"))
    answer = services.embedder.GetItems(pb.GetItemsRequest(collection=texts, ids=["a"]))
    assert not answer.HasField("vectors")


def test_an_upsert_replaces_text_attributes_and_vector(services: Services, texts: str) -> None:
    upsert(services, texts, pb.Item(id="a", text="tea", attributes={"old": "1"}))
    before = vector(services, texts, "a")
    changed = pb.Item(id="a", text="a blue car", attributes={"new": "2"})
    assert upsert(services, texts, changed).upserted == 1
    assert list(get(services, texts, "a").items) == [changed]
    assert before @ vector(services, texts, "a") < 0.9
    assert ids_of(services, texts) == ["a"]


def test_attributes_alone_can_change(services: Services, texts: str) -> None:
    upsert(services, texts, pb.Item(id="a", text="tea"))
    changed = pb.Item(id="a", text="tea", attributes={"new": "2"})
    answer = upsert(services, texts, changed)
    assert (answer.upserted, answer.encoded) == (1, 0)
    assert list(get(services, texts, "a").items) == [changed]


def test_a_text_is_encoded_once(services: Services, texts: str, unique: str) -> None:
    items = [pb.Item(id=f"{number}", text=f"the same text {unique}") for number in range(3)]
    assert upsert(services, texts, *items).encoded == 1
    assert upsert(services, texts, pb.Item(id="4", text=f"the same text {unique}")).encoded == 0


def test_of_items_with_the_same_id_the_last_one_stands(services: Services, texts: str) -> None:
    answer = upsert(services, texts, *(pb.Item(id="a", text=f"text {n}") for n in range(3)))
    assert not answer.failures
    assert get(services, texts, "a").items[0].text == "text 2"
    assert ids_of(services, texts) == ["a"]


def test_an_empty_text_has_the_zero_vector(services: Services, texts: str) -> None:
    assert upsert(services, texts, pb.Item(id="a")).upserted == 1
    assert not vector(services, texts, "a").any()


FAULTS: list[tuple[pb.Item, str, str]] = [
    (pb.Item(id="", text="a"), "EMPTY_ID", "id"),
    (pb.Item(id="i" * 129, text="a"), "TOO_LONG", "id"),
    (pb.Item(id="a\u0085b", text="a"), "CONTROL_CHARACTERS", "id"),
    (pb.Item(id="long", text="x" * 20_001), "TOO_LONG", "text"),
    (pb.Item(id="many", attributes={f"k{n}": "" for n in range(65)}), "TOO_MANY", "attributes"),
    (pb.Item(id="key", attributes={"": "v"}), "EMPTY_ID", "attributes[]"),
    (pb.Item(id="value", attributes={"k": "v" * 1_025}), "TOO_LONG", "attributes[k]"),
]


def test_faulty_items_are_named_and_the_others_written(
    services: Services, failed: Failed, texts: str
) -> None:
    items = [
        each
        for at, (item, _, _) in enumerate(FAULTS)
        for each in (item, pb.Item(id=f"good{at}", text="good"))
    ]
    answer = upsert(services, texts, *items)
    assert answer.upserted == len(FAULTS)
    assert failed(answer.failures) == {
        2 * at: (INVALID, reason, f"items[{2 * at}].{field}")
        for at, (_, reason, field) in enumerate(FAULTS)
    }
    assert ids_of(services, texts) == [f"good{at}" for at in range(len(FAULTS))]


def test_what_is_just_within_the_limits_is_written(services: Services, texts: str) -> None:
    attributes = {f"{number:064}": "v" * 1_024 for number in range(64)}
    item = pb.Item(id="字" * 128, text="word " * 4_000, attributes=attributes)
    assert upsert(services, texts, item).upserted == 1
    assert list(get(services, texts, item.id).items) == [item]


@pytest.mark.parametrize(("number", "reason"), [(0, "EMPTY"), (10_001, "TOO_MANY")])
def test_batches_of_the_wrong_size_write_nothing(
    services: Services, refused: Refused, texts: str, vectors: str, number: int, reason: str
) -> None:
    embedder = services.embedder
    ids = ["a"] * number
    items = pb.UpsertItemsRequest(collection=texts, items=[pb.Item(id="a")] * number)
    refused(embedder.UpsertItems, items, INVALID, reason, "items")
    rows = to_block(np.ones((number, 3), np.float32))
    given = pb.PutVectorsRequest(collection=vectors, ids=ids, vectors=rows)
    refused(embedder.PutVectors, given, INVALID, reason, "ids")
    deleted = pb.DeleteItemsRequest(collection=texts, ids=ids)
    refused(embedder.DeleteItems, deleted, INVALID, reason, "ids")
    refused(embedder.GetItems, pb.GetItemsRequest(ids=ids), INVALID, reason, "ids")
    refused(embedder.Embed, pb.EmbedRequest(texts=ids), INVALID, reason, "texts")
    assert ids_of(services, texts) == []
    assert ids_of(services, vectors) == []


def test_behaviors_are_named_by_their_texts(
    services: Services, failed: Failed, unique: str
) -> None:
    text = f"looked at {unique}"
    mine = text_id(text)
    try:
        answer = upsert(
            services,
            "behaviors",
            pb.Item(text=text),
            pb.Item(id="another", text=text),
            pb.Item(text=" "),
        )
        assert answer.upserted == 1
        assert failed(answer.failures) == {
            1: (INVALID, "BAD_BEHAVIOR_ID", "items[1].id"),
            2: (INVALID, "EMPTY_TEXT", "items[2].text"),
        }
        assert [item.text for item in get(services, "behaviors", mine).items] == [text]
        assert upsert(services, "behaviors", pb.Item(id=mine, text=text)).upserted == 1
    finally:
        services.embedder.DeleteItems(pb.DeleteItemsRequest(collection="behaviors", ids=[mine]))


# --- reads and deletions --------------------------------------------------------------------------


def test_items_come_in_the_order_asked_for_and_missing_ones_are_named(
    services: Services, texts: str
) -> None:
    upsert(services, texts, pb.Item(id="a", text="tea"), pb.Item(id="b", text="car"))
    answer = get(services, texts, "b", "nobody", "a", "none", "nobody")
    assert [item.id for item in answer.items] == ["b", "a"]
    assert list(answer.missing_ids) == ["nobody", "none"]
    assert from_block(answer.vectors).shape == (2, COLS)
    np.testing.assert_allclose(from_block(answer.vectors)[1], vector(services, texts, "a"))


@pytest.mark.parametrize(("item_id", "reason"), [("", "EMPTY_ID"), ("i" * 129, "TOO_LONG")])
def test_bad_ids_to_read_or_delete_are_refused(
    services: Services, refused: Refused, texts: str, item_id: str, reason: str
) -> None:
    upsert(services, texts, pb.Item(id="a", text="tea"))
    ids = ["a", item_id]
    for call, request in (
        (services.embedder.GetItems, pb.GetItemsRequest(collection=texts, ids=ids)),
        (services.embedder.DeleteItems, pb.DeleteItemsRequest(collection=texts, ids=ids)),
    ):
        refused(call, request, INVALID, reason, "ids[1]")
    assert ids_of(services, texts) == ["a"]


def test_pages_follow_one_another_in_the_order_of_ids(services: Services, texts: str) -> None:
    names = ["z", "a", "Z", "10", "9", "ü", "字", "aa"]
    upsert(services, texts, *(pb.Item(id=name) for name in names))
    found: list[str] = []
    token, sizes = "", list[int]()
    while not sizes or token:
        page = services.embedder.ListItems(
            pb.ListItemsRequest(collection=texts, page_size=3, page_token=token)
        )
        found += [item.id for item in page.items]
        sizes.append(len(page.items))
        token = page.next_page_token
    assert found == sorted(names)
    assert sizes == [3, 3, 2]


def test_page_size_has_a_default_and_a_largest(services: Services, vectors: str) -> None:
    put(services, vectors, {f"{number:04}": [1, 0, 0] for number in range(1_001)})
    for asked, given in ((0, 100), (1_000, 1_000), (2**31 - 1, 1_000)):
        request = pb.ListItemsRequest(collection=vectors, page_size=asked)
        answer = services.embedder.ListItems(request)
        assert len(answer.items) == given
        assert answer.next_page_token


def test_bad_pages_are_refused(services: Services, refused: Refused, texts: str) -> None:
    call = services.embedder.ListItems
    negative = pb.ListItemsRequest(collection=texts, page_size=-1)
    refused(call, negative, INVALID, "BAD_PAGE", "page_size")
    upsert(services, texts, pb.Item(id="a"), pb.Item(id="b"))
    token = services.embedder.ListItems(
        pb.ListItemsRequest(collection=texts, page_size=1)
    ).next_page_token
    for collection, bad in ((texts, "garbage!"), (texts, "AAAA"), (texts, "ü"), ("items", token)):
        request = pb.ListItemsRequest(collection=collection, page_token=bad)
        refused(call, request, INVALID, "BAD_PAGE_TOKEN", "page_token")


def test_deleted_items_are_gone_and_missing_ones_named(services: Services, texts: str) -> None:
    upsert(services, texts, *(pb.Item(id=name, text=name) for name in "abc"))
    request = pb.DeleteItemsRequest(collection=texts, ids=["a", "nobody", "c", "a"])
    answer = services.embedder.DeleteItems(request)
    assert (answer.deleted, list(answer.missing_ids)) == (2, ["nobody"])
    assert ids_of(services, texts) == ["b"]
    assert list(get(services, texts, "a", "b").missing_ids) == ["a"]
    again = services.embedder.DeleteItems(request)
    assert (again.deleted, list(again.missing_ids)) == (0, ["a", "nobody", "c"])


def test_writes_follow_one_another_in_seq(services: Services, texts: str, vectors: str) -> None:
    seqs = [
        upsert(services, texts, pb.Item(id="a", text="tea")).seq,
        put(services, vectors, {"a": [1, 2, 3]}).seq,
        services.embedder.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["a"])).seq,
    ]
    assert seqs == sorted(set(seqs))


# --- vectors --------------------------------------------------------------------------------------


def test_a_vector_is_read_as_it_was_written(services: Services, vectors: str) -> None:
    answer = put(services, vectors, {"a": [1, -2, 0.5], "b": [0, 0, 0]})
    assert (answer.written, len(answer.failures)) == (2, 0)
    assert vector(services, vectors, "a").tolist() == [1, -2, 0.5]
    put(services, vectors, {"a": [4, 5, 6]})
    assert vector(services, vectors, "a").tolist() == [4, 5, 6]
    assert get(services, vectors, "a").items[0] == pb.Item(id="a")
    assert ids_of(services, vectors) == ["a", "b"]


def test_half_precision_is_taken(services: Services, vectors: str) -> None:
    block = to_block(np.array([[0.5, 1, 2]]), common_pb2.ELEMENT_TYPE_FLOAT16)
    request = pb.PutVectorsRequest(collection=vectors, ids=["a"], vectors=block)
    assert services.embedder.PutVectors(request).written == 1
    assert vector(services, vectors, "a").tolist() == [0.5, 1, 2]


def test_of_rows_with_the_same_id_the_last_one_stands(services: Services, vectors: str) -> None:
    block = to_block(np.array([[1, 1, 1], [2, 2, 2]], np.float32))
    request = pb.PutVectorsRequest(collection=vectors, ids=["a", "a"], vectors=block)
    assert not services.embedder.PutVectors(request).failures
    assert vector(services, vectors, "a").tolist() == [2, 2, 2]


def test_faulty_rows_are_named_and_the_others_written(
    services: Services, failed: Failed, vectors: str
) -> None:
    rows = [
        [1e9, 2, 3], [np.nan, 0, 0], [0, np.inf, 0], [0, 0, -np.inf], [0, 0, 0], [0, 0, 0],
        [0, 3e38, 0],
    ]  # fmt: skip
    block = to_block(np.array(rows, np.float32))
    request = pb.PutVectorsRequest(
        collection=vectors, ids=["a", "b", "c", "d", "", "e" * 129, "f"], vectors=block
    )
    answer = services.embedder.PutVectors(request)
    assert answer.written == 1
    assert failed(answer.failures) == {
        1: (INVALID, "NOT_FINITE", "vectors[1]"),
        2: (INVALID, "NOT_FINITE", "vectors[2]"),
        3: (INVALID, "NOT_FINITE", "vectors[3]"),
        4: (INVALID, "EMPTY_ID", "ids[4]"),
        5: (INVALID, "TOO_LONG", "ids[5]"),
        6: (INVALID, "NOT_FINITE", "vectors[6]"),
    }
    assert ids_of(services, vectors) == ["a"]


FLOAT32 = common_pb2.ELEMENT_TYPE_FLOAT32
BLOCK_FAULTS: dict[str, tuple[common_pb2.VectorBlock, str, str]] = {
    "too few bytes": (
        common_pb2.VectorBlock(data=b"x" * 11, element_type=FLOAT32, rows=1, cols=3),
        "BAD_VECTOR_BLOCK",
        "vectors.data",
    ),
    "too many bytes": (
        common_pb2.VectorBlock(data=b"x" * 16, element_type=FLOAT32, rows=1, cols=3),
        "BAD_VECTOR_BLOCK",
        "vectors.data",
    ),
    "no element type": (
        common_pb2.VectorBlock(data=b"x" * 12, rows=1, cols=3),
        "BAD_VECTOR_BLOCK",
        "vectors.element_type",
    ),
    "an element type of the future": (
        common_pb2.VectorBlock(data=b"x" * 12, element_type=7, rows=1, cols=3),  # type: ignore[arg-type]
        "BAD_VECTOR_BLOCK",
        "vectors.element_type",
    ),
    "more dimensions than any": (
        common_pb2.VectorBlock(data=b"", element_type=FLOAT32, rows=1, cols=4_097),
        "BAD_VECTOR_BLOCK",
        "vectors.cols",
    ),
    "other dimensions": (to_block(np.ones((1, 4), np.float32)), "WRONG_COLS", "vectors.cols"),
    "two rows": (to_block(np.ones((2, 3), np.float32)), "WRONG_ROWS", "vectors.rows"),
    "no rows": (to_block(np.ones((0, 3), np.float32)), "WRONG_ROWS", "vectors.rows"),
}


@pytest.mark.parametrize("case", BLOCK_FAULTS)
def test_bad_blocks_are_refused(
    services: Services, refused: Refused, vectors: str, case: str
) -> None:
    block, reason, field = BLOCK_FAULTS[case]
    request = pb.PutVectorsRequest(collection=vectors, ids=["a"], vectors=block)
    refused(services.embedder.PutVectors, request, INVALID, reason, field)
    assert ids_of(services, vectors) == []


def test_a_message_of_nearly_64_mib_is_taken_and_given(services: Services, unique: str) -> None:
    create = pb.CreateCollectionRequest(name=unique, vector=pb.VectorCollection(cols=4_096))
    services.embedder.CreateCollection(create)
    rows = np.zeros((4_000, 4_096), np.float32)
    rows[:, 7] = np.arange(4_000)
    ids = [f"{number}" for number in range(4_000)]
    request = pb.PutVectorsRequest(collection=unique, ids=ids, vectors=to_block(rows))
    assert 62 * 2**20 < request.ByteSize() < 64 * 2**20
    assert services.embedder.PutVectors(request, timeout=60).written == 4_000
    found = from_block(get(services, unique, *ids).vectors)
    np.testing.assert_array_equal(found[:, 7], rows[:, 7])
    services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=unique), timeout=60)


# --- derived collections --------------------------------------------------------------------------


def test_a_derived_collection_follows_its_source(
    services: Services, texts: str, halves: str
) -> None:
    upsert(services, texts, pb.Item(id="a", text="green tea"), pb.Item(id="b", text="black tea"))
    expected = vector(services, texts, "a")[:4] / 2
    np.testing.assert_allclose(vector(services, halves, "a"), expected, atol=1e-6)
    upsert(services, texts, pb.Item(id="a", text="a blue car", attributes={"wheels": "4"}))
    expected = vector(services, texts, "a")[:4] / 2
    np.testing.assert_allclose(vector(services, halves, "a"), expected, atol=1e-6)
    assert get(services, halves, "a").items[0].attributes == {"wheels": "4"}
    services.embedder.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["a"]))
    assert list(get(services, halves, "a", "b").missing_ids) == ["a"]
    assert ids_of(services, halves) == ["b"]


def test_a_residual_is_added_and_stays_when_the_text_changes(
    services: Services, failed: Failed, texts: str, halves: str
) -> None:
    upsert(services, texts, pb.Item(id="a", text="green tea"), pb.Item(id="b", text="black tea"))
    answer = put(services, halves, {"a": [1, 2, 3, 4], "nobody": [0, 0, 0, 0]})
    assert answer.written == 1
    assert failed(answer.failures) == {1: ("NOT_FOUND", "NO_ITEM", "ids[1]")}
    for text in ("green tea", "a blue car"):
        upsert(services, texts, pb.Item(id="a", text=text))
        expected = vector(services, texts, "a")[:4] / 2 + [1, 2, 3, 4]
        np.testing.assert_allclose(vector(services, halves, "a"), expected, atol=1e-5)
    put(services, halves, {"a": [0, 0, 0, 1]})
    expected = vector(services, texts, "a")[:4] / 2 + [0, 0, 0, 1]
    np.testing.assert_allclose(vector(services, halves, "a"), expected, atol=1e-5)


def test_a_deleted_items_residual_is_gone(services: Services, texts: str, halves: str) -> None:
    upsert(services, texts, pb.Item(id="a", text="green tea"))
    put(services, halves, {"a": [1, 2, 3, 4]})
    services.embedder.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["a"]))
    upsert(services, texts, pb.Item(id="a", text="green tea"))
    expected = vector(services, texts, "a")[:4] / 2
    np.testing.assert_allclose(vector(services, halves, "a"), expected, atol=1e-6)


def test_activations_bias_and_normalisation(services: Services, texts: str) -> None:
    first = pb.AffineLayer(
        weight=to_block(np.eye(3, COLS)),
        bias=to_block(np.array([[1.0, -1.0, 0.5]])),
        activation=pb.ACTIVATION_RELU,
    )
    second = pb.AffineLayer(weight=to_block(np.eye(3) * 2), activation=pb.ACTIVATION_TANH)
    derived = pb.DerivedCollection(source=texts, layers=[first, second], normalize=True)
    name = f"{texts}.deep"
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=name, derived=derived))
    upsert(services, texts, pb.Item(id="a", text="green tea"))
    source = vector(services, texts, "a")[:3]
    expected = np.tanh(2 * np.maximum(source + np.array([1.0, -1.0, 0.5]), 0))
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(vector(services, name, "a"), expected, atol=1e-5)


# --- rows of terms --------------------------------------------------------------------------------

TITLES = {
    "a": "Rose hand cream, 50 ml",
    "b": "Rose face cream",
    "c": "Blue sports car",
    "d": "ROSE Straße café",
    "e": "",
}


def with_terms(normalize: bool = False) -> Projection:
    """What a trainer makes: a vocabulary of the titles, its idf, and a row for each term."""
    rng = np.random.default_rng(5)
    terms, idf = fit_vocabulary(TITLES.values(), 1)
    rows = rng.standard_normal((len(terms), 4)).astype(np.float32)
    weight = rng.standard_normal((4, COLS)).astype(np.float32)
    bias = rng.standard_normal(4).astype(np.float32)
    return Projection((AffineLayer(weight, bias),), normalize, TermRows(terms, idf, rows))


@pytest.fixture(params=[False, True], ids=["plain", "normalized"])
def projection(request: pytest.FixtureRequest) -> Projection:
    return with_terms(request.param)


def create_derived(services: Services, source: str, projection: Projection) -> str:
    name = f"{source}.terms"
    derived = projection.to_derived(source)
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=name, derived=derived))
    return name


def expected(
    services: Services, projection: Projection, texts: Sequence[str], residuals: Vectors | None
) -> Vectors:
    """The vectors as the trainer computes them, from the service's text vectors."""
    found = services.embedder.Embed(pb.EmbedRequest(texts=[text or "-" for text in texts]))
    vectors = from_block(found.vectors).copy()
    vectors[[not text for text in texts]] = 0
    return projection.apply(vectors, texts, residuals)


@pytest.mark.parametrize("first", ["items", "collection"])
def test_terms_give_what_the_trainer_computes(
    services: Services, texts: str, projection: Projection, first: str
) -> None:
    """Whether the items or the derived collection were there first."""
    items = [pb.Item(id=id, text=title) for id, title in TITLES.items()]
    if first == "items":
        upsert(services, texts, *items)
    name = create_derived(services, texts, projection)
    if first == "collection":
        upsert(services, texts, *items)
    found = from_block(get(services, name, *TITLES).vectors)
    wanted = expected(services, projection, list(TITLES.values()), None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    titles = [title for title in TITLES.values() if title]
    embedded = services.embedder.Embed(pb.EmbedRequest(texts=titles, collection=name))
    np.testing.assert_allclose(from_block(embedded.vectors), wanted[:4], atol=1e-5)
    queries = pb.TextQueries(texts=titles)
    hits = services.embedder.Search(pb.SearchRequest(collection=name, texts=queries, k=5)).results
    for query, hit in zip(wanted, hits, strict=False):
        scores = dict(zip(hit.ids, np.frombuffer(hit.scores, "<f4"), strict=True))
        for id, row in zip(TITLES, wanted, strict=True):
            assert scores[id] == pytest.approx(float(query @ row), abs=1e-3)


def test_a_changed_text_has_its_own_terms_and_keeps_its_residual(
    services: Services, texts: str, projection: Projection
) -> None:
    upsert(services, texts, pb.Item(id="a", text=TITLES["a"]))
    name = create_derived(services, texts, projection)
    residual = np.array([1, 2, 3, 4], np.float32)
    put(services, name, {"a": residual})
    for title in TITLES.values():
        upsert(services, texts, pb.Item(id="a", text=title))
        wanted = expected(services, projection, [title], residual[None])[0]
        np.testing.assert_allclose(vector(services, name, "a"), wanted, atol=1e-5)
    services.embedder.DeleteItems(pb.DeleteItemsRequest(collection=texts, ids=["a"]))
    assert get(services, name, "a").missing_ids == ["a"]
    upsert(services, texts, pb.Item(id="a", text=TITLES["b"]))
    wanted = expected(services, projection, [TITLES["b"]], None)[0]
    np.testing.assert_allclose(vector(services, name, "a"), wanted, atol=1e-5)


def test_long_texts_have_their_terms_too(services: Services, texts: str) -> None:
    projection = with_terms()
    name = create_derived(services, texts, projection)
    long = [f"{word} rose cream " * 1_000 for word in ("hand", "face", "blue")]
    embedded = services.embedder.Embed(pb.EmbedRequest(texts=long, collection=name))
    wanted = expected(services, projection, long, None)
    np.testing.assert_allclose(from_block(embedded.vectors), wanted, atol=1e-5)


def test_terms_reach_those_who_watch(services: Services, texts: str) -> None:
    projection = with_terms()
    upsert(services, texts, pb.Item(id="a", text=TITLES["a"]))
    name = create_derived(services, texts, projection)
    put(services, name, {"a": [0, 0, 0, 1]})
    stream = services.embedder.WatchItems(pb.WatchItemsRequest(collection=name), timeout=60)
    wanted = {"a": expected(services, projection, [TITLES["a"]], np.eye(4, dtype="f4")[3:])[0]}
    changes = next(stream)
    np.testing.assert_allclose(from_block(changes.vectors), [wanted["a"]], atol=1e-5)
    upsert(services, texts, pb.Item(id="b", text=TITLES["b"]))
    changes = next(stream)
    assert list(changes.ids) == ["b"]
    wanted["b"] = expected(services, projection, [TITLES["b"]], None)[0]
    np.testing.assert_allclose(from_block(changes.vectors), [wanted["b"]], atol=1e-5)
    stream.cancel()

"""Collections of the embedder: the contract of the fake and of the real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.vectors import from_block, to_block

if TYPE_CHECKING:
    from tests.contract.conftest import Refused, Services

COLS = 384
INVALID = "INVALID_ARGUMENT"


def create(services: Services, name: str, **kind: Any) -> pb.Collection:
    request = pb.CreateCollectionRequest(name=name, **kind)
    return services.embedder.CreateCollection(request, timeout=60).collection


def listed(services: Services) -> dict[str, pb.Collection]:
    answer = services.embedder.ListCollections(pb.ListCollectionsRequest(), timeout=60)
    assert [each.name for each in answer.collections] == sorted(e.name for e in answer.collections)
    return {each.name: each for each in answer.collections}


def layer(weight: Any, **fields: Any) -> pb.AffineLayer:
    block = to_block(np.asarray(weight, np.float32))
    return pb.AffineLayer(weight=block, **{"activation": pb.ACTIVATION_IDENTITY} | fields)


def derived(source: str, *layers: pb.AffineLayer, **fields: Any) -> pb.DerivedCollection:
    """A derived collection of 4 dimensions, unless layers are given."""
    chosen = layers or (layer(np.eye(4, COLS)),)
    return pb.DerivedCollection(source=source, layers=chosen, **fields)


def test_the_built_in_collections_are_there(services: Services) -> None:
    found = listed(services)
    for name in ("items", "behaviors"):
        assert (found[name].kind, found[name].cols) == (pb.COLLECTION_KIND_TEXT, COLS)


def test_a_new_collection_of_each_kind(services: Services, unique: str) -> None:
    text = create(services, unique, text=pb.TextCollection())
    vector = create(services, f"{unique}.v", vector=pb.VectorCollection(cols=3))
    projected = create(services, f"{unique}.d", derived=derived(unique))
    assert (text.kind, text.cols, text.source) == (pb.COLLECTION_KIND_TEXT, COLS, "")
    assert (vector.kind, vector.cols, vector.source) == (pb.COLLECTION_KIND_VECTOR, 3, "")
    assert projected.kind == pb.COLLECTION_KIND_DERIVED
    assert (projected.cols, projected.source) == (4, unique)
    found = listed(services)
    for each in (text, vector, projected):
        assert found[each.name].items == 0
        assert found[each.name].kind == each.kind
        assert found[each.name].index


def test_a_derived_collection_has_its_sources_items_at_once(
    services: Services, unique: str
) -> None:
    create(services, unique, text=pb.TextCollection())
    items = [pb.Item(id="a", text="tea"), pb.Item(id="b")]
    services.embedder.UpsertItems(pb.UpsertItemsRequest(collection=unique, items=items))
    made = create(services, f"{unique}.d", derived=derived(unique))
    assert made.items == 2
    request = pb.GetItemsRequest(collection=f"{unique}.d", ids=["a", "b"], include_vectors=True)
    answer = services.embedder.GetItems(request)
    assert [item.text for item in answer.items] == ["tea", ""]
    source = services.embedder.GetItems(
        pb.GetItemsRequest(collection=unique, ids=["a", "b"], include_vectors=True)
    )
    expected = from_block(source.vectors)[:, :4]
    np.testing.assert_allclose(from_block(answer.vectors), expected, atol=1e-6)


def test_a_taken_name_is_refused(services: Services, refused: Refused, unique: str) -> None:
    call = services.embedder.CreateCollection
    create(services, unique, text=pb.TextCollection())
    for name in (unique, "items", "behaviors"):
        request = pb.CreateCollectionRequest(name=name, vector=pb.VectorCollection(cols=2))
        refused(call, request, "ALREADY_EXISTS", "COLLECTION_EXISTS", "name")
    assert listed(services)[unique].kind == pb.COLLECTION_KIND_TEXT


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "Upper", ".a", "-a", "_a", "a b", "ü", "a/b", "a\n"]
)
def test_bad_names_are_refused(services: Services, refused: Refused, name: str) -> None:
    request = pb.CreateCollectionRequest(name=name, text=pb.TextCollection())
    refused(services.embedder.CreateCollection, request, INVALID, "BAD_NAME", "name")
    assert name not in listed(services)


def test_the_longest_name_is_taken(services: Services, unique: str) -> None:
    name = (unique + "._-9z" * 13)[:64]
    assert create(services, name, text=pb.TextCollection()).name == name


KIND_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no kind": ({}, "NO_KIND", "kind"),
    "no dimensions": ({"vector": pb.VectorCollection()}, "BAD_COLS", "vector.cols"),
    "dimensions": ({"vector": pb.VectorCollection(cols=4_097)}, "BAD_COLS", "vector.cols"),
    "no layers": (
        {"derived": pb.DerivedCollection(source="items")},
        "BAD_PROJECTION",
        "derived.layers",
    ),
    "nine layers": (
        {"derived": derived("items", layer(np.eye(4, COLS)), *([layer(np.eye(4))] * 8))},
        "BAD_PROJECTION",
        "derived.layers",
    ),
    "source's dimensions": (
        {"derived": derived("items", layer(np.eye(4, COLS + 1)))},
        "BAD_PROJECTION",
        "derived.layers[0].weight",
    ),
    "layers that do not fit": (
        {"derived": derived("items", layer(np.eye(4, COLS)), layer(np.eye(3)))},
        "BAD_PROJECTION",
        "derived.layers[1].weight",
    ),
    "bias": (
        {"derived": derived("items", layer(np.eye(4, COLS), bias=to_block(np.zeros((1, 3)))))},
        "BAD_PROJECTION",
        "derived.layers[0].bias",
    ),
    "nan": (
        {"derived": derived("items", layer(np.full((4, COLS), np.nan)))},
        "BAD_PROJECTION",
        "derived.layers[0].weight",
    ),
    "overflow": (
        {"derived": derived("items", layer(np.full((4, COLS), 1e8)))},
        "BAD_PROJECTION",
        "derived.layers[0].weight",
    ),
    "terms": (
        {"derived": derived("items", terms=pb.TermRows(terms=["tea", "tea"]))},
        "BAD_PROJECTION",
        "derived.terms.terms",
    ),
    "weights of terms": (
        {"derived": derived("items", terms=pb.TermRows(terms=["tea"], idf=to_block([[0.0]])))},
        "BAD_PROJECTION",
        "derived.terms.idf",
    ),
    "rows of terms": (
        {
            "derived": derived(
                "items",
                terms=pb.TermRows(
                    terms=["tea"], idf=to_block([[1.0]]), rows=to_block(np.full((1, 4), np.inf))
                ),
            )
        },
        "BAD_PROJECTION",
        "derived.terms.rows",
    ),
    "activation": (
        {"derived": derived("items", layer(np.eye(4, COLS), activation=pb.ACTIVATION_UNSPECIFIED))},
        "BAD_PROJECTION",
        "derived.layers[0].activation",
    ),
    "bytes": (
        {
            "derived": derived(
                "items",
                pb.AffineLayer(
                    weight=common_pb2.VectorBlock(
                        data=b"123",
                        element_type=common_pb2.ELEMENT_TYPE_FLOAT32,
                        rows=4,
                        cols=COLS,
                    ),
                    activation=pb.ACTIVATION_IDENTITY,
                ),
            )
        },
        "BAD_VECTOR_BLOCK",
        "derived.layers[0].weight.data",
    ),
}


@pytest.mark.parametrize("case", KIND_FAULTS)
def test_bad_kinds_are_refused(
    services: Services, refused: Refused, unique: str, case: str
) -> None:
    kind, reason, field = KIND_FAULTS[case]
    request = pb.CreateCollectionRequest(name=unique, **kind)
    refused(services.embedder.CreateCollection, request, INVALID, reason, field)
    assert unique not in listed(services)


def test_only_text_collections_can_be_derived_from(
    services: Services, refused: Refused, unique: str
) -> None:
    create(services, f"{unique}.v", vector=pb.VectorCollection(cols=COLS))
    create(services, f"{unique}.d", derived=derived("items", layer(np.eye(COLS))))
    call = services.embedder.CreateCollection
    for source in (f"{unique}.v", f"{unique}.d"):
        request = pb.CreateCollectionRequest(name=unique, derived=derived(source))
        refused(call, request, INVALID, "WRONG_KIND", "derived.source")
    request = pb.CreateCollectionRequest(name=unique, derived=derived(f"{unique}.none"))
    refused(call, request, "NOT_FOUND", "NO_COLLECTION", "derived.source")
    assert unique not in listed(services)


def test_a_deleted_collection_is_gone_and_its_name_free(
    services: Services, refused: Refused, unique: str
) -> None:
    create(services, unique, text=pb.TextCollection())
    items = [pb.Item(id="a", text="tea")]
    services.embedder.UpsertItems(pb.UpsertItemsRequest(collection=unique, items=items))
    services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=unique))
    assert unique not in listed(services)
    get = pb.GetItemsRequest(collection=unique, ids=["a"])
    refused(services.embedder.GetItems, get, "NOT_FOUND", "NO_COLLECTION", "collection")
    assert create(services, unique, vector=pb.VectorCollection(cols=2)).items == 0
    assert services.embedder.GetItems(get).missing_ids == ["a"]


def test_what_must_not_be_deleted_is_not(services: Services, refused: Refused, unique: str) -> None:
    create(services, unique, text=pb.TextCollection())
    create(services, f"{unique}.d", derived=derived(unique))
    call, code = services.embedder.DeleteCollection, "FAILED_PRECONDITION"
    for name in ("items", "behaviors"):
        refused(call, pb.DeleteCollectionRequest(name=name), code, "BUILT_IN", "name")
    refused(call, pb.DeleteCollectionRequest(name=unique), code, "HAS_DERIVED", "name")
    none = pb.DeleteCollectionRequest(name=f"{unique}.none")
    refused(call, none, "NOT_FOUND", "NO_COLLECTION", "name")
    assert {"items", "behaviors", unique} <= listed(services).keys()
    services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=f"{unique}.d"))
    services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=unique))


def test_there_are_256_collections_at_most(
    services: Services, refused: Refused, unique: str
) -> None:
    made = [f"{unique}.{number}" for number in range(256 - len(listed(services)))]
    vector = pb.VectorCollection(cols=1)
    try:
        for name in made:
            create(services, name, vector=vector)
        request = pb.CreateCollectionRequest(name=unique, vector=vector)
        call = services.embedder.CreateCollection
        refused(call, request, "RESOURCE_EXHAUSTED", "TOO_MANY_COLLECTIONS")
        assert len(listed(services)) == 256
    finally:
        for name in made:
            services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=name))
    assert create(services, unique, vector=vector).cols == 1


def requests_for(collection: str) -> dict[str, Any]:
    block = to_block(np.ones((1, 4), np.float32))
    return {
        "Embed": pb.EmbedRequest(texts=["a"], collection=collection),
        "UpsertItems": pb.UpsertItemsRequest(collection=collection, items=[pb.Item(id="a")]),
        "PutVectors": pb.PutVectorsRequest(collection=collection, ids=["a"], vectors=block),
        "GetItems": pb.GetItemsRequest(collection=collection, ids=["a"]),
        "ListItems": pb.ListItemsRequest(collection=collection),
        "DeleteItems": pb.DeleteItemsRequest(collection=collection, ids=["a"]),
        "Search": pb.SearchRequest(collection=collection, texts=pb.TextQueries(texts=["a"])),
    }


@pytest.mark.parametrize("method", requests_for(""))
def test_an_unknown_collection_is_not_found(
    services: Services, refused: Refused, unique: str, method: str
) -> None:
    call = getattr(services.embedder, method)
    refused(call, requests_for(unique)[method], "NOT_FOUND", "NO_COLLECTION", "collection")
    assert unique not in listed(services)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("Embed", "vector"),
        ("UpsertItems", "vector"),
        ("UpsertItems", "derived"),
        ("PutVectors", "text"),
        ("DeleteItems", "derived"),
        ("Search", "vector"),
    ],
)
def test_a_collection_of_the_wrong_kind_is_refused(
    services: Services, refused: Refused, unique: str, method: str, kind: str
) -> None:
    create(services, f"{unique}.text", text=pb.TextCollection())
    create(services, f"{unique}.vector", vector=pb.VectorCollection(cols=4))
    create(services, f"{unique}.derived", derived=derived(f"{unique}.text"))
    call = getattr(services.embedder, method)
    request = requests_for(f"{unique}.{kind}")[method]
    refused(call, request, INVALID, "WRONG_KIND", "collection")
    assert listed(services)[f"{unique}.{kind}"].items == 0

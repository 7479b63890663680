"""Search with conditions over attributes: the contract of the fake and of the real embedder."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.testing.conditions import matches
from foretell.vectors import to_block

if TYPE_CHECKING:
    from tests.contract.conftest import Refused, Services

COLS = 384
INVALID = "INVALID_ARGUMENT"

GOODS: dict[str, dict[str, str]] = {
    "tea": {"kind": "drink", "price": "2.50", "brand": "Müller"},
    "juice": {"kind": "drink", "price": "4"},
    "bread": {"kind": "food", "price": "4 EUR", "brand": ""},
    "cake": {"kind": "food", "price": "-1e1", "brand": "Müller"},
    "plain": {},
}
"""Attributes of the items of the collection `goods`."""


def one_of(key: str, *values: str) -> pb.Condition:
    return pb.Condition(one_of=pb.AttributeValues(key=key, values=values))


def within(key: str, **bounds: float) -> pb.Condition:
    return pb.Condition(range=pb.AttributeRange(key=key, **bounds))


def exists(key: str) -> pb.Condition:
    return pb.Condition(exists=key)


def all_of(*parts: pb.Condition) -> pb.Condition:
    return pb.Condition(all_of=pb.Conditions(conditions=parts))


def any_of(*parts: pb.Condition) -> pb.Condition:
    return pb.Condition(any_of=pb.Conditions(conditions=parts))


def none_of(*parts: pb.Condition) -> pb.Condition:
    return pb.Condition(none_of=pb.Conditions(conditions=parts))


def nested(depth: int) -> pb.Condition:
    """A condition of so many levels."""
    condition = exists("a")
    for _ in range(depth - 1):
        condition = none_of(condition)
    return condition


@pytest.fixture
def goods(services: Services, unique: str) -> str:
    """A text collection with GOODS."""
    create = pb.CreateCollectionRequest(name=unique, text=pb.TextCollection())
    services.embedder.CreateCollection(create, timeout=60)
    upsert(services, unique, GOODS)
    return unique


def upsert(services: Services, collection: str, goods: dict[str, dict[str, str]]) -> None:
    items = [pb.Item(id=id, text=id, attributes=each) for id, each in goods.items()]
    services.embedder.UpsertItems(
        pb.UpsertItemsRequest(collection=collection, items=items), timeout=60
    )


def found(
    services: Services, collection: str, *filters: pb.QueryFilter, k: int = 1_000
) -> list[list[str]]:
    """Ids of the hits per filter, sorted."""
    query = to_block(np.ones((len(filters), COLS), np.float32))
    request = pb.SearchRequest(collection=collection, vectors=query, filters=filters, k=k)
    response = services.embedder.Search(request, timeout=60)
    assert not response.failures
    assert not response.missing_ids
    return [sorted(result.ids) for result in response.results]


def only(condition: pb.Condition) -> pb.QueryFilter:
    return pb.QueryFilter(condition=condition)


CONDITIONS: dict[str, tuple[pb.Condition, list[str]]] = {
    "a value": (one_of("kind", "drink"), ["juice", "tea"]),
    "several values": (one_of("price", "4", "4", "2.50", "none"), ["juice", "tea"]),
    "values are compared as text": (one_of("price", "2.5", "-10"), []),
    "not folded": (one_of("brand", "müller", "Mu\u0308ller"), []),
    "an empty value": (one_of("brand", ""), ["bread"]),
    "nobody's value": (one_of("kind", "x' OR '1'='1"), []),
    "nobody's attribute": (one_of("kind' OR 1=1 --", "drink"), []),
    "at least": (within("price", gte=2.5), ["juice", "tea"]),
    "more than": (within("price", gt=2.5), ["juice"]),
    "at most": (within("price", lte=4), ["cake", "juice", "tea"]),
    "less than": (within("price", lt=4), ["cake", "tea"]),
    "between": (within("price", gt=-10, lte=2.5), ["tea"]),
    "one number": (within("price", gte=4, lte=4), ["juice"]),
    "no number": (within("kind", gte=-1e300), []),
    "exists": (exists("brand"), ["bread", "cake", "tea"]),
    "all": (all_of(one_of("kind", "food"), exists("brand"), within("price", lt=0)), ["cake"]),
    "any": (any_of(one_of("kind", "food"), within("price", gt=3)), ["bread", "cake", "juice"]),
    "none": (none_of(one_of("kind", "food"), within("price", gt=3)), ["plain", "tea"]),
    "not not": (none_of(none_of(exists("kind"))), ["bread", "cake", "juice", "tea"]),
    "none that exists": (none_of(exists("kind")), ["plain"]),
    "16 deep": (nested(16), sorted(GOODS)),
    "64 leaves": (
        any_of(*[one_of("kind", f"{n}") for n in range(63)], exists("price")),
        ["bread", "cake", "juice", "tea"],
    ),
    "10,000 values": (one_of("kind", *[f"{n}" for n in range(9_999)], "food"), ["bread", "cake"]),
    "the longest value": (one_of("kind", "x" * 1_024), []),
}


@pytest.mark.parametrize("case", CONDITIONS)
def test_a_condition_gives_what_matches(services: Services, goods: str, case: str) -> None:
    condition, expected = CONDITIONS[case]
    assert found(services, goods, only(condition)) == [expected]


def test_every_query_has_its_condition(services: Services, goods: str) -> None:
    drinks, food = one_of("kind", "drink"), one_of("kind", "food")
    filters = [only(drinks), only(food), pb.QueryFilter(), only(drinks)]
    expected = [["juice", "tea"], ["bread", "cake"], sorted(GOODS), ["juice", "tea"]]
    assert found(services, goods, *filters) == expected


def test_a_condition_goes_with_allowed_and_denied_ids(services: Services, goods: str) -> None:
    drinks = one_of("kind", "drink")
    filters = [
        pb.QueryFilter(allow_ids=["tea", "bread"], condition=drinks),
        pb.QueryFilter(deny_ids=["tea", "bread"], condition=drinks),
        pb.QueryFilter(allow_ids=["tea", "juice"], deny_ids=["juice"], condition=drinks),
        pb.QueryFilter(allow_ids=["bread"], condition=drinks),
    ]
    assert found(services, goods, *filters) == [["tea"], ["juice"], ["tea"], []]


def test_only_ids_of_the_caller_are_missing(services: Services, goods: str) -> None:
    query = to_block(np.ones((1, COLS), np.float32))
    one = pb.QueryFilter(allow_ids=["tea", "nobody"], condition=one_of("kind", "drink"))
    request = pb.SearchRequest(collection=goods, vectors=query, filters=[one])
    response = services.embedder.Search(request, timeout=60)
    assert (list(response.results[0].ids), list(response.missing_ids)) == (["tea"], ["nobody"])


def test_k_come_back_where_k_match(services: Services, unique: str) -> None:
    create = pb.CreateCollectionRequest(name=unique, text=pb.TextCollection())
    services.embedder.CreateCollection(create, timeout=60)
    upsert(services, unique, {f"i{n}": {"n": f"{n}", "odd": f"{n % 2}"} for n in range(300)})
    condition = all_of(one_of("odd", "1"), within("n", gte=100, lt=200))
    for k in (1, 7, 49, 50, 51):
        (ids,) = found(services, unique, only(condition), k=k)
        assert len(ids) == min(k, 50)
        assert all(100 <= int(id[1:]) < 200 and int(id[1:]) % 2 for id in ids)


def test_writes_change_answers_at_once(services: Services, goods: str) -> None:
    drinks, cheap = only(one_of("kind", "drink")), only(within("price", lt=3))
    assert found(services, goods, drinks, cheap) == [["juice", "tea"], ["cake", "tea"]]
    # Of the attributes alone, the text stays.
    upsert(services, goods, {"tea": {"kind": "herb", "price": "9"}, "plain": {"kind": "drink"}})
    assert found(services, goods, drinks, cheap) == [["juice", "plain"], ["cake"]]
    upsert(services, goods, {"new": {"kind": "drink", "price": "1"}})
    assert found(services, goods, drinks, cheap) == [["juice", "new", "plain"], ["cake", "new"]]
    deletion = pb.DeleteItemsRequest(collection=goods, ids=["new", "cake"])
    services.embedder.DeleteItems(deletion, timeout=60)
    assert found(services, goods, drinks, cheap) == [["juice", "plain"], []]
    upsert(services, goods, {"new": {}})
    assert found(services, goods, drinks, only(none_of(exists("kind")))) == [
        ["juice", "plain"],
        ["new"],
    ]


def test_derived_collections_have_their_sources_attributes(services: Services, goods: str) -> None:
    layer = pb.AffineLayer(weight=to_block(np.eye(COLS)), activation=pb.ACTIVATION_IDENTITY)
    derived = pb.DerivedCollection(source=goods, layers=[layer])
    name = f"{goods}.derived"
    services.embedder.CreateCollection(pb.CreateCollectionRequest(name=name, derived=derived))
    drinks = only(one_of("kind", "drink"))
    assert found(services, name, drinks) == [["juice", "tea"]]
    upsert(services, goods, {"tea": {}, "cake": {"kind": "drink"}})
    assert found(services, name, drinks) == [["cake", "juice"]]


def test_collections_share_no_attributes(services: Services, goods: str) -> None:
    name = f"{goods}.other"
    services.embedder.CreateCollection(
        pb.CreateCollectionRequest(name=name, text=pb.TextCollection())
    )
    upsert(services, name, {"tea": {"kind": "drink"}})
    assert found(services, name, only(one_of("kind", "drink"))) == [["tea"]]
    services.embedder.DeleteCollection(pb.DeleteCollectionRequest(name=name))
    assert found(services, goods, only(one_of("kind", "drink"))) == [["juice", "tea"]]


def test_random_conditions_answer_as_their_definition(services: Services, unique: str) -> None:
    rng = random.Random(9)
    create = pb.CreateCollectionRequest(name=unique, text=pb.TextCollection())
    services.embedder.CreateCollection(create, timeout=60)
    values = ["a", "b", "0", "1", "-2.5", "1e2", ""]
    goods = {
        f"{n}": {key: rng.choice(values) for key in "xyz" if rng.random() < 0.7} for n in range(60)
    }
    upsert(services, unique, goods)

    def condition(depth: int) -> pb.Condition:
        if depth and rng.random() < 0.7:
            parts = [condition(depth - 1) for _ in range(rng.randint(1, 3))]
            return rng.choice((all_of, any_of, none_of))(*parts)
        key = rng.choice("xyzw")
        leaf = (
            one_of(key, *rng.choices(values, k=2)),
            exists(key),
            within(key, **{rng.choice(("gt", "gte", "lt", "lte")): rng.choice((-2.5, 0, 1, 50))}),
        )
        return rng.choice(leaf)

    for _ in range(20):
        conditions = [condition(4) for _ in range(8)]
        expected = [
            sorted(id for id, each in goods.items() if matches(one, each)) for one in conditions
        ]
        assert found(services, unique, *map(only, conditions)) == expected


NAN, INF = float("nan"), float("inf")
PATH = "filters[0].condition"

FAULTS: dict[str, tuple[pb.Condition, str, str]] = {
    "no kind": (pb.Condition(), "NO_KIND", PATH),
    "no kind inside": (
        all_of(exists("a"), pb.Condition()),
        "NO_KIND",
        f"{PATH}.all_of.conditions[1]",
    ),
    "empty all_of": (all_of(), "EMPTY", f"{PATH}.all_of.conditions"),
    "empty any_of": (any_of(), "EMPTY", f"{PATH}.any_of.conditions"),
    "empty none_of": (none_of(), "EMPTY", f"{PATH}.none_of.conditions"),
    "17 deep": (nested(17), "TOO_DEEP", PATH + ".none_of.conditions[0]" * 16),
    "65 leaves": (any_of(*[exists("a")] * 65), "TOO_MANY", f"{PATH}.any_of.conditions[64]"),
    "no key": (one_of("", "a"), "EMPTY_ID", f"{PATH}.one_of.key"),
    "no key of a range": (within("", gt=1), "EMPTY_ID", f"{PATH}.range.key"),
    "no key to exist": (exists(""), "EMPTY_ID", f"{PATH}.exists"),
    "long key": (exists("k" * 65), "TOO_LONG", f"{PATH}.exists"),
    "key with controls": (exists("a\n"), "CONTROL_CHARACTERS", f"{PATH}.exists"),
    "no values": (one_of("a"), "EMPTY", f"{PATH}.one_of.values"),
    "long value": (one_of("a", "b", "x" * 1_025), "TOO_LONG", f"{PATH}.one_of.values[1]"),
    "10,001 values": (
        any_of(one_of("a", *["b"] * 10_000), one_of("a", "b")),
        "TOO_MANY",
        f"{PATH}.any_of.conditions[1].one_of.values",
    ),
    "no bounds": (within("a"), "EMPTY", f"{PATH}.range"),
    "not a number": (within("a", gte=NAN, lte=1), "NOT_FINITE", f"{PATH}.range.gte"),
    "infinite": (within("a", lt=INF), "NOT_FINITE", f"{PATH}.range.lt"),
    "upside down": (within("a", gte=2, lte=1), "BAD_RANGE", f"{PATH}.range"),
    "nothing between": (within("a", gte=2, lt=2), "BAD_RANGE", f"{PATH}.range"),
}


def asking(collection: str, *conditions: pb.Condition) -> pb.SearchRequest:
    query = to_block(np.ones((len(conditions), COLS), np.float32))
    return pb.SearchRequest(
        collection=collection, vectors=query, filters=[only(each) for each in conditions]
    )


@pytest.mark.parametrize("case", FAULTS)
def test_bad_conditions_are_refused(
    services: Services, refused: Refused, goods: str, case: str
) -> None:
    condition, reason, field = FAULTS[case]
    refused(services.embedder.Search, asking(goods, condition), INVALID, reason, field)


def test_a_request_has_16_different_conditions_at_most(
    services: Services, refused: Refused, goods: str
) -> None:
    different = [one_of("kind", f"{n}") for n in range(17)]
    assert found(services, goods, *map(only, different[:16] * 16)) == [[]] * 256
    request = asking(goods, *different)
    refused(services.embedder.Search, request, INVALID, "TOO_MANY", "filters")


def test_conditions_too_deep_for_protobuf_are_malformed(
    services: Services, refused: Refused, goods: str
) -> None:
    data = exists("a").SerializeToString()
    for _ in range(5_000):  # none_of { conditions { ... } }, by hand
        data = _field(6, _field(1, data))
    request = _field(6, _field(3, data))
    with services.channel(services.embedder_address) as channel:
        call: Any = channel.unary_unary("/foretell.embedder.v1.EmbedderService/Search")
        refused(call, request, INVALID, "MALFORMED_MESSAGE")


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a message."""
    size, length = bytearray(), len(data)
    while length >= 128:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + data


def test_vector_collections_have_no_attributes(
    services: Services, refused: Refused, unique: str
) -> None:
    create = pb.CreateCollectionRequest(name=unique, vector=pb.VectorCollection(cols=COLS))
    services.embedder.CreateCollection(create, timeout=60)
    request = asking(unique, exists("a"))
    refused(services.embedder.Search, request, INVALID, "WRONG_KIND", PATH)

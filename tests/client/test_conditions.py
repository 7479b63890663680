"""How conditions are written in Python, and what they become."""

import pytest

import foretell
from foretell import _convert, limits
from foretell.conditions import AllOf, AnyOf, NoneOf, OneOf, Range
from foretell.embedder.v1 import embedder_service_pb2 as epb
from foretell.texts import number_of

kind, price = foretell.attribute("kind"), foretell.attribute("price")

TEA = OneOf("kind", ("tea",))
CHEAP = Range("price", lt=5)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (kind == "tea", TEA),
        (kind != "tea", NoneOf((TEA,))),
        (kind.is_in(["tea", "cup"]), OneOf("kind", ("tea", "cup"))),
        (price < 5, CHEAP),
        (price <= 5, Range("price", lte=5)),
        (price > 5, Range("price", gt=5)),
        (price >= 5, Range("price", gte=5)),
        (price.between(1, 5), Range("price", gte=1, lte=5)),
        ((kind == "tea") & (price < 5), AllOf((TEA, CHEAP))),
        ((kind == "tea") | (price < 5), AnyOf((TEA, CHEAP))),
        (~(kind == "tea"), NoneOf((TEA,))),
        (~(TEA | CHEAP), NoneOf((TEA, CHEAP))),
        (~(TEA & CHEAP), NoneOf((AllOf((TEA, CHEAP)),))),
        ((TEA & CHEAP) & (TEA & TEA), AllOf((TEA, CHEAP, TEA, TEA))),
        (TEA | CHEAP | (TEA & CHEAP), AnyOf((TEA, CHEAP, AllOf((TEA, CHEAP))))),
    ],
)
def test_what_is_written_is_what_is_meant(
    written: foretell.Condition, meant: foretell.Condition
) -> None:
    assert written == meant


def test_conditions_become_messages() -> None:
    where = (kind.exists() | price.between(0, 5)) & ~(kind == "tea") & (price > -1)
    (message,) = _convert.filters_to_proto((), where)
    exists = epb.Condition(exists="kind")
    between = epb.Condition(range=epb.AttributeRange(key="price", gte=0, lte=5))
    tea = epb.Condition(one_of=epb.AttributeValues(key="kind", values=["tea"]))
    more = epb.Condition(range=epb.AttributeRange(key="price", gt=-1))
    expected = epb.Conditions(
        conditions=[
            epb.Condition(any_of=epb.Conditions(conditions=[exists, between])),
            epb.Condition(none_of=epb.Conditions(conditions=[tea])),
            more,
        ]
    )
    assert message == epb.QueryFilter(condition=epb.Condition(all_of=expected))


def test_a_search_s_condition_goes_with_those_of_its_filters() -> None:
    filters = [foretell.Filter(allow_ids=["i"]), foretell.Filter(where=price < 5)]
    own, both = _convert.filters_to_proto(filters, kind == "tea")
    assert list(own.allow_ids) == ["i"]
    assert own.condition.one_of.key == "kind"
    assert [part.WhichOneof("kind") for part in both.condition.all_of.conditions] == [
        "one_of",
        "range",
    ]
    assert _convert.filters_to_proto(filters, None)[1].condition.range.lt == 5


def test_long_chains_are_not_deep() -> None:
    some = kind == "0"
    for number in range(1, limits.CONDITION_LEAVES):
        some |= kind == str(number)
    assert isinstance(some, AnyOf)
    assert len(some.conditions) == limits.CONDITION_LEAVES


def test_conditions_too_deep_to_be_sent_are_refused() -> None:
    condition = kind == "tea"
    for _ in range(100_000):
        condition = ~condition
    with pytest.raises(foretell.InvalidArgumentError) as raised:
        _convert.filters_to_proto((), condition)
    assert (raised.value.reason, raised.value.field) == ("TOO_DEEP", "where")


def test_python_s_own_logic_is_refused() -> None:
    for mistake in (
        lambda: 1 < price < 5,
        lambda: kind == "tea" and price < 5,
        lambda: not kind.exists(),
        lambda: bool(TEA),
    ):
        with pytest.raises(TypeError, match=r"combine conditions with &, \| and ~"):
            mistake()
    with pytest.raises(TypeError, match="unhashable"):
        {kind}  # noqa: B018
    with pytest.raises(foretell.InvalidArgumentError, match="one string"):
        kind.is_in("tea")
    with pytest.raises(TypeError, match=r"attribute\(\) makes conditions"):
        _convert.filters_to_proto((), "kind = 'tea'")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[("12", 12), ("-0.5", -0.5), ("1e3", 1000), ("+.5E-1", 0.05), ("5.", 5), ("007", 7)],
        *[(text, None) for text in ("", ".", "-", " 12", "12 ", "12\n", "12 OZ", "1,000", "0x10")],
        *[(text, None) for text in ("inf", "nan", "1e400", "1_0", "\u0663", "1e", "--1", "1.2.3")],
    ],
)
def test_what_counts_as_a_number(text: str, number: float | None) -> None:
    assert number_of(text) == number


def test_reading_a_number_takes_linear_time() -> None:
    assert number_of("1" * 100_000 + "x") is None  # minutes, if every split of the digits is tried

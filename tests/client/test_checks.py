"""Checks of requests. What the contract tests send over the wire is not repeated here."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from foretell import checks, limits
from foretell.common.v1 import common_pb2
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.errors import ForetellError, InvalidArgumentError, NotFoundError
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.texts import text_id
from foretell.vectors import to_block

PRINTABLE = st.characters(exclude_categories=["Cc", "Cs"])


def fault(check: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, str]:
    """Reason and field of what a check raises."""
    with pytest.raises(InvalidArgumentError) as caught:
        check(*arguments, **named)
    return caught.value.reason, caught.value.field


@given(st.text(PRINTABLE, min_size=1, max_size=limits.ID_CHARS))
def test_any_printable_text_is_an_id(value: str) -> None:
    checks.identifier(value, "id")


@given(
    st.text(PRINTABLE, max_size=20),
    st.characters(categories=["Cc"]),
    st.text(PRINTABLE, max_size=20),
)
def test_no_id_has_control_characters(before: str, control: str, after: str) -> None:
    value = before + control + after
    assert fault(checks.identifier, value, "id") == ("CONTROL_CHARACTERS", "id")


def test_lengths_are_counted_in_characters_not_bytes() -> None:
    checks.identifier("🙂" * limits.ID_CHARS, "id")
    checks.text("🙂" * limits.TEXT_CHARS, "text")
    assert fault(checks.identifier, "a" * (limits.ID_CHARS + 1), "id") == ("TOO_LONG", "id")
    assert fault(checks.text, "a" * (limits.TEXT_CHARS + 1), "text") == ("TOO_LONG", "text")


@given(st.text(" \t\n\r\u00a0\u3000", max_size=5))
def test_blank_texts_are_empty(value: str) -> None:
    assert fault(checks.text, value, "text") == ("EMPTY_TEXT", "text")
    checks.text(value, "text", may_be_empty=True)


def test_a_limit_is_named_in_the_metadata() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        checks.count(limits.BATCH + 1, "items", limits.BATCH)
    assert caught.value.metadata == {"limit": "10000"}
    assert "10,001" in caught.value.message


def test_split_keeps_the_good_and_reports_the_others() -> None:
    def check(value: int, index: int) -> None:
        if value % 2:
            raise NotFoundError(f"no {value} at {index}", reason="ODD")

    good, failures = checks.split([0, 1, 2, 3], check)
    assert good == [0, 2]
    assert [each.index for each in failures] == [1, 3]
    assert failures[1].status.message == "no 3 at 3"


def test_split_does_not_hide_bugs() -> None:
    def broken(value: int, index: int) -> None:
        raise KeyError(value)

    with pytest.raises(KeyError):
        checks.split([1], broken)


@pytest.mark.parametrize(
    ("given_size", "stands"),
    [(0, limits.PAGE_DEFAULT), (1, 1), (limits.PAGE, limits.PAGE), (limits.PAGE + 1, limits.PAGE)],
)
def test_page_sizes(given_size: int, stands: int) -> None:
    assert checks.page_size(given_size) == stands


def test_k() -> None:
    assert checks.k(None) == limits.K_DEFAULT
    assert checks.k(None, 5) == 5
    assert checks.k(1) == 1
    assert checks.k(limits.K) == limits.K
    assert fault(checks.k, 0, field="query.k") == ("BAD_K", "query.k")


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True))
def test_names(value: str) -> None:
    checks.name(value, "name")


@pytest.mark.parametrize("value", ["", "-a", "A", "a\n", "a b", "é", "a" * 65])
def test_no_names(value: str) -> None:
    assert fault(checks.name, value, "name") == ("BAD_NAME", "name")


def test_a_behavior_is_named_by_its_text() -> None:
    checks.behavior_item(embedder_pb.Item(text="tea"), 0)
    checks.behavior_item(embedder_pb.Item(id=text_id("tea"), text="tea"), 0)
    other = embedder_pb.Item(id=text_id("coffee"), text="tea")
    assert fault(checks.behavior_item, other, 3) == ("BAD_BEHAVIOR_ID", "items[3].id")


def event(**fields: Any) -> event_pb.Event:
    return event_pb.Event(**{"user_id": "u", "behavior_type": "view", "item_id": "i"} | fields)


def test_an_event_has_an_item_a_text_or_both() -> None:
    for fields in ({}, {"item_id": "", "text": "tea"}, {"text": "tea"}):
        checks.event(event(**fields), "event")
    nothing = event(item_id="")
    assert fault(checks.event, nothing, "event") == ("EMPTY_TEXT", "event.text")


def test_times_reach_from_1970_to_tomorrow() -> None:
    now = int(time.time())
    for seconds in (0, now, now + limits.FUTURE_SECONDS - 10):
        checks.event(event(timestamp=Timestamp(seconds=seconds)), "event")
    for seconds, nanos in ((-1, 0), (now + limits.FUTURE_SECONDS + 10, 0), (0, -1), (0, 10**9)):
        bad = event(timestamp=Timestamp(seconds=seconds, nanos=nanos))
        assert fault(checks.event, bad, "event") == ("BAD_TIMESTAMP", "event.timestamp")


def test_an_inline_event_is_nobodys() -> None:
    checks.event(event(user_id=""), "history[0]", inline=True)
    found = fault(checks.event, event(), "history[0]", inline=True)
    assert found == ("USER_ID_IN_HISTORY", "history[0].user_id")


def test_rows_that_are_not_finite_are_found() -> None:
    rows = np.array([[0, 1], [np.nan, 1], [1, -np.inf]], np.float32)
    good, failures = checks.split(rows, checks.finite_row(rows, "vectors"))
    assert good == [0]
    assert [each.index for each in failures] == [1, 2]


def test_a_block_has_the_collections_dimensions_and_a_row_an_id() -> None:
    assert checks.block(to_block([[1.0, 2.0]]), 2).tolist() == [[1, 2]]
    wrong = to_block([[1.0, 2.0]])
    assert fault(checks.block, wrong, 3) == ("WRONG_COLS", "vectors.cols")
    checks.one_row_each(2, 2)
    assert fault(checks.one_row_each, 1, 2) == ("WRONG_ROWS", "vectors.rows")


def test_element_types() -> None:
    assert checks.element_type(0) == common_pb2.ELEMENT_TYPE_FLOAT32
    assert checks.element_type(1) == common_pb2.ELEMENT_TYPE_FLOAT32
    assert checks.element_type(2) == common_pb2.ELEMENT_TYPE_FLOAT16
    assert fault(checks.element_type, 3) == ("BAD_ELEMENT_TYPE", "element_type")


@pytest.mark.parametrize(("filters", "queries"), [(0, 5), (1, 5), (5, 5), (1, 1)])
def test_numbers_of_filters(filters: int, queries: int) -> None:
    checks.filters([embedder_pb.QueryFilter()] * filters, queries)


def test_errors_that_services_and_fake_share() -> None:
    shared: list[tuple[ForetellError, str]] = [
        (checks.no_collection("x", "name"), "NO_COLLECTION"),
        (checks.no_item("x", "ids[0]"), "NO_ITEM"),
        (checks.wrong_kind("x", "a text collection"), "WRONG_KIND"),
        (checks.request_id_reused("x"), "REQUEST_ID_REUSED"),
        (checks.bad_page_token(), "BAD_PAGE_TOKEN"),
        (checks.too_many_types(), "TOO_MANY_BEHAVIOR_TYPES"),
    ]
    for error, reason in shared:
        assert error.reason == reason
        assert error.message

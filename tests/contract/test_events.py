"""EventService: the contract of the fake and of the real one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from foretell import limits
from foretell.predictor.v1 import event_service_pb2 as pb

if TYPE_CHECKING:
    from tests.contract.conftest import Failed, Refused, Services


def event(user_id: str, **fields: Any) -> pb.Event:
    return pb.Event(**{"user_id": user_id, "behavior_type": "view", "item_id": "i1"} | fields)


def ingest(services: Services, *events: pb.Event) -> pb.IngestEventsResponse:
    return services.events.IngestEvents(pb.IngestEventsRequest(events=events), timeout=60)


def listed(services: Services, user_id: str, size: int = 1_000) -> list[pb.Event]:
    request = pb.ListEventsRequest(user_id=user_id, page_size=size)
    return list(services.events.ListEvents(request, timeout=60).events)


def test_an_event_is_listed_as_it_was_ingested(services: Services, unique: str) -> None:
    whole = event(
        unique,
        text="fine coffee",
        timestamp=Timestamp(seconds=1_700_000_000, nanos=123_456_000),
        event_id=f"{unique}-e",
        attributes={"store": "12"},
    )
    answer = ingest(services, whole)
    assert (answer.accepted, answer.duplicates, len(answer.failures)) == (1, 0, 0)
    assert listed(services, unique) == [whole]


def test_time_is_kept_in_microseconds(services: Services, unique: str) -> None:
    ingest(services, event(unique, timestamp=Timestamp(seconds=0, nanos=999_999_999)))
    assert listed(services, unique)[0].timestamp == Timestamp(seconds=0, nanos=999_999_000)


def test_without_a_timestamp_the_clock_stands_and_order_is_kept(
    services: Services, unique: str
) -> None:
    before = time.time()
    ingest(services, *(event(unique, item_id=f"i{number}") for number in range(50)))
    found = listed(services, unique)
    assert [each.item_id for each in found] == [f"i{number}" for number in reversed(range(50))]
    times = [each.timestamp.ToMicroseconds() for each in found]
    assert len(set(times)) == 50  # they are no basket
    assert before - 1 <= times[0] / 1e6 <= time.time() + 1


def test_the_newest_event_is_first_whatever_came_first(services: Services, unique: str) -> None:
    for seconds in (300, 100, 200):
        ingest(services, event(unique, timestamp=Timestamp(seconds=seconds)))
    assert [each.timestamp.seconds for each in listed(services, unique)] == [300, 200, 100]


def test_a_basket_keeps_its_order(services: Services, unique: str) -> None:
    basket = Timestamp(seconds=1_000)
    ingest(services, *(event(unique, item_id=f"i{n}", timestamp=basket) for n in range(5)))
    ingest(services, event(unique, item_id="later", timestamp=basket))
    assert [each.item_id for each in listed(services, unique)] == [
        "later", "i4", "i3", "i2", "i1", "i0",
    ]  # fmt: skip


def test_a_second_event_with_the_same_id_is_ignored_and_counted(
    services: Services, unique: str
) -> None:
    first = event(unique, event_id=f"{unique}-a", item_id="first")
    second = event(unique, event_id=f"{unique}-a", item_id="second")
    answer = ingest(services, first, second, event(unique, event_id=f"{unique}-b"))
    assert (answer.accepted, answer.duplicates) == (2, 1)
    answer = ingest(services, second)
    assert (answer.accepted, answer.duplicates) == (0, 1)
    assert {each.item_id for each in listed(services, unique)} == {"first", "i1"}


FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"user_id": ""}, "EMPTY_ID", "user_id"),
    ({"user_id": "u" * 129}, "TOO_LONG", "user_id"),
    ({"user_id": "a\x00b"}, "CONTROL_CHARACTERS", "user_id"),
    ({"behavior_type": ""}, "EMPTY_ID", "behavior_type"),
    ({"behavior_type": "t" * 65}, "TOO_LONG", "behavior_type"),
    ({"behavior_type": "a\tb"}, "CONTROL_CHARACTERS", "behavior_type"),
    ({"item_id": "i" * 129}, "TOO_LONG", "item_id"),
    ({"item_id": "", "text": ""}, "EMPTY_TEXT", "text"),
    ({"item_id": "", "text": " \n "}, "EMPTY_TEXT", "text"),
    ({"text": "x" * 20_001}, "TOO_LONG", "text"),
    ({"event_id": "e" * 129}, "TOO_LONG", "event_id"),
    ({"timestamp": Timestamp(seconds=-1)}, "BAD_TIMESTAMP", "timestamp"),
    ({"timestamp": Timestamp(seconds=1, nanos=1_000_000_000)}, "BAD_TIMESTAMP", "timestamp"),
    ({"timestamp": Timestamp(seconds=4_000_000_000)}, "BAD_TIMESTAMP", "timestamp"),
    ({"timestamp": Timestamp(seconds=2**62)}, "BAD_TIMESTAMP", "timestamp"),
    ({"attributes": {f"k{n}": "v" for n in range(65)}}, "TOO_MANY", "attributes"),
    ({"attributes": {"k" * 65: "v"}}, "TOO_LONG", f"attributes[{'k' * 64}]"),
    ({"attributes": {"": "v"}}, "EMPTY_ID", "attributes[]"),
    ({"attributes": {"k": "v" * 1_025}}, "TOO_LONG", "attributes[k]"),
]


def test_faulty_events_are_named_and_the_others_stored(
    services: Services, failed: Failed, unique: str
) -> None:
    faulty = [event(**({"user_id": unique} | fields)) for fields, _, _ in FAULTS]
    good = event(unique, item_id="good")
    events = [each for one in faulty for each in (one, good)]
    answer = ingest(services, *events)
    assert failed(answer.failures) == {
        2 * at: ("INVALID_ARGUMENT", reason, f"events[{2 * at}].{field}")
        for at, (_, reason, field) in enumerate(FAULTS)
    }
    assert answer.accepted == len(faulty)
    assert [each.item_id for each in listed(services, unique)] == ["good"] * len(faulty)


def test_what_is_just_within_the_limits_is_stored(services: Services, unique: str) -> None:
    user = unique.ljust(128, "u")
    tomorrow = int(time.time()) + limits.FUTURE_SECONDS - 60
    widest = pb.Event(
        user_id=user,
        behavior_type="wide".ljust(64, "t"),
        timestamp=Timestamp(seconds=tomorrow),
        item_id="ü" * 128,
        text="字" * 20_000,
        event_id=unique.ljust(128, "e"),
        attributes={f"{number:064}": "v" * 1_024 for number in range(64)},
    )
    earliest = event(user, timestamp=Timestamp())
    assert ingest(services, widest, earliest).accepted == 2
    assert listed(services, user) == [widest, earliest]


@pytest.mark.parametrize(("number", "reason"), [(0, "EMPTY"), (10_001, "TOO_MANY")])
def test_a_batch_of_the_wrong_size_stores_nothing(
    services: Services, refused: Refused, unique: str, number: int, reason: str
) -> None:
    request = pb.IngestEventsRequest(events=[event(unique)] * number)
    refused(services.events.IngestEvents, request, "INVALID_ARGUMENT", reason, "events")
    assert listed(services, unique) == []


def test_the_largest_batch_is_stored(services: Services, unique: str) -> None:
    answer = ingest(services, *([event(unique)] * 10_000))
    assert answer.accepted == 10_000
    assert services.events.DeleteUser(pb.DeleteUserRequest(user_id=unique)).deleted_events == 10_000


def test_pages_follow_one_another(services: Services, unique: str) -> None:
    ingest(services, *(event(unique, item_id=f"i{number}") for number in range(7)))
    found: list[str] = []
    token, sizes = "", list[int]()
    while not sizes or token:
        page = services.events.ListEvents(
            pb.ListEventsRequest(user_id=unique, page_size=3, page_token=token)
        )
        found += [each.item_id for each in page.events]
        sizes.append(len(page.events))
        token = page.next_page_token
    assert found == [f"i{number}" for number in reversed(range(7))]
    assert sizes == [3, 3, 1]


def test_the_last_page_may_be_full(services: Services, unique: str) -> None:
    ingest(services, *([event(unique)] * 4))
    page = services.events.ListEvents(pb.ListEventsRequest(user_id=unique, page_size=4))
    assert (len(page.events), page.next_page_token) == (4, "")


def test_page_size_has_a_default_and_a_largest(services: Services, unique: str) -> None:
    ingest(services, *([event(unique)] * 1_001))
    for asked, given in ((0, 100), (2_000, 1_000), (2**31 - 1, 1_000)):
        assert len(listed(services, unique, asked)) == given


@pytest.mark.parametrize("token", ["garbage!", "AAAA", "%%%", "ü", "MTox"])
def test_page_tokens_of_nobodys_are_refused(
    services: Services, refused: Refused, unique: str, token: str
) -> None:
    request = pb.ListEventsRequest(user_id=unique, page_token=token)
    call = services.events.ListEvents
    refused(call, request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN", "page_token")


def test_a_page_token_is_for_its_user_only(
    services: Services, refused: Refused, unique: str
) -> None:
    ingest(services, *([event(unique)] * 3))
    page = services.events.ListEvents(pb.ListEventsRequest(user_id=unique, page_size=1))
    request = pb.ListEventsRequest(user_id=f"{unique}-other", page_token=page.next_page_token)
    call = services.events.ListEvents
    refused(call, request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN", "page_token")


def test_bad_lists_are_refused(services: Services, refused: Refused, unique: str) -> None:
    call = services.events.ListEvents
    code = "INVALID_ARGUMENT"
    negative = pb.ListEventsRequest(user_id=unique, page_size=-1)
    refused(call, negative, code, "BAD_PAGE", "page_size")
    refused(call, pb.ListEventsRequest(), code, "EMPTY_ID", "user_id")
    refused(call, pb.ListEventsRequest(user_id="u" * 129), code, "TOO_LONG", "user_id")


def test_an_unknown_user_has_no_events(services: Services, unique: str) -> None:
    assert listed(services, unique) == []


def test_a_deleted_user_is_gone_and_may_come_back(services: Services, unique: str) -> None:
    mine = event(unique, event_id=f"{unique}-e")
    ingest(services, mine, event(unique), event(f"{unique}-other"))
    answer = services.events.DeleteUser(pb.DeleteUserRequest(user_id=unique))
    assert answer.deleted_events == 2
    assert answer.deletion_id
    assert listed(services, unique) == []
    assert len(listed(services, f"{unique}-other")) == 1
    assert ingest(services, mine).accepted == 1  # its event_id is free again


def test_deleting_an_unknown_user_deletes_nothing(services: Services, unique: str) -> None:
    answer = services.events.DeleteUser(pb.DeleteUserRequest(user_id=unique))
    assert (answer.deleted_events, bool(answer.deletion_id)) == (0, True)


def test_bad_users_are_not_deleted(services: Services, refused: Refused) -> None:
    call, code = services.events.DeleteUser, "INVALID_ARGUMENT"
    refused(call, pb.DeleteUserRequest(), code, "EMPTY_ID", "user_id")
    refused(call, pb.DeleteUserRequest(user_id="u" * 129), code, "TOO_LONG", "user_id")


def test_a_thousand_behavior_types_are_enough(
    services: Services, failed: Failed, unique: str
) -> None:
    user = f"{unique}-types"
    answer = ingest(services, *(event(user, behavior_type=f"{unique}-{n}") for n in range(1_001)))
    try:
        faults = failed(answer.failures)
        assert len(faults) > 0
        assert answer.accepted + len(faults) == 1_001
        assert set(faults.values()) == {("FAILED_PRECONDITION", "TOO_MANY_BEHAVIOR_TYPES", "")}
        known = event(user, behavior_type=f"{unique}-0")
        assert ingest(services, known).accepted == 1
    finally:
        services.events.DeleteUser(pb.DeleteUserRequest(user_id=user))
    assert ingest(services, event(user, behavior_type=f"{unique}-after")).accepted == 1

"""The event service over gRPC, without an embedder."""

import asyncio
import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foretell import limits
from foretell.errors import InvalidArgumentError, from_rpc_error, from_status
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from predictor import ingestion
from predictor.database import open_database
from predictor.events import EventStore
from predictor.service import EventService
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from predictor.behaviors import BehaviorTexts
    from tests.predictor.conftest import Stubs

Start = Callable[..., ServiceProcess]
Connect = Callable[[str], "Stubs"]


def event(
    user: str = "u",
    behavior_type: str = "view",
    item_id: str = "i",
    text: str = "",
    event_id: str = "",
) -> event_pb.Event:
    return event_pb.Event(
        user_id=user, behavior_type=behavior_type, item_id=item_id, text=text, event_id=event_id
    )


@pytest.fixture
def predictor(start_predictor: Start, connect: Connect, absent: str) -> "Stubs":
    return connect(start_predictor(absent).address)


def test_events_come_back_newest_first_page_by_page(predictor: "Stubs") -> None:
    sent = [event(item_id=f"i{n}", event_id=str(n), text=f"text {n}") for n in range(7)]
    for n, one in enumerate(sent):
        one.timestamp.FromMicroseconds(1_000_001 * n)
        one.attributes["price"] = str(n)
    done = predictor.events.IngestEvents(event_pb.IngestEventsRequest(events=sent))
    assert (done.accepted, done.duplicates, len(done.failures)) == (7, 0, 0)
    listed: list[event_pb.Event] = []
    token = ""
    while True:
        page = predictor.events.ListEvents(
            event_pb.ListEventsRequest(user_id="u", page_size=3, page_token=token)
        )
        listed += page.events
        token = page.next_page_token
        if not token:
            break
    assert listed == sent[::-1]
    first = predictor.events.ListEvents(event_pb.ListEventsRequest(user_id="u", page_size=1))
    others = event_pb.ListEventsRequest(user_id="v", page_token=first.next_page_token)
    with pytest.raises(grpc.RpcError) as refused:
        predictor.events.ListEvents(others)
    assert from_rpc_error(refused.value).reason == "BAD_PAGE_TOKEN"


def test_one_bad_event_does_not_fail_its_neighbours(predictor: "Stubs") -> None:
    bad = [
        event(user=""),
        event(behavior_type="x" * 65),
        event(item_id="", text=""),
        event(item_id="a\x00b"),
        event(text="x" * (limits.TEXT_CHARS + 1)),
        event_pb.Event(
            user_id="u", behavior_type="v", item_id="i", timestamp=Timestamp(seconds=-1)
        ),
        event_pb.Event(
            user_id="u", behavior_type="v", item_id="i", timestamp=Timestamp(seconds=10**11)
        ),
    ]
    request = event_pb.IngestEventsRequest(events=[event(), *bad, event()])
    done = predictor.events.IngestEvents(request)
    assert done.accepted == 2
    assert [failure.index for failure in done.failures] == [1, 2, 3, 4, 5, 6, 7]
    faults = [from_status(failure.status) for failure in done.failures]
    assert {fault.code for fault in faults} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert [fault.field for fault in faults][:2] == ["events[1].user_id", "events[2].behavior_type"]
    info = predictor.models.GetInfo(model_pb.GetInfoRequest())
    assert (info.events, info.users, info.embedder_available) == (2, 1, False)


def test_a_repeated_request_gives_the_first_answer(predictor: "Stubs") -> None:
    request = event_pb.IngestEventsRequest(events=[event(), event(user="")], request_id="r")
    first = predictor.events.IngestEvents(request)
    assert predictor.events.IngestEvents(request) == first
    assert predictor.models.GetInfo(model_pb.GetInfoRequest()).events == 1
    request.events.append(event())
    with pytest.raises(grpc.RpcError) as refused:
        predictor.events.IngestEvents(request)
    assert from_rpc_error(refused.value).reason == "REQUEST_ID_REUSED"
    delete = event_pb.DeleteUserRequest(user_id="u", request_id="d")
    gone = predictor.events.DeleteUser(delete)
    assert gone.deleted_events == 1
    assert predictor.events.DeleteUser(delete) == gone
    again = predictor.events.DeleteUser(event_pb.DeleteUserRequest(user_id="u"))
    assert again.deleted_events == 0
    assert again.deletion_id != gone.deletion_id


def test_events_of_one_call_without_a_time_are_no_basket(predictor: "Stubs") -> None:
    events = [event(item_id=str(n)) for n in range(50)]
    predictor.events.IngestEvents(event_pb.IngestEventsRequest(events=events))
    listed = predictor.events.ListEvents(event_pb.ListEventsRequest(user_id="u")).events
    assert [one.item_id for one in listed] == [str(n) for n in reversed(range(50))]
    assert len({one.timestamp.ToMicroseconds() for one in listed}) == 50


@pytest.mark.parametrize(
    ("service", "request_", "reason"),
    [
        ("events", event_pb.IngestEventsRequest(), "EMPTY"),
        ("events", event_pb.IngestEventsRequest(events=[event()] * 10_001), "TOO_MANY"),
        ("events", event_pb.ListEventsRequest(user_id="u", page_size=-1), "BAD_PAGE"),
        ("events", event_pb.ListEventsRequest(user_id="u", page_token="?"), "BAD_PAGE_TOKEN"),
        ("events", event_pb.DeleteUserRequest(), "EMPTY_ID"),
        ("predictions", prediction_pb.PredictManyRequest(), "EMPTY"),
        ("predictions", prediction_pb.RankRequest(), "EMPTY"),
        ("models", model_pb.ActivateModelRequest(version="V"), "BAD_NAME"),
        ("models", model_pb.ActivateModelRequest(version="none"), "VERSION_NOT_FOUND"),
        ("models", model_pb.DeleteModelRequest(version="none"), "VERSION_NOT_FOUND"),
        ("models", model_pb.ListModelsRequest(page_token="eA=="), "BAD_PAGE_TOKEN"),
    ],
)
def test_faults_of_a_call_have_a_reason(
    shared_predictor: "Stubs", service: str, request_: object, reason: str
) -> None:
    method = type(request_).__name__.removesuffix("Request")
    with pytest.raises(grpc.RpcError) as refused:
        getattr(getattr(shared_predictor, service), method)(request_)
    assert from_rpc_error(refused.value).reason == reason


def test_without_events_nothing_is_known_and_the_answer_says_so(predictor: "Stubs") -> None:
    query = prediction_pb.PredictionQuery(user_id="nobody")
    answer = predictor.predictions.Predict(prediction_pb.PredictRequest(query=query)).prediction
    assert not answer.behavior_types
    assert not answer.items
    assert answer.fallback_reason == prediction_pb.FALLBACK_REASON_NO_HISTORY
    assert answer.shortfall_reason == prediction_pb.SHORTFALL_REASON_CATALOGUE_EXHAUSTED


def test_sigterm_ends_it_with_status_0_and_health_says_serving_before(
    start_predictor: Start, absent: str
) -> None:
    service = start_predictor(absent)
    with grpc.insecure_channel(service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "EventService", "PredictionService", "ModelService"):
            full = f"foretell.predictor.v1.{name}" if name else ""
            answer = health.Check(health_pb2.HealthCheckRequest(service=full))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert service.stop() == 0


def test_kill_9_loses_no_acknowledged_event(
    start_predictor: Start, connect: Connect, absent: str
) -> None:
    service = start_predictor(absent)
    acknowledged: list[str] = []
    ready = threading.Event()

    def ingest(worker: int) -> None:
        stubs = connect(service.address)
        for n in range(10_000):
            events = [event(user=f"u{worker}", event_id=f"{worker}-{n}-{m}") for m in range(20)]
            try:
                stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=events))
            except grpc.RpcError:
                return
            acknowledged.extend(one.event_id for one in events)
            if len(acknowledged) > 2_000:
                ready.set()

    workers = [threading.Thread(target=ingest, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    assert ready.wait(60)
    service.process.send_signal(signal.SIGKILL)
    for worker in workers:
        worker.join()
    stubs = connect(start_predictor(absent).address)
    stored: set[str] = set()
    for number in range(4):
        token = ""
        while True:
            page = stubs.events.ListEvents(
                event_pb.ListEventsRequest(user_id=f"u{number}", page_size=1_000, page_token=token)
            )
            stored.update(one.event_id for one in page.events)
            token = page.next_page_token
            if not token:
                break
    assert set(acknowledged) <= stored
    # A call whose answer was lost is repeated by its caller: what was stored counts once.
    again = [
        event(user="u0", event_id=name) for name in random.Random(0).sample(sorted(stored), 50)
    ]
    done = stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=again))
    assert (done.accepted, done.duplicates) == (0, 50)


async def test_calls_that_wait_for_a_commit_share_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is told of its own events: of what is wrong, and of what another call has stored."""
    batches: list[int] = []
    store_all = ingestion.ingest

    def counted(connection: sqlite3.Connection, events: Sequence[Any]) -> Any:
        batches.append(len(events))
        return store_all(connection, events)

    monkeypatch.setattr(ingestion, "ingest", counted)
    with contextlib.closing(open_database(tmp_path)) as db:
        service = EventService(EventStore(db), cast("BehaviorTexts", Texts()))
        may_commit = threading.Event()
        db.submit(lambda _: may_commit.wait(60))

        async def ingest(*events: event_pb.Event, request_id: str = "") -> tuple[object, ...]:
            request = event_pb.IngestEventsRequest(events=events, request_id=request_id)
            try:
                done = await service.IngestEvents(request, cast("Any", None))
            except InvalidArgumentError as error:
                return (error.reason,)
            return done.accepted, done.duplicates, [failure.index for failure in done.failures]

        good, bad = event(user="u"), event(user="")
        calls = [
            ingest(bad, good, bad),
            ingest(event(event_id="a"), event(event_id="b")),
            ingest(event(event_id="c"), event(event_id="a"), request_id="once"),
            ingest(event(event_id="b"), event(event_id="d")),
            # The same call again, while its first one waits, and another of its request_id.
            ingest(event(event_id="c"), event(event_id="a"), request_id="once"),
            ingest(event(event_id="e"), request_id="once"),
            ingest(good, request_id="other"),
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0)
        may_commit.set()
        assert await asyncio.gather(*tasks) == [
            (1, 0, [0, 2]),
            (2, 0, []),
            (1, 1, []),
            (1, 1, []),
            (1, 1, []),
            ("REQUEST_ID_REUSED",),
            (1, 0, []),
        ]
        assert batches == [7, 0, 1]
        assert await ingest(good, request_id="other") == (1, 0, [])  # the first answer
        assert EventStore(db).counts().events == 6


async def test_a_deletion_does_not_overtake_events(tmp_path: Path) -> None:
    with contextlib.closing(open_database(tmp_path)) as db:
        service = EventService(EventStore(db), cast("BehaviorTexts", Texts()))
        context = cast("Any", None)
        may_commit = threading.Event()
        db.submit(lambda _: may_commit.wait(60))
        request = event_pb.IngestEventsRequest(events=[event(user="u")])
        ingests = [asyncio.ensure_future(service.IngestEvents(request, context)) for _ in range(2)]
        delete = event_pb.DeleteUserRequest(user_id="u")
        deletion = asyncio.ensure_future(service.DeleteUser(delete, context))
        await asyncio.sleep(0)
        may_commit.set()
        assert (await deletion).deleted_events == 2
        await asyncio.gather(*ingests)
        assert EventStore(db).counts().events == 0


class Texts:
    """Nobody embeds here."""

    def changed(self) -> None:
        """Nothing to do."""


def test_two_processes_share_one_store(
    start_predictor: Start, connect: Connect, absent: str
) -> None:
    """Both write at once, each sees all, and no event_id is stored twice."""
    services = [start_predictor(absent) for _ in range(2)]
    stubs = [connect(service.address) for service in services]
    accepted = [0, 0]

    def ingest(process: int) -> None:
        for n in range(100):
            events = [event(user="u", event_id=f"{n}-{m}") for m in range(10)]
            done = stubs[process].events.IngestEvents(event_pb.IngestEventsRequest(events=events))
            assert done.accepted + done.duplicates == 10
            accepted[process] += done.accepted

    workers = [threading.Thread(target=ingest, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(accepted) == 1_000
    for stub in stubs:
        assert stub.models.GetInfo(model_pb.GetInfoRequest()).events == 1_000


def test_two_processes_may_start_at_once_on_a_new_directory(tmp_path: Path, absent: str) -> None:
    flags = ["--port", "0", "--data-dir", str(tmp_path / "new"), "--embedder", absent]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "predictor", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        _, log = process.communicate(timeout=60)
        assert "ready at" in line, log
        assert process.returncode == 0


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "predictor", "--history-events", "0", "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "history_events" in done.stderr
    assert "Traceback" not in done.stderr

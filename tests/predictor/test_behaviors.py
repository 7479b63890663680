"""Behavior texts on their way into the embedder and out of it, whatever fails meanwhile."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from foretell import Client
from foretell.errors import ResourceExhaustedError
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.testing import FakeServices
from foretell.texts import text_id
from serving.process import ServiceProcess

if TYPE_CHECKING:
    from tests.predictor.conftest import Stubs

Start = Callable[..., ServiceProcess]
Connect = Callable[[str], "Stubs"]
Eventually = Callable[[Callable[[], bool]], None]


def ingest(stubs: "Stubs", user: str, *texts: str) -> None:
    events = [event_pb.Event(user_id=user, behavior_type="search", text=text) for text in texts]
    done = stubs.events.IngestEvents(event_pb.IngestEventsRequest(events=events))
    assert done.accepted == len(texts)


def pending(stubs: "Stubs") -> int:
    return stubs.models.GetInfo(model_pb.GetInfoRequest()).pending_texts


def texts_in(client: Client) -> set[str]:
    page = client.list_items(collection="behaviors", page_size=1_000)
    return {item.text for item in page.elements}


@pytest.fixture
def fakes() -> Iterator[FakeServices]:
    with FakeServices() as running:
        yield running


@pytest.fixture
def client(fakes: FakeServices) -> Iterator[Client]:
    with Client(embedder=fakes.embedder_address) as connected:
        yield connected


def test_texts_wait_for_an_absent_embedder(
    start_predictor: Start,
    start_embedder: Callable[..., ServiceProcess],
    connect: Connect,
    eventually: Eventually,
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    """Ingested without an embedder and over a kill -9, all texts are there once it has come."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    service = start_predictor(address)
    stubs = connect(service.address)
    texts = [f"text number {n}" for n in range(300)]
    ingest(stubs, "ann", *texts)
    assert pending(stubs) == 300
    service.process.send_signal(signal.SIGKILL)
    service.process.wait()
    stubs = connect(start_predictor(address).address)
    assert pending(stubs) == 300
    start_embedder("--port", str(port), "--data-dir", str(tmp_path / "embedder-data"))
    eventually(lambda: pending(stubs) == 0)
    with Client(embedder=address) as client:
        assert texts_in(client) == set(texts)


def test_a_deleted_users_own_texts_leave_the_embedder(
    start_predictor: Start,
    connect: Connect,
    eventually: Eventually,
    fakes: FakeServices,
    client: Client,
) -> None:
    stubs = connect(start_predictor(fakes.embedder_address).address)
    ingest(stubs, "ann", "both", "anns own", "anns own")
    ingest(stubs, "bob", "both", "bobs own")
    eventually(lambda: texts_in(client) == {"both", "anns own", "bobs own"})
    assert client.get_items([text_id("both")], collection="behaviors").items[0].text == "both"
    stubs.events.DeleteUser(event_pb.DeleteUserRequest(user_id="ann"))
    eventually(lambda: texts_in(client) == {"both", "bobs own"})
    ingest(stubs, "eve", "anns own")
    eventually(lambda: texts_in(client) == {"both", "anns own", "bobs own"})
    stubs.events.DeleteUser(event_pb.DeleteUserRequest(user_id="bob"))
    stubs.events.DeleteUser(event_pb.DeleteUserRequest(user_id="eve"))
    eventually(lambda: texts_in(client) == set())


def test_an_embedder_that_refuses_for_a_while_is_asked_again(
    start_predictor: Start,
    connect: Connect,
    eventually: Eventually,
    fakes: FakeServices,
    client: Client,
) -> None:
    busy = ResourceExhaustedError("busy", retry_after_s=0.1)
    fakes.fail_next("UpsertItems", busy, times=2)
    stubs = connect(start_predictor(fakes.embedder_address).address)
    ingest(stubs, "ann", "some text")
    eventually(lambda: texts_in(client) == {"some text"})
    fakes.fail_next("DeleteItems", busy, times=2)
    stubs.events.DeleteUser(event_pb.DeleteUserRequest(user_id="ann"))
    eventually(lambda: texts_in(client) == set())


def test_another_process_takes_over_from_a_killed_one(
    start_predictor: Start,
    connect: Connect,
    eventually: Eventually,
    fakes: FakeServices,
    client: Client,
) -> None:
    """Texts are one process's work; events come to any of them."""
    services = [start_predictor(fakes.embedder_address) for _ in range(2)]
    stubs = [connect(service.address) for service in services]
    for at, stub in enumerate(stubs):
        ingest(stub, "ann", f"by {at}")
    eventually(lambda: texts_in(client) == {"by 0", "by 1"})
    services[0].process.send_signal(signal.SIGKILL)
    ingest(stubs[1], "ann", "after the first was killed")
    eventually(lambda: "after the first was killed" in texts_in(client))
    services.append(start_predictor(fakes.embedder_address))
    services[1].process.send_signal(signal.SIGKILL)
    ingest(connect(services[2].address), "ann", "after the second was killed")
    eventually(lambda: "after the second was killed" in texts_in(client))

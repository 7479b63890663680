"""What holds for every method: malformed bytes, errors, repeated writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from foretell.embedder.v1 import embedder_service_pb2 as epb
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb

if TYPE_CHECKING:
    from tests.contract.conftest import Refused, Services

METHODS = {
    f"{service.full_name}/{method.name}": method
    for file in (epb, event_pb, model_pb, prediction_pb)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
WRITES = {
    path: method
    for path, method in METHODS.items()
    if "request_id" in method.input_type.fields_by_name
}


def call_of(services: Services, path: str, stack: contextlib.ExitStack) -> Any:
    """A call that sends bytes as they are."""
    embedder = "embedder" in path
    address = services.embedder_address if embedder else services.predictor_address
    channel = stack.enter_context(services.channel(address))
    if METHODS[path].server_streaming:
        stream: Any = channel.unary_stream(f"/{path}")
        return lambda request, timeout: list(stream(request, timeout=timeout))
    return channel.unary_unary(f"/{path}")


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as channels:
        yield channels


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x0a\x7fabc"],
    ids=["no message", "cut off"],
)
def test_malformed_bytes_are_the_callers_fault(
    services: Services, refused: Refused, stack: contextlib.ExitStack, path: str, data: bytes
) -> None:
    call = call_of(services, path, stack)
    refused(call, data, "INVALID_ARGUMENT", "MALFORMED_MESSAGE")


@pytest.mark.parametrize(
    "path",
    [
        "foretell.embedder.v1.EmbedderService/GetItems",
        "foretell.embedder.v1.EmbedderService/WatchItems",
        "foretell.predictor.v1.EventService/DeleteUser",
    ],
)
def test_invalid_utf8_is_the_callers_fault(
    services: Services, refused: Refused, stack: contextlib.ExitStack, path: str
) -> None:
    first_string = b"\x0a\x02\xff\xfe"
    refused(call_of(services, path, stack), first_string, "INVALID_ARGUMENT", "MALFORMED_MESSAGE")


def test_an_unknown_method_is_unimplemented(services: Services) -> None:
    with services.channel(services.predictor_address) as channel:
        call: Any = channel.unary_unary("/foretell.predictor.v1.PredictionService/Guess")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def good_write(method: MethodDescriptor, unique: str) -> tuple[Message, Message]:
    """A write that succeeds, and another one with the same request_id."""
    item = {"id": unique, "text": "one"}
    filled: dict[str, dict[str, Any]] = {
        "UpsertItems": {"collection": unique, "items": [item]},
        "DeleteItems": {"collection": unique, "ids": [unique]},
        "CreateCollection": {"name": f"{unique}-new", "text": {}},
        "DeleteCollection": {"name": unique},
        "IngestEvents": {
            "events": [{"user_id": unique, "behavior_type": "view", "text": unique}],
        },
        "DeleteUser": {"user_id": unique},
        "ActivateModel": {"version": unique},
        "DeleteModel": {"version": unique},
    }
    kind = GetMessageClass(method.input_type)
    vectors = {
        "collection": f"{unique}-vectors",
        "ids": [unique],
        "vectors": {"data": bytes(8), "element_type": 1, "rows": 1, "cols": 2},
    }
    first = kind(**filled.get(method.name, vectors), request_id=f"{unique}-request")
    other = kind()
    other.CopyFrom(first)
    match method.name:
        case "UpsertItems":
            other.items[0].text = "another"  # type: ignore[attr-defined]
        case "IngestEvents":
            other.events[0].text = "another"  # type: ignore[attr-defined]
        case "PutVectors" | "DeleteItems":
            other.ids[0] = "another"  # type: ignore[attr-defined]
        case _:
            name = next(iter(first.ListFields()))[0].name
            setattr(other, name, "another")
    return first, other


def prepare(services: Services, method: str, unique: str) -> None:
    """What the write of `good_write` needs."""
    create = services.embedder.CreateCollection
    create(epb.CreateCollectionRequest(name=unique, text=epb.TextCollection()))
    vector = epb.VectorCollection(cols=2)
    create(epb.CreateCollectionRequest(name=f"{unique}-vectors", vector=vector))
    services.embedder.UpsertItems(
        epb.UpsertItemsRequest(collection=unique, items=[epb.Item(id=unique, text="old")])
    )
    if method in ("ActivateModel", "DeleteModel"):
        services.register_model(unique, ["view"])


@pytest.mark.parametrize("path", WRITES)
def test_a_repeated_write_gives_the_first_answer(
    services: Services, refused: Refused, stack: contextlib.ExitStack, unique: str, path: str
) -> None:
    method = METHODS[path]
    prepare(services, method.name, unique)
    call = call_of(services, path, stack)
    request, other = good_write(method, unique)
    first = call(request.SerializeToString(), timeout=60)
    again = call(request.SerializeToString(), timeout=60)
    answers = [GetMessageClass(method.output_type).FromString(data) for data in (first, again)]
    if "timings" in method.output_type.fields_by_name:  # they are each call's own
        for answer in answers:
            answer.ClearField("timings")
    assert answers[1] == answers[0]
    refused(call, other.SerializeToString(), "INVALID_ARGUMENT", "REQUEST_ID_REUSED", "request_id")


@pytest.mark.parametrize("path", WRITES)
@pytest.mark.parametrize(
    ("request_id", "reason"), [("x" * 129, "TOO_LONG"), ("a\nb", "CONTROL_CHARACTERS")]
)
def test_a_bad_request_id_is_refused(
    services: Services,
    refused: Refused,
    stack: contextlib.ExitStack,
    unique: str,
    path: str,
    request_id: str,
    reason: str,
) -> None:
    method = METHODS[path]
    request, _ = good_write(method, unique)
    request.request_id = request_id  # type: ignore[attr-defined]
    if method.full_name.startswith("foretell.embedder"):
        prepare(services, method.name, unique)
    call = call_of(services, path, stack)
    refused(call, request.SerializeToString(), "INVALID_ARGUMENT", reason, "request_id")


def test_a_refused_write_does_not_use_up_its_request_id(
    services: Services, refused: Refused, unique: str
) -> None:
    bad = event_pb.IngestEventsRequest(request_id=unique)
    refused(services.events.IngestEvents, bad, "INVALID_ARGUMENT", "EMPTY", "events")
    event = event_pb.Event(user_id=unique, behavior_type="view", text="a text")
    good = event_pb.IngestEventsRequest(events=[event], request_id=unique)
    assert services.events.IngestEvents(good).accepted == 1


def test_a_repeated_write_writes_once(services: Services, unique: str) -> None:
    event = event_pb.Event(user_id=unique, behavior_type="view", text="a text")
    request = event_pb.IngestEventsRequest(events=[event], request_id=unique)
    for _ in range(3):
        assert services.events.IngestEvents(request).accepted == 1
    listed = services.events.ListEvents(event_pb.ListEventsRequest(user_id=unique))
    assert len(listed.events) == 1


def test_a_write_without_request_id_is_done_again(services: Services, unique: str) -> None:
    event = event_pb.Event(user_id=unique, behavior_type="view", text="a text")
    request = event_pb.IngestEventsRequest(events=[event])
    for _ in range(2):
        services.events.IngestEvents(request)
    listed = services.events.ListEvents(event_pb.ListEventsRequest(user_id=unique))
    assert len(listed.events) == 2

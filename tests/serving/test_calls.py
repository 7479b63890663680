"""Errors of a real aio server, called with raw bytes."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    from_rpc_error,
)
from serving.calls import CallInterceptor

PREFIX = "/foretell.embedder.v1.EmbedderService/"


class Servicer(rpc.EmbedderServiceServicer):
    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        return pb.GetInfoResponse(version="1")

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        raise ResourceExhaustedError("busy", reason="BUSY", retry_after_s=1.5, metadata={"a": "b"})

    async def GetItems(self, request: pb.GetItemsRequest, context: Any) -> pb.GetItemsResponse:
        raise RuntimeError("a secret of the service")

    async def ListItems(self, request: pb.ListItemsRequest, context: Any) -> pb.ListItemsResponse:
        await context.abort(grpc.StatusCode.ABORTED, "by hand")
        raise AssertionError

    async def WatchItems(
        self, request: pb.WatchItemsRequest, context: Any
    ) -> AsyncIterator[pb.WatchItemsResponse]:
        yield pb.WatchItemsResponse(seq=1)
        if request.collection == "bug":
            raise RuntimeError("a secret of the service")
        raise NotFoundError("gone", field="collection")


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[CallInterceptor()])
    servicer = Servicer()  # type: ignore[abstract]  # the other methods are not called
    rpc.add_EmbedderServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


async def failure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def test_answers_pass(channel: grpc.aio.Channel) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    assert (await stub.GetInfo(pb.GetInfoRequest())).version == "1"


@pytest.mark.parametrize(
    "data", [b"\x0a\xff\xff\xff", b"\xff", b"\x0a\x02\xc3\x28"], ids=["cut", "tag", "utf-8"]
)
@pytest.mark.parametrize("method", ["Embed", "WatchItems"])
async def test_malformed_bytes_are_the_callers_fault(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture, method: str, data: bytes
) -> None:
    opened: Any = channel
    if method == "Embed":
        call = opened.unary_unary(PREFIX + method)(data)
    else:
        call = opened.unary_stream(PREFIX + method)(data).read()
    error = from_rpc_error(await failure(call))
    assert isinstance(error, InvalidArgumentError)
    assert error.reason == "MALFORMED_MESSAGE"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_typed_error_arrives_whole_and_is_not_logged(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    error = from_rpc_error(await failure(stub.Embed(pb.EmbedRequest())))
    assert isinstance(error, ResourceExhaustedError)
    assert (error.message, error.reason, error.retry_after_s) == ("busy", "BUSY", 1.5)
    assert error.metadata == {"a": "b"}
    assert not caplog.records


async def test_a_bug_is_logged_and_its_text_stays_here(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    error = await failure(stub.GetItems(pb.GetItemsRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    assert "a secret of the service" in caplog.text


async def test_an_abort_by_hand_stands(channel: grpc.aio.Channel) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    error = await failure(stub.ListItems(pb.ListItemsRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "by hand")


async def test_a_stream_fails_after_its_answers(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    call: Any = stub.WatchItems(pb.WatchItemsRequest())
    assert (await call.read()).seq == 1
    assert isinstance(from_rpc_error(await failure(call.read())), NotFoundError)
    assert not caplog.records
    call = stub.WatchItems(pb.WatchItemsRequest(collection="bug"))
    await call.read()
    assert (await failure(call.read())).code() is grpc.StatusCode.INTERNAL
    assert "a secret of the service" in caplog.text


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    call: Callable[..., Awaitable[Any]] = channel.unary_unary(PREFIX + "Nothing")
    assert (await failure(call(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_status_has_exactly_one_error_info(channel: grpc.aio.Channel) -> None:
    stub = rpc.EmbedderServiceStub(channel)
    error = await failure(stub.Embed(pb.EmbedRequest()))
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    kinds = [detail.type_url.rsplit(".", 1)[1] for detail in status.details]
    assert kinds.count("ErrorInfo") == 1

"""Life of a server: health, reflection, taken ports, graceful stop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import h2.config
import h2.connection
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as rpc
from foretell.errors import UnavailableError
from serving.server import OPTIONS, _Servers, running
from serving.settings import ServiceSettings

NAME = "foretell.embedder.v1.EmbedderService"


class Servicer(rpc.EmbedderServiceServicer):
    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.ending = asyncio.Event()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        self.entered.set()
        await self.go.wait()
        return pb.GetInfoResponse(version="1")

    async def WatchItems(
        self, request: pb.WatchItemsRequest, context: Any
    ) -> AsyncIterator[pb.WatchItemsResponse]:
        yield pb.WatchItemsResponse(seq=1)
        await self.ending.wait()
        raise UnavailableError("the service is shutting down")

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_EmbedderServiceServicer_to_server(self, server)
        return [NAME]


def a_servicer() -> Servicer:
    return Servicer()  # type: ignore[abstract]  # the other methods are not called


def settings(**values: Any) -> ServiceSettings:
    return ServiceSettings(drain_s=0, **values)


async def test_health_per_service_and_reflection() -> None:
    async with (
        running(settings(), a_servicer().register) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([question])):
            names = {service.name for service in answer.list_services_response.service}
            assert {NAME, "grpc.health.v1.Health"} <= names


async def test_a_call_in_flight_finishes_while_stopping() -> None:
    servicer = a_servicer()
    serving = running(settings(), servicer.register)
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.EmbedderServiceStub(channel).GetInfo(pb.GetInfoRequest())
        await asyncio.wait_for(servicer.entered.wait(), 10)
        stopping = asyncio.ensure_future(serving.__aexit__(None, None, None))
        servicer.go.set()
        assert (await call).version == "1"
        await asyncio.wait_for(stopping, 10)


async def test_open_streams_do_not_hold_up_the_stop() -> None:
    servicer = a_servicer()
    serving = running(settings(grace_s=3_600), servicer.register, servicer.ending.set)
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = rpc.EmbedderServiceStub(channel).WatchItems(pb.WatchItemsRequest())
        assert (await call.read()).seq == 1
        await asyncio.wait_for(serving.__aexit__(None, None, None), 10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_watches_do_not_hold_up_the_stop() -> None:
    serving = running(settings(grace_s=3_600), a_servicer().register)
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await asyncio.wait_for(serving.__aexit__(None, None, None), 10)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_pings_of_an_idle_client_are_no_abuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings each second where the server allows one each 0.1 s; the fourth would be too many."""
    fast = [(name, 100 if name.endswith("_ms") else value) for name, value in OPTIONS]
    monkeypatch.setattr("serving.server.OPTIONS", fast)
    pings = [
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with (
        running(settings(), a_servicer().register) as address,
        grpc.aio.insecure_channel(address, options=pings) as channel,
    ):
        await channel.channel_ready()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(
                channel.wait_for_state_change(grpc.ChannelConnectivity.READY), timeout=6
            )


async def test_while_draining_health_says_not_serving() -> None:
    servicer = a_servicer()
    serving = running(ServiceSettings(drain_s=30), servicer.register)
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.ensure_future(serving.__aexit__(None, None, None))
        answer = await asyncio.wait_for(watch.read(), 10)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        servicer.go.set()
        info = await rpc.EmbedderServiceStub(channel).GetInfo(pb.GetInfoRequest())
        assert info.version == "1"  # new calls are served until the drain is over
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping


async def test_a_taken_port_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=str(port)):
            async with running(settings(port=port), a_servicer().register):
                pass


ARRIVED = b"arrived?"


def send_deadly(address: str, until: bytes) -> None:
    """Calls a method whose name is not UTF-8, and hangs up once that has been answered.

    A ping, which the server must send back, follows the call.
    """
    host, port = address.rsplit(":", 1)
    connection = h2.connection.H2Connection(
        h2.config.H2Configuration(
            header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
    )
    connection.initiate_connection()
    head = {":method": "POST", ":scheme": "http", ":authority": "x", "te": "trailers"}
    head["content-type"] = "application/grpc"
    headers = [(name.encode(), value.encode()) for name, value in head.items()]
    connection.send_headers(1, [*headers[:3], (b":path", b"/\xd8"), *headers[3:]], end_stream=True)
    connection.ping(ARRIVED)
    with socket.create_connection((host, int(port)), timeout=10) as one:
        one.sendall(connection.data_to_send())
        seen = b""
        while until not in seen:
            some = one.recv(65_536)
            assert some, "hung up before that"
            seen += some


async def answers_again(address: str) -> None:
    """A call that comes while one server ends and the next begins may fail; soon none does."""
    request = health_pb2.HealthCheckRequest(service=NAME)
    async with asyncio.timeout(30), grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = await health.Check(request, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
                    raise
            else:
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                return


@pytest.mark.parametrize("share_port", [False, True])
async def test_a_call_that_ends_the_server_begins_another(share_port: bool) -> None:
    servicer = a_servicer()
    serving = running(settings(grace_s=3_600), servicer.register, servicer.ending.set,
                      share_port=share_port)  # fmt: skip
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as before:
        stub = rpc.EmbedderServiceStub(before)
        in_flight = stub.GetInfo(pb.GetInfoRequest())
        stream: Any = stub.WatchItems(pb.WatchItemsRequest())
        assert (await stream.read()).seq == 1
        await asyncio.wait_for(servicer.entered.wait(), 10)
        for _ in range(3):
            await asyncio.to_thread(send_deadly, address, b"Server shutdown")
            await answers_again(address)
        servicer.go.set()
        assert (await in_flight).version == "1"
        async with grpc.aio.insecure_channel(address) as channel:
            info = await rpc.EmbedderServiceStub(channel).GetInfo(pb.GetInfoRequest())
            assert info.version == "1"
        await asyncio.wait_for(serving.__aexit__(None, None, None), 10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream.read()
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_that_ends_the_server_while_it_stops() -> None:
    servicer = a_servicer()
    serving = running(settings(grace_s=3_600), servicer.register)
    address = await serving.__aenter__()
    async with grpc.aio.insecure_channel(address) as channel:
        call = rpc.EmbedderServiceStub(channel).GetInfo(pb.GetInfoRequest())
        await asyncio.wait_for(servicer.entered.wait(), 10)
        send_deadly(address, ARRIVED)  # the loop, which has not seen it yet, goes on with the stop
        stopping = asyncio.ensure_future(serving.__aexit__(None, None, None))
        servicer.go.set()
        assert (await call).version == "1"
        await asyncio.wait_for(stopping, 10)


async def test_what_cannot_begin_anew_at_once_is_tried_again() -> None:
    servicer, failing = a_servicer(), [RuntimeError("a servicer's own"), OSError("taken")]
    servicer.go.set()
    begun = False

    def register(server: grpc.aio.Server) -> Sequence[str]:
        if begun and failing:
            raise failing.pop()
        return servicer.register(server)

    async with running(settings(), register) as address:
        begun = True
        await asyncio.to_thread(send_deadly, address, b"Server shutdown")
        await answers_again(address)
        async with grpc.aio.insecure_channel(address) as channel:
            info = await rpc.EmbedderServiceStub(channel).GetInfo(pb.GetInfoRequest())
            assert info.version == "1"
    assert not failing


class Ended:
    """A server that ends by itself at once, and says so when it is told."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self.stopped = False

    async def start(self) -> None:
        pass

    async def stop(self, grace_s: float) -> None:
        self.stopped = True

    async def wait_for_termination(self, timeout_s: float) -> bool:
        await self.told.wait()
        # As asyncio.wait_for of 3.11 may do where its future is done.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "ended")


async def test_no_server_begins_after_the_stop() -> None:
    made: list[Ended] = []

    def bound(port: int) -> tuple[Any, int]:
        made.append(Ended())
        return made[-1], 1

    servers = _Servers(bound, 0, 0.0)
    await servers.start()
    await asyncio.sleep(0)  # it watches
    made[0].told.set()
    await asyncio.sleep(0)  # it has been told, and not yet looked
    await servers.stop()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(made) == 1
    assert made[0].stopped


async def test_too_many_calls_are_refused() -> None:
    servicer = a_servicer()
    async with (
        running(settings(max_concurrent_calls=1), servicer.register) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = rpc.EmbedderServiceStub(channel)
        first = stub.GetInfo(pb.GetInfoRequest())
        await asyncio.wait_for(servicer.entered.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetInfo(pb.GetInfoRequest())
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        servicer.go.set()
        await first

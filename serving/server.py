"""A gRPC server from start to stop: health, reflection, signals, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, ProcessCollector

from foretell import limits
from serving import security, tracing
from serving.calls import CallInterceptor, Stage
from serving.logs import CallLog
from serving.metrics import CallMetrics, metrics_page
from serving.settings import ServiceSettings

log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], Sequence[str]]
"""Adds the servicers to a server and returns the full names of their services."""

SENDING_S = 5.0
"""After the server's end, how long the last answers may take to leave."""

GC_THRESHOLDS = (50_000, 20, 50)
"""A call makes some thousand objects; by default a pass begins after 700."""

AGE_GRACE_S = 300
"""What calls get that run on a connection of the greatest age; longer than any deadline of the
client's own. A stream begins anew, with the certificates and the token of then."""

CRASH_SEEN_S = 0.1
"""After this a server that ended by itself is noticed."""

LONGEST_PAUSE_S = 5.0
"""Between two attempts to begin another one."""

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
    # Clients ping idle connections every 30 s; the default of 5 minutes would call that abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # the library is untyped
    """grpc.health.v1, whose Watch calls can be ended: else they would hold up the server's stop."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = asyncio.Event()

    def end_watches(self) -> None:
        """Ends all Watch calls."""
        self._ended.set()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Follows a service's status until the server stops."""
        watching = asyncio.ensure_future(super().Watch(request, context))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait({watching, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ended.cancel()
            await asyncio.wait({watching, ended})
        if not watching.cancelled():
            watching.result()  # raises what it raised


@contextlib.asynccontextmanager
async def running(
    settings: ServiceSettings,
    register: Register,
    end_streams: Callable[[], None] | None = None,
    registry: CollectorRegistry | None = None,
    share_port: bool = False,
    outermost: Sequence[Stage] = (),
) -> AsyncIterator[str]:
    """Serves while the block runs, and gives the address; health says SERVING in it.

    At the end: NOT_SERVING, `drain_s` later new calls are refused, `end_streams` is called (to end
    calls that would go on for ever), calls in flight get `grace_s`. With `share_port` other
    processes may listen on the same port; see serving/supervisor.py. Calls pass the stages
    `outermost` first.

    Raises:
        OSError: the port is taken or the address is none of this machine's.
        FailedPreconditionError: certificates or tokens cannot be used, or are missing where the
            address is open to others.
    """
    security.check_binding(settings)
    credentials = security.server_credentials(settings)
    registry = registry or CollectorRegistry()
    observing: list[Stage] = [*outermost, CallMetrics(registry), CallLog()]
    interceptor = CallInterceptor([*observing, *security.stages(settings)])
    options = [
        *OPTIONS,
        # Else a second server on a taken port must fail, not share its connections.
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1_000)),
        ("grpc.max_connection_age_grace_ms", AGE_GRACE_S * 1_000),
    ]
    servicer = Health()
    names = [""]

    def bound(port: int) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(interceptors=[interceptor], options=options)
        names[1:] = register(server)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        if settings.reflection:
            reflection.enable_server_reflection(
                (*names[1:], health.SERVICE_NAME, reflection.SERVICE_NAME), server
            )
        address = f"{settings.host}:{port}"
        try:
            if credentials is None:
                return server, server.add_insecure_port(address)
            return server, server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}") from error

    servers = _Servers(bound, settings.port, settings.grace_s)
    await servers.start()
    try:
        for name in names:
            await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        yield f"{settings.host}:{servers.port}"
    finally:
        try:
            await servicer.enter_graceful_shutdown()
            await asyncio.sleep(settings.drain_s)
        finally:
            stopping = servers.stop()
            await asyncio.sleep(0)  # lets it begin: streams that end now cannot come back
            servicer.end_watches()
            if end_streams is not None:
                end_streams()
            await stopping


class _Servers:
    """A server, and after its unforeseen end another one on the same port.

    The asyncio server of grpcio 1.85 ends at a method name that is not UTF-8, which any caller can
    send. What it then has in flight is still answered, within `grace_s`.

    Args:
        bound: makes a server that is bound to a port, and gives the port's number; raises OSError.
        port: 0 is any free one.
        grace_s: what calls in flight get at the end.
    """

    def __init__(
        self, bound: Callable[[int], tuple[grpc.aio.Server, int]], port: int, grace_s: float
    ) -> None:
        self._bound = bound
        self._grace_s = grace_s
        self._server, self.port = bound(port)
        self._ending: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Serves from here on."""
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> asyncio.Future[Any]:
        """Refuses new calls; done when those in flight are."""
        self._stopping = True  # the cancellation may come just when the server has ended
        self._watching.cancel()
        self._end()
        return asyncio.gather(*self._ending)

    async def _watch(self) -> None:
        while not self._stopping:
            try:
                await self._server.wait_for_termination(CRASH_SEEN_S)
            except Exception as error:  # whatever it was, here it must not end the service
                if self._stopping:
                    return
                log.error("the server has ended and begins anew: %s", error)
            else:
                continue
            self._end()
            await self._begin_anew()

    async def _begin_anew(self) -> None:
        pause_s = CRASH_SEEN_S
        while not self._stopping:
            try:
                self._server, _ = self._bound(self.port)
                await self._server.start()
                return
            except Exception as error:
                log.error("no server yet: %s", error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _end(self) -> None:
        task = asyncio.create_task(_stop(self._server, self._grace_s))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _stop(server: grpc.aio.Server, grace_s: float) -> None:
    """Refuses new calls and waits for those in flight, even if the last to come ends the server."""
    try:
        await server.stop(grace_s)
        return
    except Exception as error:
        log.error("the server has ended while it stopped: %s", error)
    # Not in the block above: the error holds on to the call, which would be waited for.
    await server.stop(grace_s)


async def serve(
    program: str,
    settings: ServiceSettings,
    register: Register,
    end_streams: Callable[[], None] | None = None,
    registry: CollectorRegistry | None = None,
    share_port: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT; the registry's metrics too, and those of calls and process.

    Prints `PROGRAM ready at HOST:PORT` on the standard output once it does; everything else
    goes to the log.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    registry = registry or CollectorRegistry()
    ProcessCollector(registry=registry)
    async with (
        tracing.stages(settings, program) as traced,
        running(settings, register, end_streams, registry, share_port, traced) as address,
        metrics_page(settings, registry),
    ):
        _spare_the_collector()
        sys.stdout.write(f"{program} ready at {address}\n")
        sys.stdout.flush()
        await stop.wait()
        log.info("stopping")
    log.info("stopped")


def _spare_the_collector() -> None:
    """Garbage collection passes over what stays for good.

    A pass over a warm heap, with all modules of torch, stops everything for 100 ms and more; calls
    leave hardly any cycles behind.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def run_to_end(service: Coroutine[Any, Any, None]) -> None:
    """Runs a service, which calls `serve`, to its end and until its last answers have left.

    The server counts a call as done when its answer is handed over; what sends it may still run,
    and would be cut off by the end of the process. What the service itself had running has ended
    by then.
    """

    async def whole() -> None:
        await service
        sending = asyncio.all_tasks() - {asyncio.current_task()}
        if sending:
            await asyncio.wait(sending, timeout=SENDING_S)

    # A third less of a call's time in the loop than with asyncio's own, and more calls a second by
    # that.
    uvloop.run(whole())

"""The embedder, as the predictor reaches it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc

from foretell import limits
from foretell._channel import call_metadata, target
from foretell._security import Security, Watched
from foretell.embedder.v1 import embedder_service_pb2 as pb
from foretell.embedder.v1 import embedder_service_pb2_grpc as pb_grpc
from foretell.errors import (
    DeadlineExceededError,
    ForetellError,
    UnavailableError,
    from_rpc_error,
)
from serving import tracing

log = logging.getLogger(__name__)

Q = TypeVar("Q")
R = TypeVar("R")

PROBE_S = 2.0
"""Deadline of the call that looks whether the embedder is back."""

PROBE_PAUSE_S = 0.1
"""Between two such calls: gRPC paces the attempts to connect, but a server may refuse at once."""

_OPTIONS = [
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
    # gRPC's own growing, jittered pauses between attempts to connect, on a scale that suits
    # services side by side.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Notices a host that vanished; the server allows a ping each 10 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Of several addresses each gets its share, and one that fails none.
    ("grpc.lb_policy_name", "round_robin"),
    # Services with the same address share a connection otherwise: one stuck call would hold all.
    ("grpc.use_local_subchannel_pool", 1),
]


NO_SECURITY = Security()
"""No TLS and no token."""


class Embedder:
    """A channel to the embedder that knows whether it answers.

    After a call that found it absent or too slow, calls fail at once, so that no prediction waits
    for nothing; `run` looks until it answers again.
    """

    def __init__(self, address: str, security: Security = NO_SECURITY) -> None:
        self.address = address
        self._security = security
        self._metadata = call_metadata(security)
        self._credentials = Watched(
            security.tls_files,
            security.credentials,
            lambda error: log.error("certificates stay as before: %s", error),
        )
        self._channels: list[grpc.aio.Channel] = []
        self._connect()
        self.available = False
        self._lost = asyncio.Event()
        self._lost.set()

    def _connect(self) -> None:
        """Opens a channel with the credentials of now; calls on the one before go on."""
        self._opened_with = self._credentials.get()
        options = [*_OPTIONS, *self._security.options]
        if self._opened_with is None:
            channel = grpc.aio.insecure_channel(target(self.address), options=options)
        else:
            channel = grpc.aio.secure_channel(
                target(self.address), self._opened_with, options=options
            )
        self._channels.append(channel)
        self._stub: pb_grpc.EmbedderServiceAsyncStub = pb_grpc.EmbedderServiceStub(channel)

    @property
    def stub(self) -> pb_grpc.EmbedderServiceAsyncStub:
        """The methods; of a new channel when certificates have changed."""
        if self._credentials.get() is not self._opened_with:
            self._connect()
        return self._stub

    async def call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        timeout_s: float,
        *,
        wait_for_ready: bool = False,
    ) -> R:
        """Calls a method of `stub`.

        With `wait_for_ready` the call waits for an absent embedder, up to its deadline.

        Raises:
            ForetellError: as the embedder answered; UnavailableError or DeadlineExceededError
                where it did not.
        """
        if not self.available and not wait_for_ready:
            raise UnavailableError(
                f"the embedder at {self.address} does not answer", reason="EMBEDDER_UNAVAILABLE"
            )
        return await self._call(method, request, timeout_s, wait_for_ready)

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        timeout_s: float,
        wait_for_ready: bool,
    ) -> R:
        try:
            with tracing.span("embedder", client=True):
                response = await method(
                    request,
                    timeout=timeout_s,
                    wait_for_ready=wait_for_ready,
                    metadata=(*self._metadata(), *tracing.outgoing()),
                )
        except grpc.aio.AioRpcError as error:
            raise self._noted(from_rpc_error(error)) from None
        self._seen()
        return response

    async def watch(self, collection: str, after_seq: int) -> AsyncIterator[pb.WatchItemsResponse]:
        """Follows a collection; waits for an absent embedder, and ends when the connection does.

        Raises:
            ForetellError: as `call`.
        """
        request = pb.WatchItemsRequest(collection=collection, after_seq=after_seq)
        call = self.stub.WatchItems(request, wait_for_ready=True, metadata=self._metadata())
        try:
            async for response in call:
                self._seen()
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._noted(from_rpc_error(error)) from None
        finally:
            call.cancel()

    async def probe(self) -> None:
        """Looks whether the embedder answers."""
        try:
            await self._call(self.stub.GetInfo, pb.GetInfoRequest(), PROBE_S, False)
        except (UnavailableError, DeadlineExceededError):
            pass  # noted
        except ForetellError as error:  # it answers, if only with an error
            log.warning("embedder at %s: %s", self.address, error.message)
            self._seen()

    async def run(self) -> None:
        """Looks for the embedder whenever it is lost, until it is cancelled."""
        while True:
            await self._lost.wait()
            await self.probe()
            await asyncio.sleep(PROBE_PAUSE_S)

    async def close(self) -> None:
        """Closes the channels; calls in flight are cancelled."""
        for channel in self._channels:
            await channel.close()

    def _seen(self) -> None:
        if not self.available:
            log.info("embedder at %s answers", self.address)
            self.available = True
        self._lost.clear()

    def _noted(self, error: ForetellError) -> ForetellError:
        if isinstance(error, UnavailableError | DeadlineExceededError):
            if self.available:
                log.warning("embedder at %s does not answer: %s", self.address, error.message)
            self.available = False
            self._lost.set()
        return error

"""What the sync and the async client share: settings, channels, deadlines, batches."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from foretell import limits
from foretell._security import Security, Watched, read_file
from foretell.errors import InvalidArgumentError

if TYPE_CHECKING:
    from foretell.embedder.v1 import embedder_service_pb2_grpc as embedder_grpc
    from foretell.predictor.v1 import event_service_pb2_grpc as event_grpc
    from foretell.predictor.v1 import model_service_pb2_grpc as model_grpc
    from foretell.predictor.v1 import prediction_service_pb2_grpc as prediction_grpc

    Q = TypeVar("Q")
    R = TypeVar("R")

    # Types only: the generator of the sync client writes Sync for Async.
    AsyncChannel: TypeAlias = grpc.aio.Channel
    SyncChannel: TypeAlias = grpc.Channel
    AsyncUnary: TypeAlias = grpc.aio.UnaryUnaryMultiCallable[Q, R]
    SyncUnary: TypeAlias = grpc.UnaryUnaryMultiCallable[Q, R]
    AsyncEmbedderStub: TypeAlias = embedder_grpc.EmbedderServiceAsyncStub
    SyncEmbedderStub: TypeAlias = embedder_grpc.EmbedderServiceStub
    AsyncEventStub: TypeAlias = event_grpc.EventServiceAsyncStub
    SyncEventStub: TypeAlias = event_grpc.EventServiceStub
    AsyncModelStub: TypeAlias = model_grpc.ModelServiceAsyncStub
    SyncModelStub: TypeAlias = model_grpc.ModelServiceStub
    AsyncPredictionStub: TypeAlias = prediction_grpc.PredictionServiceAsyncStub
    SyncPredictionStub: TypeAlias = prediction_grpc.PredictionServiceStub

M = TypeVar("M", bound=Message)

MAX_ATTEMPTS: Final = 5
"""gRPC's own upper bound. What must outlast a restart waits for the service instead."""

IMPORT_FAILURES: Final = 1_000
"""Failures that an import keeps; the rest is counted."""

IMPORT_ITEMS: Final = 500
"""Items in one call of an import: some seconds of encoding on a CPU."""

IMPORT_EVENTS: Final = 5_000
"""Events in one call of an import."""

IMPORT_BYTES: Final = limits.MESSAGE_BYTES // 4
"""Bytes in one call of an import, unless one element is larger."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a client calls; every call has a deadline."""

    timeout_s: float = 30.0
    """Deadline of reads and predictions, retries included."""
    write_timeout_s: float = 120.0
    """Deadline of writes and of `embed`, which may have to encode many texts. A write waits for
    a service that is absent, up to this."""
    keepalive_s: float = 30.0
    """Seconds between pings on an idle connection, by which a vanished host is noticed. The
    services allow one each 10 s."""
    keepalive_timeout_s: float = 10.0
    """Seconds after which an unanswered ping ends the connection."""
    initial_backoff_s: float = 0.1
    """First pause between two attempts of a call that met UNAVAILABLE; it doubles each time."""
    max_backoff_s: float = 2.0
    """Longest such pause."""
    security: Security = field(default_factory=Security)
    """TLS, certificates and a token."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "security" and not getattr(self, name) > 0:
                raise InvalidArgumentError(
                    f"{name} is {getattr(self, name)}; it must be greater than 0",
                    reason="BAD_SETTING",
                    field=name,
                )

    def options(self) -> list[tuple[str, Any]]:
        """Channel arguments of gRPC."""
        return [
            ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
            ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
            # By default gRPC keeps 256 KiB for retries: a larger write would fail at the first
            # UNAVAILABLE.
            ("grpc.per_rpc_retry_buffer_size", limits.MESSAGE_BYTES),
            ("grpc.service_config", self._service_config()),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # A service that comes back is found while a call is still being tried again (1.2 s and
            # more), so that of two that are restarted in turn one always is; the default waits up
            # to two minutes.
            ("grpc.max_reconnect_backoff_ms", 1_000),
            *self.security.options,
        ]

    def _service_config(self) -> str:
        retry = {
            "maxAttempts": MAX_ATTEMPTS,
            "initialBackoff": f"{self.initial_backoff_s:.3f}s",
            "maxBackoff": f"{self.max_backoff_s:.3f}s",
            "backoffMultiplier": 2,
            # CANCELLED, if not by the caller: a service that stops ends so what it has not begun.
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }
        return json.dumps(
            {
                "methodConfig": [{"name": [{}], "retryPolicy": retry}],
                # Of several addresses each gets its share of the calls, and one that fails none.
                "loadBalancingConfig": [{"round_robin": {}}],
            }
        )


def target(addresses: str) -> str:
    """gRPC's name for HOST:PORT, several IP:PORT with commas between them, or any name of gRPC's
    own, such as `unix:PATH`.

    Raises:
        InvalidArgumentError: a list of something else.
    """
    if "," not in addresses:
        return addresses
    hosts = [one.strip().rpartition(":") for one in addresses.split(",")]
    try:
        versions = {ipaddress.ip_address(host.strip("[]")).version for host, _, _ in hosts}
        ports = all(port.isdecimal() and 0 < int(port) < 65_536 for _, _, port in hosts)
    except ValueError:
        versions, ports = set(), False
    if len(versions) != 1 or not ports:
        raise InvalidArgumentError(
            f"{addresses!r} is no list of IP:PORT of one IP version; several addresses behind a "
            "name are given as that name",
            reason="BAD_ADDRESS",
        )
    return f"ipv{versions.pop()}:" + ",".join(f"{host}:{port}" for host, _, port in hosts)


def async_channel(
    address: str, settings: ClientSettings, credentials: grpc.ChannelCredentials | None
) -> grpc.aio.Channel:
    """A channel of the running event loop; without credentials unencrypted."""
    if credentials is None:
        return grpc.aio.insecure_channel(target(address), options=settings.options())
    return grpc.aio.secure_channel(target(address), credentials, options=settings.options())


def sync_channel(
    address: str, settings: ClientSettings, credentials: grpc.ChannelCredentials | None
) -> grpc.Channel:
    """A channel for any thread, likewise."""
    if credentials is None:
        return grpc.insecure_channel(target(address), options=settings.options())
    return grpc.secure_channel(target(address), credentials, options=settings.options())


def cut_off(error: grpc.RpcError) -> bool:
    """Whether the connection was lost, perhaps after the answer had begun.

    gRPC repeats no call whose answer has begun. Every method may be repeated: writes have a
    request_id.
    """
    return error.code() is grpc.StatusCode.UNAVAILABLE and "Stream removed" in (
        error.details() or ""
    )


Metadata = tuple[tuple[str, str], ...]


def call_metadata(security: Security) -> Callable[[], Metadata]:
    """Gives the metadata of a call: the token, read again when its file changes.

    Raises:
        InvalidArgumentError: the file cannot be read or holds no token.
    """
    if not security.token_file:
        return lambda: ()

    def read() -> Metadata:
        token = read_file(security.token_file, "token_file").strip()
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise InvalidArgumentError(
                f"token_file: {security.token_file} does not hold a token",
                reason="BAD_SETTING",
                field="token_file",
            )
        return (("authorization", f"Bearer {token}"),)

    return Watched([security.token_file], read).get


def new_request_id(given: str | None) -> str:
    """The caller's request_id or a new one; every attempt of the write carries the same."""
    return uuid.uuid4().hex if given is None else given


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Wraps the making of a request: what no message can hold is the caller's fault.

    Raises:
        InvalidArgumentError: a negative or too large number, a text with lone surrogates,
            ragged vectors.
    """
    try:
        yield
    except ValueError as error:
        raise InvalidArgumentError(f"the request cannot be sent: {error}") from error


def batches(messages: Iterable[M], max_count: int) -> Iterator[list[M]]:
    """Messages in lists of at most `max_count` and, where each is smaller, IMPORT_BYTES."""
    batch: list[M] = []
    size = 0
    for message in messages:
        message_bytes = message.ByteSize()
        if batch and (len(batch) >= max_count or size + message_bytes > IMPORT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += message_bytes
    if batch:
        yield batch

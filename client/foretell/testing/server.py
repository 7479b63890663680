"""The gRPC server of a fake: errors and repeated writes as the services have them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message

from foretell import checks, limits
from foretell.embedder.v1 import embedder_service_pb2
from foretell.errors import DETAILS_KEY, ForetellError, InternalError, InvalidArgumentError
from foretell.predictor.v1 import event_service_pb2, model_service_pb2, prediction_service_pb2

log = logging.getLogger(__name__)

Context = grpc.ServicerContext

THREADS = 64
"""Calls at once; a WatchItems holds a thread as long as it lasts."""

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
    # Two servers must never share a port and halve each other's calls.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


class Faults:
    """Errors to raise instead of answers, by method name."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[ForetellError]] = {}
        for file in (
            embedder_service_pb2,
            event_service_pb2,
            prediction_service_pb2,
            model_service_pb2,
        ):
            for service in file.DESCRIPTOR.services_by_name.values():
                for method in service.methods:
                    self._waiting[method.name] = deque()
                    self._waiting[f"{service.name}/{method.name}"] = deque()

    def add(self, method: str, error: ForetellError, times: int) -> None:
        """The next `times` calls of `method` (`Predict`, or `ModelService/GetInfo`) fail."""
        if method not in self._waiting:
            raise ValueError(f"no service has a method {method!r}: {', '.join(self._waiting)}")
        self._waiting[method].extend([error] * times)

    def raise_next(self, path: str) -> None:
        """Raises what waits for a call of `/foretell.predictor.v1.ModelService/GetInfo`."""
        name = path.rsplit(".", 1)[-1]
        for waiting in (self._waiting[name], self._waiting[name.rsplit("/", 1)[-1]]):
            with contextlib.suppress(IndexError):
                raise waiting.popleft()


class Server:
    """A server on a free port of this machine's loopback.

    Attributes:
        address: host:port.
    """

    def __init__(
        self,
        register: Callable[[grpc.Server], None],
        changed: threading.Condition,
        faults: Faults,
    ) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="foretell-fake")
        self._server = grpc.server(
            self._threads, interceptors=[_Guard(changed, faults)], options=_OPTIONS
        )
        register(self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        """Cancels what is in flight and frees the port."""
        self._server.stop(None).wait()
        self._threads.shutdown()


class _Guard(grpc.ServerInterceptor):
    """Parses requests itself (gRPC would answer malformed ones with INTERNAL), maps errors to
    google.rpc.Status, runs one unary call at a time, and answers a repeated write from memory."""

    def __init__(self, changed: threading.Condition, faults: Faults) -> None:
        self._changed = changed
        self._faults = faults
        self._answers: dict[str, tuple[tuple[str, bytes], Message]] = {}

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the method's handler; unknown methods stay unknown."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        path = handler_call_details.method

        def read(data: bytes) -> Message:
            self._faults.raise_next(path)
            return _parse(handler.request_deserializer, data, path)

        def unary(data: bytes, context: Context) -> Message:
            try:
                with self._changed:
                    return self._once(handler, read(data), context)
            except Exception as error:
                _abort(context, error, path)

        def stream(data: bytes, context: Context) -> Iterator[Message]:
            try:
                assert handler.unary_stream is not None
                yield from handler.unary_stream(read(data), context)
            except Exception as error:
                _abort(context, error, path)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream, response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            unary, response_serializer=handler.response_serializer
        )

    def _once(
        self, handler: grpc.RpcMethodHandler[Any, Any], request: Message, context: Context
    ) -> Message:
        request_id = getattr(request, "request_id", "")
        if not request_id:
            return _timed(handler, request, context)
        checks.request_id(request_id)
        digest = (request.DESCRIPTOR.full_name, request.SerializeToString(deterministic=True))
        known = self._answers.get(request_id)
        if known is None:
            known = self._answers[request_id] = (digest, _timed(handler, request, context))
        elif known[0] != digest:
            raise checks.request_id_reused(request_id)
        return known[1]


def _timed(handler: grpc.RpcMethodHandler[Any, Any], request: Message, context: Context) -> Message:
    assert handler.unary_unary is not None
    begin = time.perf_counter_ns()
    response: Message = handler.unary_unary(request, context)
    timings = getattr(response, "timings", None)
    if timings is not None:
        timings.total_us = (time.perf_counter_ns() - begin) // 1_000
    return response


def _parse(deserialize: Callable[[bytes], Any] | None, data: bytes, path: str) -> Message:
    assert deserialize is not None
    try:
        message: Message = deserialize(data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the request is no valid message of {path}", reason="MALFORMED_MESSAGE"
        ) from None
    return message


def _abort(context: Context, error: Exception, path: str) -> NoReturn:
    if not isinstance(error, ForetellError):
        log.error("%s failed", path, exc_info=error)
        error = InternalError("internal error; the log has it")
    context.set_trailing_metadata(((DETAILS_KEY, error.to_status().SerializeToString()),))
    context.abort(error.code, error.message)

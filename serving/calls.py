"""What happens to every call between the wire and its method.

Requests are parsed here and exceptions become google.rpc.Status. Around that are stages, which see
each call begin and end and may refuse it: tokens and quotas, limits, metrics, the log.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message

from foretell.errors import DETAILS_KEY, ForetellError, InternalError, InvalidArgumentError

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Deserializer = Callable[[bytes], Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any] | Awaitable[None]]


class Call:
    """One call of a method, from its arrival to its end.

    Attributes:
        method: full name, such as `/foretell.predictor.v1.PredictionService/Predict`.
        context: gRPC's; once the call has ended it may not be asked for the peer, nor for the time
            that remains.
        peer: the caller's address.
        deadline_s: seconds that it had when it came; None of one that may take for ever.
        began: when it arrived (`time.perf_counter`).
        streaming: whether its answer is a stream.
        reads_stream: whether what it is asked is one too.
        request: the message, once it is parsed; None of a malformed one or a stream of them.
        response: the answer; None of a failed call or a stream.
        code: how it ended.
        reason: of the error that ended it; "" where none did.
        caller: the name of its token; "" without one.
        notes: what else the log says of it; see `note`.
    """

    __slots__ = (
        "_stopped_by",
        "_task",
        "began",
        "caller",
        "code",
        "context",
        "deadline_s",
        "method",
        "notes",
        "peer",
        "reads_stream",
        "reason",
        "request",
        "response",
        "streaming",
    )

    def __init__(
        self, method: str, context: Context, streaming: bool, reads_stream: bool = False
    ) -> None:
        self.method = method
        self.context = context
        self.streaming = streaming
        self.reads_stream = reads_stream
        self.began = time.perf_counter()
        self.peer: str = context.peer()
        self.deadline_s: float | None = context.time_remaining()
        self.request: Message | None = None
        self.response: Message | None = None
        self.code = grpc.StatusCode.OK
        self.reason = ""
        self.caller = ""
        self.notes: dict[str, Any] = {}
        self._stopped_by: ForetellError | None = None
        self._task = asyncio.current_task() if streaming else None

    def stop(self, error: ForetellError) -> None:
        """Ends a stream with an error, while it runs."""
        if self._task is not None and self._stopped_by is None:
            self._stopped_by = error
            self._task.cancel()

    def stopped_by(self) -> ForetellError | None:
        """The error that `stop` was given; once it is asked for, the task is cancelled no more."""
        if self._task is not None and self._stopped_by is not None:
            self._task.uncancel()
        return self._stopped_by


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def note(**values: Any) -> None:
    """Adds fields to what is logged of the call that this coroutine serves; else does nothing."""
    call = _current.get()
    if call is not None:
        call.notes.update(values)


class Stage(Protocol):
    """Something that sees every call begin and end."""

    def begin(self, call: Call) -> None:
        """Before the request is parsed.

        Raises:
            ForetellError: the call is refused; neither this stage nor the following see its end.
        """

    def end(self, call: Call) -> None:
        """After the method: `code`, `reason`, `request` and `response` are set. Must not raise."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Takes each call through the stages and gives each failed one a status with one ErrorInfo.

    grpc.aio answers a request that it cannot parse with UNKNOWN and leaks the text of any
    exception. So requests are parsed here: malformed ones get INVALID_ARGUMENT. A ForetellError
    becomes its status; anything else is a bug: INTERNAL, with a stack trace in the log and none of
    its text on the wire.

    Args:
        stages: the first sees a call first, and its end last.
    """

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self._stages = tuple(stages)
        self._handlers: dict[str, Handler | None] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, wrapped once; unknown methods stay unknown."""
        method = handler_call_details.method
        found = self._handlers.get(method)
        if found is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            found = self._handlers[method] = self._wrapped(handler, method)
        return found

    def _wrapped(self, handler: Handler, method: str) -> Handler:
        deserialize = cast("Deserializer", handler.request_deserializer)
        served: Any
        if handler.request_streaming:  # reflection alone; a client's stream has no method here
            served = self._stream(cast("Stream", handler.stream_stream), deserialize, method)
            make = grpc.stream_stream_rpc_method_handler
        elif handler.response_streaming:
            served = self._stream(cast("Stream", handler.unary_stream), deserialize, method)
            make = grpc.unary_stream_rpc_method_handler
        else:
            served = self._unary(cast("Unary", handler.unary_unary), deserialize, method)
            make = grpc.unary_unary_rpc_method_handler
        return make(
            served, request_deserializer=None, response_serializer=handler.response_serializer
        )

    def _unary(
        self, handle: Unary, deserialize: Deserializer, method: str
    ) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def served(data: bytes, context: Context) -> Any:
            call = Call(method, context, streaming=False)
            try:
                with self._passing(call):
                    call.request = request = _parse(deserialize, data, method)
                    call.response = response = await handle(request, context)
                    return response
            except ForetellError as error:
                await _abort(context, error)

        return served

    def _stream(
        self, handle: Stream, deserialize: Deserializer, method: str
    ) -> Callable[[Any, Context], AsyncIterator[Any]]:
        async def served(
            data: bytes | AsyncIterator[bytes], context: Context
        ) -> AsyncIterator[Any]:
            call = Call(method, context, True, reads_stream=not isinstance(data, bytes))
            try:
                with self._passing(call):
                    request: Any
                    if isinstance(data, bytes):
                        call.request = request = _parse(deserialize, data, method)
                    else:
                        request = _parse_each(deserialize, data, method)
                    answers = handle(request, context)
                    if inspect.isawaitable(answers):  # the other style: writes to the context
                        await answers
                    else:
                        async for response in answers:
                            yield response
            except ForetellError as error:
                await _abort(context, error)

        return served

    @contextmanager
    def _passing(self, call: Call) -> Iterator[None]:
        """Begins the stages; ends those that began. Whatever is raised becomes a ForetellError."""
        _current.set(call)
        begun: list[Stage] = []
        try:
            for stage in self._stages:
                stage.begin(call)
                begun.append(stage)
            yield
        except ForetellError as error:
            call.code, call.reason = error.code, error.reason
            raise
        except grpc.aio.AbortError:  # the handler has answered already
            call.code = _code_of(call.context)
            raise
        except Exception as error:
            log.error("%s failed", call.method, exc_info=error)
            call.code, call.reason = grpc.StatusCode.INTERNAL, "INTERNAL"
            raise InternalError("internal error; the service's log has it") from None
        except BaseException:  # cancelled, or the stream's reader has left
            stopped_by = call.stopped_by()
            if stopped_by is not None:
                call.code, call.reason = stopped_by.code, stopped_by.reason
                raise stopped_by from None
            call.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            for stage in reversed(begun):
                stage.end(call)


def _code_of(context: Context) -> grpc.StatusCode:
    code = context.code()
    known = [one for one in grpc.StatusCode if code in (one, one.value[0])]
    return known[0] if known else grpc.StatusCode.UNKNOWN


def _parse(deserialize: Deserializer, data: bytes, method: str) -> Any:
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the request is no valid message of {method}", reason="MALFORMED_MESSAGE"
        ) from None


async def _parse_each(
    deserialize: Deserializer, stream: AsyncIterator[bytes], method: str
) -> AsyncIterator[Any]:
    async for data in stream:
        yield _parse(deserialize, data, method)


async def _abort(context: Context, error: ForetellError) -> None:
    await context.abort(
        error.code,
        error.message,
        trailing_metadata=((DETAILS_KEY, error.to_status().SerializeToString()),),
    )

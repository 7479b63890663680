"""Turns exceptions and malformed bytes into google.rpc.Status."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn, cast

import grpc
from google.protobuf.message import DecodeError

from foretell.errors import DETAILS_KEY, ForetellError, InternalError, InvalidArgumentError

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Deserializer = Callable[[bytes], Any]
Unary = Callable[[Any, Context], Awaitable[Any]]
Stream = Callable[[Any, Context], AsyncIterator[Any] | Awaitable[None]]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Gives each failed call a status with one ErrorInfo.

    grpc.aio answers a request that it cannot parse with UNKNOWN and leaks the text of any
    exception. So requests are parsed here: malformed ones get INVALID_ARGUMENT. A ForetellError
    becomes its status and is not logged; anything else is a bug: INTERNAL, with a stack trace in
    the log and none of its text on the wire.
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the method's handler; unknown methods stay unknown."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:  # bidirectional: reflection only
            return handler
        method = handler_call_details.method
        deserialize = cast("Deserializer", handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _guard_stream(cast("Stream", handler.unary_stream), deserialize, method),
                request_deserializer=None,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _guard(cast("Unary", handler.unary_unary), deserialize, method),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )


def _guard(
    handle: Unary, deserialize: Deserializer, method: str
) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def guarded(data: bytes, context: Context) -> Any:
        try:
            return await handle(_parse(deserialize, data, method), context)
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _guard_stream(
    handle: Stream, deserialize: Deserializer, method: str
) -> Callable[[bytes, Context], AsyncIterator[Any]]:
    async def guarded(data: bytes, context: Context) -> AsyncIterator[Any]:
        try:
            answers = handle(_parse(deserialize, data, method), context)
            if inspect.isawaitable(answers):  # the other style: writes to the context itself
                await answers
            else:
                async for response in answers:
                    yield response
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _parse(deserialize: Deserializer, data: bytes, method: str) -> Any:
    try:
        return deserialize(data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the request is no valid message of {method}", reason="MALFORMED_MESSAGE"
        ) from None


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # the handler has answered already
        raise error
    if not isinstance(error, ForetellError):
        log.error("%s failed", method, exc_info=error)
        error = InternalError("internal error; the service's log has it")
    await context.abort(
        error.code,
        error.message,
        trailing_metadata=((DETAILS_KEY, error.to_status().SerializeToString()),),
    )
    raise AssertionError("abort returns never")

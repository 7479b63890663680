"""Connections that are not quite HTTP/2, and calls that are not quite gRPC.

Sent with the library h2, told not to check what goes out; below that plain bytes.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from hypothesis import strategies as st

from bench.fuzzing.messages import Request
from foretell.errors import DETAILS_KEY

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

ANSWER_S = 5.0
"""How long an answer is waited for; a call that is half-sent never gets one."""

HALF_SENT_S = 0.2
"""After this what cannot be answered is hung up."""


NOT_UTF8 = b"/\xd8"
"""A method name at which the server of grpcio 1.85 ends; see serving/server.py."""


class Answer(NamedTuple):
    """What came back for a call."""

    status: int
    """The value of `grpc-status`."""
    details: bool
    """Whether a google.rpc.Status came with it: whether a service gave the answer, not gRPC."""
    message: str


class Conversation(NamedTuple):
    """What is sent over a connection of its own."""

    data: bytes
    complete: bool
    """Whether it is a whole call, which must be answered."""


def conversations(calls: st.SearchStrategy[Request]) -> st.SearchStrategy[Conversation]:
    """Calls with lies in headers and lengths, torn frames, and noise."""
    frames = st.binary(max_size=200).map(lambda some: PREFACE + some)
    return st.one_of(
        _calls(calls),
        _calls(calls),
        _torn(_calls(calls)),
        frames.map(lambda some: Conversation(some, False)),
        st.binary(max_size=200).map(lambda some: Conversation(some, False)),
    )


async def converse(address: str, conversation: Conversation) -> list[Answer]:
    """Sends it and returns what came back.

    Raises:
        OSError: nobody listens.
    """
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    answers: list[Answer] = []
    connection = _connection()
    connection.initiate_connection()
    connection.send_headers(1, _HEADERS, end_stream=True)
    try:
        async with asyncio.timeout(ANSWER_S if conversation.complete else HALF_SENT_S):
            writer.write(conversation.data)
            await writer.drain()
            while some := await reader.read(65_536):
                events = connection.receive_data(some)
                answers += _answers(events)
                if any(isinstance(event, _ENDINGS) for event in events):
                    break
    except (OSError, TimeoutError, h2.exceptions.ProtocolError):
        pass  # hung up, or waits for more, or answers in HTTP/1: all are its right
    finally:
        writer.transport.abort()
    return answers


_ENDINGS = (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)

_HEADERS: Sequence[tuple[str, str]] = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "fuzz"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)

_ODD_HEADERS: Sequence[tuple[str, str]] = (
    (":method", "GET"),
    (":path", "/foretell.embedder.v1.EmbedderService"),
    (":path", "x" * 9_000),
    ("content-type", "application/json"),
    ("content-type", "application/grpc+json"),
    ("te", "gzip"),
    ("grpc-encoding", "gzip"),
    ("grpc-encoding", "bogus"),
    ("grpc-timeout", "1n"),
    ("grpc-timeout", "-5S"),
    ("grpc-timeout", "99999999H"),
    ("authorization", "Bearer " + "y" * 5_000),
    ("grpc-trace-bin", "!!!"),
    ("traceparent", "00-zz-zz-01"),
    ("x-request-id", "\x7f"),
)


@st.composite
def _calls(draw: st.DrawFn, calls: st.SearchStrategy[Request]) -> Conversation:
    call = draw(calls)
    headers: dict[str, str | bytes] = {**dict(_HEADERS), ":path": call.method}
    headers |= dict(draw(st.lists(st.sampled_from(_ODD_HEADERS), max_size=2)))
    if draw(st.integers(0, 99)) == 50:
        headers[":path"] = NOT_UTF8  # seldom: the server begins anew, and others wait
    length = len(call.data)
    lie = draw(st.sampled_from((0, 0, 0, 0, 1, -1, 2**31)))
    flag = draw(st.sampled_from((0, 0, 0, 1, 7)))
    framed = struct.pack(">BI", flag, max(0, length + lie) % 2**32) + call.data
    if draw(st.integers(0, 9)) == 0:
        framed += framed  # a second message, where one is allowed
    connection = _connection()
    connection.initiate_connection()
    connection.send_headers(1, list(headers.items()))
    # What fits into the first window; none waits for the server to open it further.
    body = framed[: connection.local_flow_control_window(1)]
    size = draw(st.sampled_from((1, 5, 100, connection.max_outbound_frame_size)))
    frames = max(1, min(50, len(body) // size + 1))
    size = len(body) // frames + 1
    for begin in range(0, len(body), size):
        connection.send_data(1, body[begin : begin + size])
    ended = draw(st.integers(0, 9)) > 0
    if ended:
        connection.end_stream(1)
    return Conversation(connection.data_to_send(), ended and len(body) == len(framed))


@st.composite
def _torn(draw: st.DrawFn, whole: st.SearchStrategy[Conversation]) -> Conversation:
    data = bytearray(draw(whole).data)
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return Conversation(bytes(data[: draw(st.integers(1, len(data)))]), False)


def _connection() -> h2.connection.H2Connection:
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding="utf-8",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
    )
    return h2.connection.H2Connection(config)


def _answers(events: Iterable[h2.events.Event]) -> list[Answer]:
    heads = (h2.events.ResponseReceived, h2.events.TrailersReceived)
    found = []
    for event in events:
        if isinstance(event, heads):
            headers = {str(name): str(value) for name, value in event.headers or ()}
            if "grpc-status" in headers:
                details = DETAILS_KEY in headers
                message = headers.get("grpc-message", "")
                found.append(Answer(int(headers["grpc-status"]), details, message))
    return found

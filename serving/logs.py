"""Logs: a JSON object a line, or text for a terminal; and a line for each call."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from enum import StrEnum
from typing import Any

import grpc
import orjson
import structlog

from serving.calls import Call

calls: Any = structlog.get_logger()
"""Goes by what `configure` says, but not through the standard library's logging: a fifth of the
time of a line."""


class LogFormat(StrEnum):
    """How lines of the log look."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


TIMESTAMP = structlog.processors.TimeStamper(fmt="iso", utc=True)


def configure(program: str, form: LogFormat) -> None:
    """Everything that is logged goes to the standard error; what is automatic is text where that is
    a terminal."""

    def named(logger: Any, method: str, event: Any) -> Any:
        event["service"] = program
        return event

    begin: list[Any] = [named, TIMESTAMP, structlog.stdlib.add_log_level]
    text = form is LogFormat.TEXT or (form is LogFormat.AUTO and sys.stderr.isatty())
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if text
        else [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(serializer=_json),
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                *begin,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    structlog.configure(
        [*begin, _of_calls, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def _of_calls(logger: Any, method: str, event: Any) -> Any:
    event["logger"] = "call"
    return event


def _json(event: Any, **options: Any) -> str:
    return orjson.dumps(event, default=str).decode()


QUIET = "/grpc.health.v1."
"""Probes say nothing that the next line of another call does not."""


class CallLog:
    """A stage that writes a line for each call that ends: never a text of it, nor a token."""

    def begin(self, call: Call) -> None:
        """Nothing yet."""

    def end(self, call: Call) -> None:
        """Writes the line: a warning where the fault is the service's own."""
        if call.method.startswith(QUIET):
            return
        fields = dict(call.notes)
        fields["method"] = call.method
        fields["code"] = call.code.name
        fields["peer"] = call.peer
        took_s = time.perf_counter() - call.began
        fields["ms"] = round(took_s * 1e3, 3)
        if call.reason:
            fields["reason"] = call.reason
        if call.caller:
            fields["caller"] = call.caller
        if call.deadline_s is not None:
            fields["deadline_left_ms"] = round((call.deadline_s - took_s) * 1e3)
        request_id = getattr(call.request, "request_id", "")
        if request_id:
            fields["request_id"] = request_id
        timings = getattr(call.response, "timings", None)
        if timings is not None:
            fields["queue_ms"] = timings.queue_us / 1e3
        bad = call.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
        with suppress(OSError, ValueError):  # a full disk or a closed file ends no call
            calls.log(logging.WARNING if bad else logging.INFO, "call", **fields)

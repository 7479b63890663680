"""OpenTelemetry traces: a span for each call, in the trace that its caller names, and spans of what
it does. Off unless `otlp_endpoint` is set; only then the extra `tracing` is imported.

Spans tell methods, outcomes and times: never texts, tokens, or ids of users and items.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextvars import Context as ContextVars
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from foretell.errors import FailedPreconditionError
from serving.calls import Call
from serving.logs import QUIET
from serving.settings import ServiceSettings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

EXPORT_S = 3.0
"""How long an absent collector holds up a batch of spans, and the service's end."""

FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
"""Codes that make a server's span an error, by OpenTelemetry's conventions."""


class _Trace(NamedTuple):
    """Where in a trace the work that goes on belongs."""

    stage: Tracing
    context: Context
    """With the span that encloses the work."""
    sampled: bool


_current: ContextVar[_Trace | None] = ContextVar("trace", default=None)

NOTHING = contextlib.nullcontext()


def span(name: str, *, client: bool = False) -> contextlib.AbstractContextManager[None]:
    """A span around the block, if it is part of a traced call; `client`: calls another service."""
    trace = _current.get()
    return NOTHING if trace is None or not trace.sampled else trace.stage.span(trace, name, client)


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata that puts a call made now into the trace: W3C's traceparent."""
    trace = _current.get()
    carrier: dict[str, str] = {}
    if trace is not None:
        trace.stage.w3c.inject(carrier, trace.context)
    return tuple(carrier.items())


def chosen(contexts: Sequence[ContextVars]) -> ContextVars:
    """Of calls that share work the one whose trace has it: the first sampled, else the first."""
    if contexts[0].get(_current) is not None:
        for one in contexts:
            trace = one.get(_current)
            if trace is not None and trace.sampled:
                return one
    return contexts[0]


class Tracing:
    """A stage that gives each call a span; the first stage, so that the others are in it."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation import tracecontext

        self._otel = trace
        self._tracer = provider.get_tracer("foretell")
        self.w3c = tracecontext.TraceContextTextMapPropagator()
        self._spans: dict[Call, Span] = {}

    def begin(self, call: Call) -> None:
        """Begins the span, below the caller's if it names one; notes the trace's id for the log."""
        if call.method.startswith(QUIET):
            return
        metadata: Any = call.context.invocation_metadata() or ()
        context = self.w3c.extract(dict(metadata))
        _, service, method = call.method.split("/")
        about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        kind = self._otel.SpanKind.SERVER
        begun = self._tracer.start_span(call.method[1:], context, kind, about)
        self._spans[call] = begun
        inner = self._otel.set_span_in_context(begun, context)
        _current.set(_Trace(self, inner, begun.is_recording()))
        call.notes["trace_id"] = format(begun.get_span_context().trace_id, "032x")

    def end(self, call: Call) -> None:
        """Ends the span, with what became of the call."""
        ended = self._spans.pop(call, None)
        if ended is not None:
            ended.set_attribute("rpc.grpc.status_code", call.code.value[0])
            if call.code.name in FAULTS:
                ended.set_status(self._otel.StatusCode.ERROR, call.reason)
            ended.end()

    @contextlib.contextmanager
    def span(self, trace: _Trace, name: str, client: bool) -> Iterator[None]:
        """A span around the block, within that of `trace`."""
        kind = self._otel.SpanKind.CLIENT if client else self._otel.SpanKind.INTERNAL
        begun = self._tracer.start_span(name, trace.context, kind)
        inner = self._otel.set_span_in_context(begun, trace.context)
        token = _current.set(trace._replace(context=inner))
        try:
            yield
        except BaseException as error:  # whose message may name what spans never tell
            begun.set_status(self._otel.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            _current.reset(token)
            begun.end()


@contextlib.asynccontextmanager
async def stages(settings: ServiceSettings, program: str) -> AsyncIterator[list[Tracing]]:
    """The stage, if an endpoint is set; at the block's end spans that wait are sent.

    Raises:
        FailedPreconditionError: the extra is not installed.
    """
    if not settings.otlp_endpoint:
        yield []
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk import resources, trace
        from opentelemetry.sdk.trace import export, sampling
    except ImportError:
        raise FailedPreconditionError(
            "otlp_endpoint needs OpenTelemetry: pip install 'foretell-services[tracing]'",
            reason="NO_TRACING",
        ) from None
    provider = trace.TracerProvider(
        sampling.ParentBased(sampling.TraceIdRatioBased(settings.trace_sample_ratio)),
        resources.Resource.create({"service.name": f"foretell-{program}"}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(settings.otlp_endpoint, timeout=EXPORT_S)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    try:
        yield [Tracing(provider)]
    finally:
        await asyncio.to_thread(provider.shutdown)

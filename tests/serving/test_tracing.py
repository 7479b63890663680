"""Traces, at a collector of the test's own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from foretell.errors import FailedPreconditionError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.predictor.v1.prediction_service_pb2_grpc import PredictionServiceStub
from predictor.batching import Batcher
from predictor.settings import PredictorSettings
from serving import tracing
from serving.calls import Call

if TYPE_CHECKING:
    from tests.serving.conftest import Observed

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


async def test_a_call_is_one_trace_through_both_services(observed: Observed) -> None:
    async with grpc.aio.insecure_channel(observed.predictor.address) as channel:
        answer = await PredictionServiceStub(channel).Predict(
            pb.PredictRequest(query=pb.PredictionQuery(user_id="anna")),
            metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),),
        )
    assert [item.item_id for item in answer.prediction.items]

    def complete(spans: list[tuple[str, Span]]) -> bool:
        names = [one.name for _, one in spans]
        return any(one.endswith("/Predict") for one in names) and "search" in names

    # Each call of the embedder has a span on both sides.
    spans = observed.collector.of(TRACE, lambda spans: complete(spans) and _paired(spans))
    ids = {one.span_id for _, one in spans}
    (outermost,) = [one for _, one in spans if one.parent_span_id not in ids]
    assert outermost.parent_span_id.hex() == CALLER
    assert outermost.name == "foretell.predictor.v1.PredictionService/Predict"
    kinds = {(who, one.kind) for who, one in spans}
    assert kinds >= {
        ("foretell-predictor", Span.SPAN_KIND_SERVER),
        ("foretell-predictor", Span.SPAN_KIND_CLIENT),
        ("foretell-embedder", Span.SPAN_KIND_SERVER),
        ("foretell-embedder", Span.SPAN_KIND_INTERNAL),
    }
    names = {one.span_id: one.name for _, one in spans}
    inside = {names[one.parent_span_id] for _, one in spans if one.name == "search"}
    assert inside == {"foretell.embedder.v1.EmbedderService/Search"}
    lines = [json.loads(line) for line in observed.predictor_log.read_text().splitlines()]
    assert TRACE in [line.get("trace_id") for line in lines]
    for secret in (b"anna", b"green tea", b"tea-1", b"a cup"):
        assert secret not in observed.collector.raw


def _paired(spans: list[tuple[str, Span]]) -> bool:
    calls = {one.span_id for _, one in spans if one.kind == Span.SPAN_KIND_CLIENT}
    served = {one.parent_span_id for _, one in spans if one.kind == Span.SPAN_KIND_SERVER}
    return bool(calls) and calls <= served


class Context:
    """Of a call that names a trace, sampled or not."""

    def __init__(self, trace: str, sampled: bool) -> None:
        self._metadata = (("traceparent", f"00-{trace}-{CALLER}-{int(sampled):02}"),)

    def invocation_metadata(self) -> Any:
        return self._metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None


async def test_what_calls_share_is_in_the_trace_of_one_that_is_sampled() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(ParentBased(TraceIdRatioBased(1)), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    stage = tracing.Tracing(provider)
    told: list[tuple[tuple[str, str], ...]] = []

    async def run(elements: Sequence[str]) -> list[str]:
        with tracing.span("shared"):
            told.append(tracing.outgoing())
        return list(elements)

    batcher: Batcher[str, str] = Batcher(cast("Any", run), 10)

    async def serve(trace: str, sampled: bool) -> None:
        call = Call("/a.v1.B/Do", cast("Any", Context(trace, sampled)), streaming=False)
        stage.begin(call)
        await batcher.submit([trace])
        stage.end(call)

    one, two, three = ("a" * 32, "b" * 32, "c" * 32)
    await asyncio.gather(serve(one, False), serve(two, True), serve(three, True))
    found = {(span.name, format(span.context.trace_id, "032x")) for span in
             exporter.get_finished_spans() if span.context}  # fmt: skip
    assert found == {("a.v1.B/Do", two), ("a.v1.B/Do", three), ("shared", two)}
    await serve(one, False)
    # One that is not sampled says so, else the next service would decide anew.
    assert [dict(metadata)["traceparent"].split("-")[1::2] for metadata in told] == [
        [two, "01"],
        [one, "00"],
    ]


async def test_an_absent_collector_delays_neither_calls_nor_the_end_for_long() -> None:
    settings = PredictorSettings(otlp_endpoint="http://127.0.0.1:1")
    async with (
        asyncio.timeout(3 * tracing.EXPORT_S),
        tracing.stages(settings, "predictor") as found,
    ):
        (stage,) = found
        call = Call("/a.v1.B/Do", cast("Any", Context("a" * 32, True)), streaming=False)
        stage.begin(call)
        stage.end(call)


async def test_an_endpoint_without_the_packages_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    settings = PredictorSettings(otlp_endpoint="http://127.0.0.1:1")
    with pytest.raises(FailedPreconditionError, match=r"foretell-services\[tracing\]"):
        async with tracing.stages(settings, "predictor"):
            pass


def test_without_a_trace_there_is_nothing_to_do() -> None:
    assert tracing.span("search") is tracing.NOTHING
    assert tracing.outgoing() == ()

"""Traces, at a collector of the test's own."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_rpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

import foretell
from foretell.errors import FailedPreconditionError
from foretell.predictor.v1 import prediction_service_pb2 as pb
from foretell.predictor.v1.prediction_service_pb2_grpc import PredictionServiceStub
from predictor.batching import Batcher
from predictor.settings import PredictorSettings
from serving import tracing
from serving.calls import Call
from serving.process import ServiceProcess, started

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"


@dataclass
class Collector(collector_rpc.TraceServiceServicer):
    """What an OpenTelemetry collector is sent."""

    address: str = ""
    spans: list[tuple[str, Span]] = field(default_factory=list)
    """By the name of the service."""
    raw: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: collector_pb.ExportTraceServiceRequest, context: Any) -> Any:
        with self._lock:
            self.raw += request.SerializeToString()
            for one in request.resource_spans:
                about = {pair.key: pair.value.string_value for pair in one.resource.attributes}
                for scope in one.scope_spans:
                    self.spans += [(about["service.name"], span) for span in scope.spans]
        return collector_pb.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        made = Collector()
        collector_rpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
        made.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield made
        server.stop(None).wait()


async def test_a_call_is_one_trace_through_both_services(
    start_embedder: Callable[..., ServiceProcess], tmp_path: Path, collector: Collector
) -> None:
    traced = ["--otlp-endpoint", collector.address]
    embedder = start_embedder("--data-dir", str(tmp_path / "e"), *traced)
    log = tmp_path / "predictor.log"
    flags = ["--port", "0", "--data-dir", str(tmp_path / "p"), "--embedder", embedder.address]
    with started("predictor", [*flags, *traced], log=log) as predictor:
        async with foretell.AsyncClient(embedder.address, predictor.address) as client:
            await client.upsert_items(
                [foretell.Item("tea-1", "green tea"), foretell.Item("mug-1", "large mug")]
            )
            await client.ingest_events([foretell.Event("anna", "buy", item_id="tea-1", text="mug")])
        async with grpc.aio.insecure_channel(predictor.address) as channel:
            answer = await PredictionServiceStub(channel).Predict(
                pb.PredictRequest(query=pb.PredictionQuery(user_id="anna")),
                metadata=(("traceparent", f"00-{TRACE}-{CALLER}-01"),),
            )
    assert [item.item_id for item in answer.prediction.items]
    embedder.stop()  # each sends what it has at its end

    spans = [(who, one) for who, one in collector.spans if one.trace_id.hex() == TRACE]
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
    (searched,) = [one for _, one in spans if one.name.endswith("EmbedderService/Search")]
    assert names[searched.parent_span_id] == "embedder"
    assert [names[one.parent_span_id] for _, one in spans if one.name == "search"] == [
        searched.name
    ]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = [each for each in lines if each.get("method", "").endswith("/Predict")]
    assert line["trace_id"] == TRACE
    for secret in (b"anna", b"green tea", b"tea-1", b"mug"):
        assert secret not in collector.raw


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
        await batcher.submit(trace)
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

"""Both services, seen from outside: pages of metrics, logs, traces."""

from __future__ import annotations

import contextlib
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as collector_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as collector_rpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

import foretell
from serving.process import ServiceProcess, started


@dataclass
class Collector(collector_rpc.TraceServiceServicer):
    """What an OpenTelemetry collector is sent."""

    spans: list[tuple[str, Span]] = field(default_factory=list)
    """By the name of the service."""
    raw: bytes = b""
    came: threading.Condition = field(default_factory=threading.Condition)

    def Export(self, request: collector_pb.ExportTraceServiceRequest, context: Any) -> Any:
        with self.came:
            self.raw += request.SerializeToString()
            for one in request.resource_spans:
                about = {pair.key: pair.value.string_value for pair in one.resource.attributes}
                for scope in one.scope_spans:
                    self.spans += [(about["service.name"], span) for span in scope.spans]
            self.came.notify_all()
        return collector_pb.ExportTraceServiceResponse()

    def of(self, trace_id: str, complete: Callable[[list[tuple[str, Span]]], bool]) -> Any:
        """The spans of a trace, once they are complete."""

        def found() -> list[tuple[str, Span]]:
            return [(who, one) for who, one in self.spans if one.trace_id.hex() == trace_id]

        with self.came:
            assert self.came.wait_for(lambda: complete(found()), 30), found()
            return found()


@dataclass
class Observed:
    """Both services, which answer and are watched."""

    embedder: ServiceProcess
    predictor: ServiceProcess
    ports: tuple[int, int]
    """Of their pages of metrics."""
    predictor_log: Path
    collector: Collector

    def page(self, port: int) -> str:
        """What Prometheus reads."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
            text: str = page.read().decode()
            return text

    def metrics(self) -> dict[str, float]:
        """All that both say."""
        lines = [line for port in self.ports for line in self.page(port).splitlines()]
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@pytest.fixture(scope="session")
def observed(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Observed]:
    """Both services after an item, an event and a search; tests count what they do themselves."""
    folder = tmp_path_factory.mktemp("observed")
    with contextlib.ExitStack() as stack:
        server = grpc.server(stack.enter_context(ThreadPoolExecutor(4)))
        collector = Collector()
        collector_rpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds, in which a span is sent
        ports = free_port(), free_port()

        def start(name: str, port: int, *flags: str) -> ServiceProcess:
            every = ["--port", "0", "--data-dir", str(folder / name), "--otlp-endpoint", endpoint]
            every += ["--metrics-port", str(port), *flags]
            return stack.enter_context(started(name, every, log=folder / f"{name}.log"))

        embedder = start("embedder", ports[0])
        # A prediction on a busy machine must not fall back because of its haste.
        patient = ("--embedder-deadline-ms", "30000")
        predictor = start("predictor", ports[1], "--embedder", embedder.address, *patient)
        with foretell.Client(embedder.address, predictor.address) as client:
            client.upsert_items(
                [foretell.Item("tea-1", "green tea"), foretell.Item("mug-1", "large mug")]
            )
            client.ingest_events([foretell.Event("anna", "buy", item_id="tea-1", text="a cup")])
            client.search(texts=["tea"])
        yield Observed(embedder, predictor, ports, folder / "predictor.log", collector)

"""Prometheus metrics: of calls, by the names that go-grpc-prometheus gave them; of batches; of a
service's state."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.calls import Call
from serving.settings import ServiceSettings

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

CODES = {code: "".join(part.title() for part in code.name.split("_")) for code in grpc.StatusCode}
"""As gRPC for Go spells them, which dashboards expect: `DeadlineExceeded`."""
CODES[grpc.StatusCode.OK] = "OK"


class CallMetrics:
    """A stage that counts calls and measures their seconds, refused ones too if it comes first.

    Args:
        registry: where the metrics are collected.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._started = Counter(
            "grpc_server_started_total", "Calls that began.", labels, registry=registry
        )
        self._handled = Counter(
            "grpc_server_handled_total",
            "Calls that ended, by how.",
            (*labels, "grpc_code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds from a call's arrival to its end.",
            labels,
            buckets=BUCKETS_S,
            registry=registry,
        )
        # Finding a metric's child by its labels takes longer than counting.
        self._of_method: dict[str, tuple[Counter, Histogram]] = {}
        self._of_code: dict[tuple[str, grpc.StatusCode], Counter] = {}

    def begin(self, call: Call) -> None:
        """Counts the call as begun."""
        found = self._of_method.get(call.method)
        if found is None:
            labels = _labels(call)
            found = (self._started.labels(*labels), self._seconds.labels(*labels))
            self._of_method[call.method] = found
        found[0].inc()

    def end(self, call: Call) -> None:
        """Counts the call as ended and observes its seconds."""
        self._of_method[call.method][1].observe(time.perf_counter() - call.began)
        key = (call.method, call.code)
        handled = self._of_code.get(key)
        if handled is None:
            handled = self._handled.labels(*_labels(call), CODES[call.code])
            self._of_code[key] = handled
        handled.inc()


def _labels(call: Call) -> tuple[str, str, str]:
    _, service, method = call.method.split("/")
    kind = "bidi_stream" if call.reads_stream else "server_stream" if call.streaming else "unary"
    return (kind, service, method)


SIZES = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536)

Observe = Callable[..., None]
"""(seconds, *sizes): of a batch that is done."""


def unobserved(seconds: float, *sizes: int) -> None:
    """For a batcher that nobody watches."""


class Batches:
    """Histograms of work that several calls share: its seconds, and how much of it was done at
    once. Implements `Observe`; any thread may call it.

    Args:
        registry: where the metrics are collected.
        name: of the metrics, after `foretell_`.
        text: what a batch is.
        units: what its sizes count.
    """

    def __init__(self, registry: CollectorRegistry, name: str, text: str, *units: str) -> None:
        self._seconds = Histogram(
            f"foretell_{name}_seconds", f"Seconds of {text}.", buckets=BUCKETS_S, registry=registry
        )
        self._sizes = [
            Histogram(
                f"foretell_{name}_batch_{unit}",
                f"{unit.title()} of {text}.",
                buckets=SIZES,
                registry=registry,
            )
            for unit in units
        ]

    def __call__(self, seconds: float, *sizes: int) -> None:
        """A batch is done."""
        self._seconds.observe(seconds)
        for histogram, size in zip(self._sizes, sizes, strict=True):
            histogram.observe(size)


class Reading(NamedTuple):
    """A number of a service's state, read when somebody looks."""

    name: str
    text: str
    read: Callable[[], float | dict[str, float]]
    """The number, or one by the value of the label."""
    label: str = ""
    counts: bool = False
    """Whether it only grows; its name then ends in `_total`."""


class State(Collector):
    """Readings as metrics: what nobody asks for costs nothing.

    They are read in one thread: the page has a new one for each request, and each thread that
    reads a database has a connection to it.
    """

    def __init__(self, readings: Iterable[Reading]) -> None:
        self._readings = tuple(readings)
        self._thread = ThreadPoolExecutor(1, "metrics")

    def collect(self) -> Iterator[Metric]:
        """Reads all of them."""
        values = self._thread.submit(lambda: [one.read() for one in self._readings]).result()
        for one, value in zip(self._readings, values, strict=True):
            kind = CounterMetricFamily if one.counts else GaugeMetricFamily
            family = kind(one.name, one.text, labels=[one.label] if one.label else [])
            for label, number in value.items() if isinstance(value, dict) else [("", value)]:
                family.add_metric([label] if one.label else [], number)
            yield family


@contextlib.asynccontextmanager
async def metrics_page(
    settings: ServiceSettings, registry: CollectorRegistry
) -> AsyncIterator[None]:
    """Answers /metrics in a thread of its own while the block runs, if a port is set.

    Raises:
        OSError: the port is taken.
    """
    if not settings.metrics_port:
        yield
        return
    page, thread = start_http_server(settings.metrics_port, settings.host, registry)
    try:
        yield
    finally:
        page.shutdown()
        page.server_close()
        thread.join()

"""`foretell top` over pages of metrics like the services'."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from rich.console import Console

from foretell import cli, top

CALL = {"grpc_type": "unary", "grpc_service": "foretell.predictor.v1.PredictionService"}
PREDICT = {**CALL, "grpc_method": "Predict"}

Serve = Callable[[CollectorRegistry], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(registry: CollectorRegistry) -> str:
            page, thread = start_http_server(0, "127.0.0.1", registry)
            stack.callback(thread.join)
            stack.callback(page.server_close)
            stack.callback(page.shutdown)
            return f"127.0.0.1:{page.server_port}"

        yield start


class Predictor:
    """A predictor's metrics, as far as they are tested here."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = list(PREDICT)
        self.started = Counter("grpc_server_started", "-", labels, registry=registry)
        self.handled = Counter(
            "grpc_server_handled", "-", [*labels, "grpc_code"], registry=registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds",
            "-",
            labels,
            buckets=(0.01, 0.02, 0.04),
            registry=registry,
        )
        self.predictions = Counter(
            "foretell_predictions", "-", ["fallback_reason"], registry=registry
        )
        self.available = Gauge("foretell_embedder_available", "-", registry=registry)
        self.available.set(1)
        Gauge("foretell_events", "-", registry=registry).set(70)
        model = Gauge("foretell_model_info", "-", ["version"], registry=registry)
        model.labels("spring").set(1)

    def call(self, seconds: float, code: str = "OK", reason: str = "none") -> None:
        self.started.labels(**PREDICT).inc()
        self.handled.labels(**PREDICT, grpc_code=code).inc()
        self.seconds.labels(**PREDICT).observe(seconds)
        self.predictions.labels(reason).inc()


class Embedder:
    """An embedder's, likewise."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.encoded = Counter("foretell_texts_encoded", "-", registry=registry)
        self.cached = Counter("foretell_texts_cached", "-", registry=registry)
        Gauge("foretell_queue_texts", "-", registry=registry).set(6)
        items = Gauge("foretell_collection_items", "-", ["collection"], registry=registry)
        items.labels("items").set(1234)


def between(
    pages: list[str], change: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The figures of an interval of 10 s in which the change was."""
    now = iter((100.0, 110.0))
    monkeypatch.setattr(top, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=change))
    return next(top.watch(pages, 0))


def test_calls_of_all_processes_in_the_interval(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = Predictor(), Predictor()
    for _ in range(1_000):
        one.call(5.0)  # before the first look: in no figure

    def change(_: float) -> None:
        for _ in range(90):
            one.call(0.015)
        for _ in range(10):
            other.call(0.03, "Unavailable", "embedder_unavailable")
        other.started.labels(**PREDICT).inc(3)
        other.available.set(0)

    figures = between([serve(one.registry), serve(other.registry)], change, monkeypatch)
    (call,) = figures["calls"]
    assert call.pop("p50 ms") == pytest.approx(10 + 10 * 50 / 90)  # 90 between 10 and 20 ms
    assert call.pop("p99 ms") == pytest.approx(20 + 20 * 9 / 10)  # 10 between 20 and 40 ms
    assert (call.pop("service"), call.pop("method")) == ("predictor", "Predict")
    assert call == {"calls/s": 10, "errors/s": 1, "in flight": 3}
    state = figures["predictor"]
    assert (state["processes"], state["events"], state["model"]) == (2, 70, "spring")
    assert state["predictions/s"] == {"none": 9, "embedder_unavailable": 1}
    assert state["embedder available"] == 0.5


def test_texts_in_the_interval(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder()
    embedder.encoded.inc(1_000)

    def change(_: float) -> None:
        embedder.encoded.inc(25)
        embedder.cached.inc(75)

    state = between([serve(embedder.registry)], change, monkeypatch)["embedder"]
    assert (state["texts encoded/s"], state["cache hits"]) == (2.5, 0.75)
    assert (state["texts waiting"], state["items"]) == (6, {"items": 1234})


def histogram(**buckets: float) -> top.Page:
    return top.Page({("h_bucket", frozenset({("le", le)})): n for le, n in buckets.items()})


def test_latencies_above_the_last_bucket_are_at_least_that() -> None:
    page = histogram(**{"0.5": 1.0, "+Inf": 10.0})
    assert top.Period(top.Page(), page, 1).quantile_ms(0.99, "h") == 500
    assert top.Period(page, page, 1).quantile_ms(0.99, "h") is None


def test_a_process_that_began_anew_has_no_negative_rates() -> None:
    before, after = histogram(**{"+Inf": 500.0}), histogram(**{"+Inf": 20.0})
    assert top.Period(before, after, 1).rate("h_bucket") == 0


def test_once(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = Predictor()
    predictor.call(0.015)
    pages = [serve(Embedder().registry), serve(predictor.registry)]
    assert cli.main(["top", *pages, "--once", "--interval", "0.05"]) == 0
    out = capsys.readouterr().out
    for shown in ("Predict", "spring", "items 1,234", "texts waiting"):
        assert shown in out
    assert cli.main(["top", *pages, "127.0.0.1:1", "--json", "--interval", "0.05"]) == 1
    figures = json.loads(capsys.readouterr().out)
    assert figures["absent"] == ["127.0.0.1:1"]
    assert figures["embedder"]["texts waiting"] == 6


def test_without_any_page_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "127.0.0.1:1", "--once"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "foretell: no page of metrics at 127.0.0.1:1\n")


def test_errors_and_absent_pages_stand_out() -> None:
    call = {
        "service": "predictor",
        "method": "Rank",
        "calls/s": 1.0,
        "errors/s": 0.5,
        "p50 ms": None,
    }
    figures = {"absent": ["here"], "calls": [call], "embedder": {}, "predictor": {}}
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100, color_system="standard")
    console.print(top.picture(figures))
    assert "\x1b[31mno page at here" in terminal.getvalue()
    assert "\x1b[31mpredictor" in terminal.getvalue()

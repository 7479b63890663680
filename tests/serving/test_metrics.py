"""The metrics of calls."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
from prometheus_client import CollectorRegistry

import foretell
from serving.calls import Call
from serving.metrics import CallMetrics
from serving.process import ServiceProcess, started

LABELS = {"grpc_type": "unary", "grpc_service": "a.v1.B", "grpc_method": "Do"}


class Context:
    """Of a call that nobody sent."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> None:
        return None


def test_calls_are_counted_by_method_and_code_and_measured() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    for code in (grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED):
        call = Call("/a.v1.B/Do", cast("Any", Context()), streaming=False)
        metrics.begin(call)
        call.code = code
        metrics.end(call)
    metrics.begin(Call("/a.v1.B/Do", cast("Any", Context()), streaming=False))

    assert registry.get_sample_value("grpc_server_started_total", LABELS) == 4
    for code_name, count in (("OK", 2), ("DeadlineExceeded", 1)):
        labels = {**LABELS, "grpc_code": code_name}
        assert registry.get_sample_value("grpc_server_handled_total", labels) == count
    assert registry.get_sample_value("grpc_server_handling_seconds_count", LABELS) == 3


async def test_both_services_tell_their_state(
    start_embedder: Callable[..., ServiceProcess], tmp_path: Path, free_ports: tuple[int, int]
) -> None:
    one, two = free_ports
    embedder = start_embedder("--data-dir", str(tmp_path / "e"), "--metrics-port", str(one))
    flags = ["--port", "0", "--data-dir", str(tmp_path / "p"), "--embedder", embedder.address]
    log = tmp_path / "predictor.log"
    with started("predictor", [*flags, "--metrics-port", str(two)], log=log) as predictor:
        async with foretell.AsyncClient(embedder.address, predictor.address) as client:
            await client.upsert_items([foretell.Item("a", "green tea")])
            await client.ingest_events([foretell.Event("anna", "buy", item_id="a", text="mug")])
        found = _page(one) | _page(two)
    assert found["foretell_texts_encoded_total"] >= 1
    assert found['foretell_collection_items{collection="items"}'] == 1
    assert found["foretell_events"] == found["foretell_users"] == 1
    assert found["foretell_embedder_available"] == 1
    handled = "grpc_server_handled_total{"
    assert [v for k, v in found.items() if k.startswith(handled) and "IngestEvents" in k] == [1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    call = next(line for line in lines if line.get("method", "").endswith("IngestEvents"))
    assert (call["code"], call["service"]) == ("OK", "predictor")
    assert call["request_id"]
    assert call["ms"] > 0
    assert "mug" not in log.read_text()
    assert "anna" not in log.read_text()


def _page(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}

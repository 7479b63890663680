"""The metrics of calls."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from prometheus_client import CollectorRegistry

import foretell
from serving.calls import Call
from serving.metrics import CallMetrics

if TYPE_CHECKING:
    from tests.serving.conftest import Observed

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


def test_both_services_tell_their_state(observed: Observed) -> None:
    found = observed.metrics()
    assert found["foretell_texts_encoded_total"] >= 1
    assert found['foretell_collection_items{collection="items"}'] == 2
    assert found['foretell_index_lag_vectors{collection="items"}'] == 0
    assert found["foretell_events"] == found["foretell_users"] == 1
    assert found["foretell_embedder_available"] == 1
    handled = "grpc_server_handled_total{"
    assert [v for k, v in found.items() if k.startswith(handled) and "IngestEvents" in k] == [1]
    lines = [json.loads(line) for line in observed.predictor_log.read_text().splitlines()]
    call = next(line for line in lines if line.get("method", "").endswith("IngestEvents"))
    assert (call["code"], call["service"]) == ("OK", "predictor")
    assert call["request_id"]
    assert call["batch"] == 1
    assert call["ms"] > 0
    assert "a cup" not in observed.predictor_log.read_text()
    assert "anna" not in observed.predictor_log.read_text()


def test_batches_are_measured(observed: Observed) -> None:
    found = observed.metrics()
    passes = found["foretell_encode_seconds_count"]
    assert found["foretell_encode_batch_texts_count"] == passes >= 1
    assert found["foretell_encode_batch_texts_sum"] == found["foretell_texts_encoded_total"]
    assert found["foretell_encode_batch_tokens_sum"] > found["foretell_encode_batch_texts_sum"]
    assert found["foretell_search_batch_queries_sum"] >= found["foretell_search_seconds_count"] >= 1
    assert found["foretell_search_seconds_sum"] > 0


def test_predictions_are_counted_by_their_fallback(observed: Observed) -> None:
    name = 'foretell_predictions_total{fallback_reason="no_model"}'
    before = observed.metrics()[name]
    with foretell.Client(observed.embedder.address, observed.predictor.address) as client:
        client.predict("anna", k=1)
    assert observed.metrics()[name] == before + 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_page_leaves_no_file_open(observed: Observed) -> None:
    def opened() -> int:
        fds = Path(f"/proc/{observed.predictor.process.pid}/fd").iterdir()
        return sum("events.db" in str(each.readlink()) for each in fds)

    observed.page(observed.ports[1])
    before = opened()
    assert before
    for _ in range(5):
        observed.page(observed.ports[1])
    assert opened() == before


def test_reflection_is_a_stream_both_ways(observed: Observed) -> None:
    from grpc_reflection.v1alpha import reflection_pb2 as pb
    from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

    with grpc.insecure_channel(observed.predictor.address) as channel:
        asked = iter([pb.ServerReflectionRequest(list_services="")])
        assert list(ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=30))
    kinds = {
        re.search('grpc_type="([a-z_]+)"', name)[1]  # type: ignore[index]
        for name in observed.metrics()
        if name.startswith("grpc_server_started_total") and "Reflection" in name
    }
    assert kinds == {"bidi_stream"}

"""The metrics of calls."""

from __future__ import annotations

from typing import Any, cast

import grpc
from prometheus_client import CollectorRegistry

from serving.calls import Call
from serving.metrics import CallMetrics

LABELS = {"grpc_type": "unary", "grpc_service": "a.v1.B", "grpc_method": "Do"}


def test_calls_are_counted_by_method_and_code_and_measured() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    for code in (grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED):
        call = Call("/a.v1.B/Do", cast("Any", None), streaming=False)
        metrics.begin(call)
        call.code = code
        metrics.end(call)
    metrics.begin(Call("/a.v1.B/Do", cast("Any", None), streaming=False))

    assert registry.get_sample_value("grpc_server_started_total", LABELS) == 4
    for code_name, count in (("OK", 2), ("DeadlineExceeded", 1)):
        labels = {**LABELS, "grpc_code": code_name}
        assert registry.get_sample_value("grpc_server_handled_total", labels) == count
    assert registry.get_sample_value("grpc_server_handling_seconds_count", LABELS) == 3

"""What watches the services: dashboard, alerts, runbook; and a real Prometheus that reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from tests.serving.conftest import Observed

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "foretell.json"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()

NAME = re.compile(r"\b(?:foretell|grpc_server|process)_[a-z_]+(?<!_)")


def alerts() -> dict[str, str]:
    """Name to expression."""
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> list[str]:
    """Of the dashboard."""
    return [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def test_every_metric_that_is_named_exists(observed: Observed) -> None:
    known: set[str] = set()
    for port in observed.ports:
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", observed.page(port), re.MULTILINE):
            ends = ("", "_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            known.update(name + end for end in ends)
    texts = {
        "dashboard": "\n".join(queries()),
        "alerts": "\n".join(alerts().values()),
        "runbook": RUNBOOK,
        "operations": OPERATIONS,
    }
    for where, text in texts.items():
        named = set(NAME.findall(text))
        assert named, where
        assert not named - known, where


def test_every_metric_of_our_own_is_on_the_dashboard_and_explained(observed: Observed) -> None:
    pages = "".join(map(observed.page, observed.ports))
    own = re.findall(r"^# TYPE (foretell_\S+) (?:gauge|counter|histogram)$", pages, re.MULTILINE)
    own = [name for name in own if not name.endswith("_created")]
    shown = "\n".join(queries())
    assert [name for name in own if name not in shown] == []
    assert [name for name in own if name not in OPERATIONS] == []


def test_every_alert_has_its_entry_in_the_runbook() -> None:
    assert re.findall(r"^## (.*)$", RUNBOOK, re.MULTILINE) == list(alerts())


def test_panels_are_whole() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.fixture
def prometheus(observed: Observed, tmp_path: Path, free_ports: tuple[int, int]) -> Iterator[str]:
    """A real one with the configuration as it stands, but for addresses and intervals."""
    folder, port = tmp_path, free_ports[0]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job, page in zip(config["scrape_configs"], observed.ports, strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{page}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}/api/v1/{path}", timeout=10) as answer:
        return json.load(answer)["data"]


def query(address: str, expression: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(
        address, "query?" + urllib.parse.urlencode({"query": expression})
    )["result"]
    return found


def eventually(look: Any) -> Any:
    """What `look` gives, once that is something."""
    deadline = time.monotonic() + 30
    while True:
        try:
            found = look()
        except OSError:  # it starts
            found = None
        if found:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.external
@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: make deps-external")
def test_prometheus_accepts_its_configuration() -> None:
    command = ["promtool", "check", "config", str(PROMETHEUS / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


OK = 'grpc_server_handled_total{job="predictor", grpc_method="Predict", grpc_code="OK"}'
BAD = 'grpc_server_handled_total{job="predictor", grpc_method="Predict", grpc_code="%s"}'
UNDER = 'grpc_server_handling_seconds_bucket{grpc_method="Predict", le="%s"}'
INDEX = '{job="embedder", instance="e:1", collection="items"}'
FDS = '{job="embedder", instance="e:1"}'
PREDICTIONS = 'foretell_predictions_total{fallback_reason="%s"}'

TROUBLE: dict[str, dict[str, str]] = {
    "ForetellDown": {'up{job="embedder"}': "0x60"},
    "ForetellRestarts": {'process_start_time_seconds{job="predictor"}': "1+30x60"},
    "ForetellInternalErrors": {BAD % "Internal": "0+1x60"},
    "ForetellRefusing": {OK: "0+97x60", BAD % "ResourceExhausted": "0+3x60"},
    "ForetellDeadlinesMissed": {OK: "0+97x60", BAD % "DeadlineExceeded": "0+3x60"},
    "ForetellSlowPredictions": {
        UNDER % "0.25": "0+90x60",
        UNDER % "0.5": "0+100x60",
        UNDER % "+Inf": "0+100x60",
    },
    "ForetellEmbedderUnavailable": {"foretell_embedder_available": "0x60"},
    "ForetellFallbacks": {PREDICTIONS % "none": "0+9x60", PREDICTIONS % "no_model": "0+1x60"},
    "ForetellNoModel": {'foretell_events{instance="p:1"}': "5x60"},
    "ForetellModelVersionsDiffer": {
        'foretell_model_info{version="a", instance="p:1"}': "1x60",
        'foretell_model_info{version="b", instance="p:2"}': "1x60",
    },
    "ForetellTextsWaiting": {"foretell_text_lag_seconds": "0+60x60"},
    "ForetellIndexLags": {
        f"foretell_index_lag_vectors{INDEX}": "30000x60",
        f"foretell_collection_items{INDEX}": "100000x60",
    },
    "ForetellFilesRunOut": {f"process_open_fds{FDS}": "900x60", f"process_max_fds{FDS}": "1024x60"},
}
"""What each alert is for: values of a minute each, by series."""

HEALTHY = {
    'up{job="embedder"}': "1x60",
    'process_start_time_seconds{job="predictor"}': "1x60",
    OK: "0+999x60",
    BAD % "ResourceExhausted": "0+1x60",
    BAD % "DeadlineExceeded": "0+1x60",
    BAD % "Internal": "7x60",
    UNDER % "0.25": "0+999x60",
    UNDER % "+Inf": "0+1000x60",
    "foretell_embedder_available": "1x60",
    PREDICTIONS % "none": "0+99x60",
    PREDICTIONS % "no_model": "0+1x60",
    'foretell_events{instance="p:1"}': "5x60",
    'foretell_model_info{version="a", instance="p:1"}': "1x60",
    "foretell_text_lag_seconds": "20x60",
    f"foretell_index_lag_vectors{INDEX}": "1000x60",
    f"foretell_collection_items{INDEX}": "100000x60",
    f"process_open_fds{FDS}": "30x60",
    f"process_max_fds{FDS}": "1024x60",
}


@pytest.mark.external
@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: make deps-external")
def test_each_alert_fires_in_its_trouble_and_in_health_none(tmp_path: Path) -> None:
    assert list(TROUBLE) == list(alerts())
    loud = '{alertstate="firing"}'

    def case(values: dict[str, str], firing: str) -> dict[str, Any]:
        series = [{"series": name, "values": value} for name, value in values.items()]
        expected = [{"labels": f'{{alertname="{firing}"}}', "value": 1}] if firing else []
        asked = {"expr": f"count by (alertname) (ALERTS{loud})", "eval_time": "59m"}
        return {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{**asked, "exp_samples": expected}],
        }

    cases = [case(values, name) for name, values in TROUBLE.items()] + [case(HEALTHY, "")]
    rules = {"rule_files": [str(PROMETHEUS / "alerts.yml")], "tests": cases}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(rules))
    command = ["promtool", "test", "rules", str(tmp_path / "tests.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.external
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: make deps-external")
def test_prometheus_reads_both_services_and_evaluates_alerts(prometheus: str) -> None:
    up = eventually(lambda: _both(query(prometheus, "up == 1")))
    assert {one["metric"]["job"] for one in up} == {"embedder", "predictor"}
    texts = query(prometheus, "foretell_texts_encoded_total")
    assert float(texts[0]["value"][1]) >= 1
    for expression in queries():
        query(prometheus, expression.replace("$__rate_interval", "1m"))
    # There are events and no model is active: this alert's time runs, no other's.
    rules = eventually(lambda: _evaluated(ask(prometheus, "rules")["groups"][0]["rules"]))
    assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(alerts(), "ok")
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == ["ForetellNoModel"]


def _both(up: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    return up if len(up) == 2 else None


def _evaluated(rules: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    pending = any(rule["state"] == "pending" for rule in rules)
    return rules if pending and all(rule["health"] == "ok" for rule in rules) else None

"""`foretell load-test` with its processes, against the fake of both services."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import foretell
from foretell import cli
from foretell.load_test.run import Generators, LiveLine
from foretell.load_test.schedule import Arrivals
from foretell.load_test.worker import Plan, Progress
from foretell.load_test.workload import Workload
from foretell.testing import FakeServices

Run = Callable[..., tuple[int, str, str]]

SHORT = ("--rate", "60", "--seconds", "0.5", "--warm-up", "0.2", "--users", "5", "--history", "2")


@pytest.fixture
def fakes() -> Iterator[FakeServices]:
    with FakeServices() as services:
        with foretell.Client(services.embedder_address, services.predictor_address) as client:
            client.upsert_items(
                [foretell.Item(f"item-{at}", f"green tea no {at}") for at in range(30)]
            )
        yield services


@pytest.fixture
def run(fakes: FakeServices, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, embedder: str = "", predictor: str = "") -> tuple[int, str, str]:
        embedder = embedder or fakes.embedder_address
        predictor = predictor or fakes.predictor_address
        where = ["--embedder", embedder, "--predictor", predictor, "--out", str(tmp_path / "out")]
        status = cli.main(["load-test", *SHORT, *where, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_mix_by_two_processes(run: Run, fakes: FakeServices, tmp_path: Path) -> None:
    mix = "predict=2,rank,ingest,embed,search"
    status, out, err = run("--mix", mix, "--rate", "80,160", "--processes", "2", "--json")
    assert (status, err) == (0, "")
    report: Any = json.loads(out)
    assert [phase["rate"] for phase in report["phases"]] == [80, 160]
    for phase in report["phases"]:
        assert set(phase["methods"]) == {"predict", "rank", "ingest", "embed", "search"}
        assert (phase["skipped"], phase["failures"]) == (0, {})
        # Poisson: within five standard deviations.
        assert abs(phase["calls"] - phase["rate"] / 2) <= 5 * (phase["rate"] / 2) ** 0.5
        assert sum(method["calls"] for method in phase["methods"].values()) == phase["calls"]
        assert 0 < phase["p50_ms"] <= phase["p99_ms"] <= phase["p999_ms"] <= phase["max_ms"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    with foretell.Client(fakes.embedder_address, fakes.predictor_address) as client:
        events = client.list_events("load-test-0").elements
    assert len(events) > 2  # the history and what was ingested


def test_failed_calls_are_counted_by_code_and_break_the_objective(
    run: Run, fakes: FakeServices
) -> None:
    fakes.fail_next("Predict", foretell.ResourceExhaustedError("full"), times=10_000)
    status, out, _ = run("--arrivals", "constant", "--slo-p99-ms", "1000", "--clean-up")
    assert status == 1
    assert "failed were 30 RESOURCE_EXHAUSTED" in out
    assert "100.0% of the calls without a full answer" in out
    with foretell.Client(fakes.embedder_address, fakes.predictor_address) as client:
        assert not client.list_events("load-test-0").elements


def test_calls_beyond_the_bound_are_skipped_not_delayed(run: Run, fakes: FakeServices) -> None:
    status, out, _ = run("--rate", "4000", "--max-in-flight", "1", "--warm-up", "0", "--json")
    assert status == 0
    (phase,) = json.loads(out)["phases"]
    assert phase["skipped"] > 100
    assert phase["calls"] == pytest.approx(2_000, rel=0.1)
    answered = phase["answered_s"] * phase["seconds"]
    assert phase["calls"] == round(answered) + phase["skipped"] + phase["failed"]


def test_degraded_answers_are_counted_apart(run: Run, fakes: FakeServices) -> None:
    fakes.register_model("first", behavior_types=["view"])
    with foretell.Client(fakes.embedder_address, fakes.predictor_address) as client:
        client.activate_model("first")
    fakes.set_embedder_available(False)
    status, out, _ = run("--json")
    assert status == 0
    (phase,) = json.loads(out)["phases"]
    assert phase["degraded"] == phase["calls"] > 0
    assert phase["failed"] == 0


def test_a_service_that_is_not_there_is_one_line(run: Run, free_ports: tuple[int, int]) -> None:
    status, out, err = run(predictor=f"127.0.0.1:{free_ports[0]}", embedder="127.0.0.1:1")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert f"the predictor at 127.0.0.1:{free_ports[0]} cannot be reached" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--rate", "0"), "--rate: '0' is neither"),
        (("--mix", "sell"), "--mix: 'sell' is no weight"),
        (("--find-max",), "--slo-p99-ms"),
        (("--find-max", "--slo-p99-ms", "5", "--rate", "1,2"), "one rate"),
        (("--processes", "3", "--max-in-flight", "2"), "--max-in-flight 2"),
    ],
)
def test_bad_arguments_are_one_line(run: Run, arguments: tuple[str, ...], complaint: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert complaint in err


def test_the_search_ends_where_the_objective_breaks(run: Run) -> None:
    # The fake answers some hundred calls a second: with two in flight more than that are skipped.
    search = ("--find-max", "--slo-p99-ms", "2000", "--rate", "4000", "--max-in-flight", "2")
    status, out, _ = run(*search, "--seconds", "0.1", "--warm-up", "0", "--json")
    report = json.loads(out)
    held = [phase["rate"] for phase in report["phases"] if not phase["broken"]]
    broken = [phase["rate"] for phase in report["phases"] if phase["broken"]]
    assert status == 0
    assert report["max_rate"] in held
    assert report["max_rate"] < min(broken) <= 4_000


def test_a_process_that_cannot_connect_says_to_whom(free_ports: tuple[int, int]) -> None:
    address = f"127.0.0.1:{free_ports[0]}"
    plan = Plan(
        addresses={"predictor": address},
        settings=foretell.ClientSettings(timeout_s=0.1),
        workload=Workload({"predict": 1.0}, users=1, exponent=1.0),
        arrivals=Arrivals.POISSON,
        share=0,
        shares=1,
        max_in_flight=1,
        seed=0,
    )
    complaint = f"the predictor at {address} cannot be reached"
    with pytest.raises(foretell.UnavailableError, match=complaint), Generators([plan], LiveLine()):
        pass


def test_the_live_line_tells_rates_of_all_processes() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    live = LiveLine(terminal)
    live.update(Progress(calls=10, bad=2, in_flight=3, latencies=[0.004] * 8), 2)
    assert not terminal.getvalue()  # the other one has not said anything
    live.update(Progress(calls=10, bad=1, in_flight=4, latencies=[0.006] * 9), 2)
    line = terminal.getvalue()
    assert "p50 6.0 ms" in line
    assert "7 in flight" in line
    assert "3 without an answer" in line
    live.close()
    assert terminal.getvalue().endswith("\r\x1b[K")

"""`foretell load-test` beside k6 (https://k6.io), which speaks gRPC too.

Both call Predict of one server at a constant rate, in turn, several rounds. The server
(bench/echo.py) answers after random pauses, log-normal, so that what is measured is the server and
not how fast a client in Python or in Go reads a message. k6 counts a latency from when a call was
sent and not from when it was due: only rounds in which neither skipped a call, nor ours sent calls
late, are compared. A figure is the median of those rounds, a ratio the median of their ratios.
Exit status 1 where a ratio is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench import harness
from bench.harness import Budget, Figures, say
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from serving.process import started

EPILOG = """
figures (T: ours, k6):
  T_p50_ms, T_p99_ms        latency
  T_answered_s              calls per second that were answered
  ratio_p50, ratio_p99, ratio_answered
                            ours over k6's
  pause_p50_ms, pause_p99_ms
                            of the server's pauses alone, which are known
  ours_late_p99_ms          by which ours sent calls late
  rounds, rounds_left_out   compared; with skipped or late calls
  load_before               running processes at the start (above 0.5: upper bounds)
"""

ROOT = Path(__file__).parents[1]
SCRIPT = harness.PEERS / "k6_predict.js"

AGREEMENT = 0.1
LATE_SHARE = 0.05
"""Of the p99: rounds in which ours was later than this are left out."""

WARM_UP_S = 2
USERS = 1_000
ROUNDS = 5
SIGMA = 0.4
"""Of the pauses' logarithm: the p99 is two and a half times the median."""

QUANTILE_99 = 2.3263
"""Of the normal distribution."""

COMPARED = ("p50_ms", "p99_ms", "answered_s")

Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("load_agreement", __doc__ or "", 1_200)
    parser.epilog = EPILOG
    parser.add_argument("--seconds", type=int, default=20, metavar="S",
                        help="of each measurement (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=int, default=200, metavar="CALLS",
                        help="per second (default: %(default)s)")  # fmt: skip
    parser.add_argument("--pause-ms", type=float, default=20.0, metavar="MS",
                        help="median of the server's pauses (default: %(default)g)")  # fmt: skip
    parser.add_argument("--predictor", metavar="HOST:PORT",
                        help="a running predictor in place of that server")  # fmt: skip
    options = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    load_before = harness.load()
    with tempfile.TemporaryDirectory(prefix="load-agreement-") as name:
        folder = Path(name)
        pause = ["--pause-ms", str(options.pause_ms), "--sigma", str(SIGMA)]
        with contextlib.ExitStack() as stack:
            address = options.predictor
            if not address:
                flags = [str(_answers(folder / "answers")), *pause]
                address = stack.enter_context(started("bench.echo", flags)).address
            rounds, left_out = _rounds(address, folder, options, budget)
    pause_ms = None if options.predictor else options.pause_ms
    figures: Figures = {
        **_figures(rounds),
        "pause_p50_ms": pause_ms,
        "pause_p99_ms": pause_ms and pause_ms * math.exp(SIGMA * QUANTILE_99),
        "rounds": len(rounds),
        "rounds_left_out": left_out,
        "load_before": load_before,
    }
    for key, value in figures.items():
        say(f"{key:28} {value}")
    harness.finish("load_agreement", harness.versions("grpcio", "hdrhistogram", "k6"), figures)
    ratios = [figures[f"ratio_{key.rpartition('_')[0]}"] for key in COMPARED]
    return 0 if all(ratio and abs(ratio - 1) <= AGREEMENT for ratio in ratios) else 1


def _rounds(
    address: str, folder: Path, options: argparse.Namespace, budget: Budget
) -> tuple[list[dict[str, Result]], int]:
    """Rounds that can be compared, and how many cannot."""
    tools: dict[str, Callable[[], Result]] = {
        "ours": lambda: _ours(address, folder, options),
        "k6": lambda: _k6(address, options),
    }
    rounds: list[dict[str, Result]] = []
    done = 0
    while len(rounds) < ROUNDS and (not done or budget.spent * (1 + 1 / done) < budget.seconds):
        order = sorted(tools, reverse=done % 2 == 0)
        one = {name: tools[name]() for name in order}
        done += 1
        say(f"round {done}: {one}")
        if comparable(one["ours"], one["k6"]):
            rounds.append(one)
    return rounds, done - len(rounds)


def comparable(ours: Result, k6: Result) -> bool:
    """Whether both have sent all calls, and in time."""
    lost = sum(result[name] for result in (ours, k6) for name in ("skipped", "failed"))
    return not lost and ours["late_p99_ms"] <= LATE_SHARE * ours["p99_ms"]


def _figures(rounds: Sequence[dict[str, Result]]) -> Figures:
    def middle(values: Sequence[float]) -> float | None:
        return median(values) if values else None

    figures: Figures = {}
    for key in COMPARED:
        for tool in ("ours", "k6"):
            figures[f"{tool}_{key}"] = middle([one[tool][key] for one in rounds])
        ratios = [one["ours"][key] / one["k6"][key] for one in rounds]
        figures[f"ratio_{key.rpartition('_')[0]}"] = middle(ratios)
    figures["ours_late_p99_ms"] = middle([one["ours"]["late_p99_ms"] for one in rounds])
    return figures


def _ours(address: str, folder: Path, options: argparse.Namespace) -> Result:
    flags = {
        "--predictor": address,
        "--embedder": address,
        "--arrivals": "constant",
        "--rate": options.rate,
        "--seconds": options.seconds,
        "--warm-up": WARM_UP_S,
        "--users": USERS,
        "--zipf": 0,
        "--history": 0,
        "--out": folder / "ours",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "foretell.cli", "load-test", "--json", *words]
    (phase,) = json.loads(subprocess.check_output(command, text=True))["phases"]
    names = (*COMPARED, "skipped", "failed", "late_p99_ms")
    return {name: phase[name] for name in names}


def _k6(address: str, options: argparse.Namespace) -> Result:
    variables = {
        "ADDRESS": address,
        "PROTOS": str(ROOT / "protos"),
        "GOOGLEAPIS": str(ROOT / "third_party" / "googleapis"),
        "RATE": str(options.rate),
        "SECONDS": str(options.seconds),
        "WARM_UP": str(WARM_UP_S),
        "USERS": str(USERS),
    }
    program = Path(sysconfig.get_path("scripts")) / "k6"
    # Neither a report to its makers nor a port that can be taken.
    command = [str(program), "run", "--quiet", "--no-usage-report", "--address", "", str(SCRIPT)]
    output = subprocess.check_output(command, text=True, env=os.environ | variables)
    result: Result = json.loads(output)
    return result


def _answers(folder: Path) -> Path:
    """Messages like the predictor's, for the echo to give."""
    folder.mkdir()
    prediction = prediction_pb.Prediction(
        history_events=50,
        model_version="echo",
        items=[
            prediction_pb.ScoredItem(item_id=f"item-{at}", interest_score=1 / (1 + at))
            for at in range(10)
        ],
    )
    messages = {
        "Predict": prediction_pb.PredictResponse(prediction=prediction),
        "Rank": prediction_pb.RankResponse(),
        "IngestEvents": event_pb.IngestEventsResponse(),
        "Search": embedder_pb.SearchResponse(),
        "Search.request": embedder_pb.SearchRequest(),
    }
    for name, message in messages.items():
        (folder / name).write_bytes(message.SerializeToString())
    return folder


if __name__ == "__main__":
    sys.exit(main())

"""What a call of the predictor costs beside one that does nothing.

Both services run in processes of their own with their default settings, over bench/shop.py: 12,101
items, histories of 50 events, k = 10, a sequence model of 64 dimensions without ranker. The peers
(bench/echo.py) are plain grpc.aio servers that answer at once with the same messages: one process,
and two of which the first asks the second before it answers. One client process calls all of them:
a number of callers, each with one call in flight. Rounds go through all of them one after another;
a figure is the median of the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import numpy as np
from numpy.typing import NDArray

import foretell
from bench import harness, shop
from bench.harness import Budget, Figures, say
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.vectors import to_block
from serving.process import ServiceProcess, started

EPILOG = """
figures (W: echo, two_hops, predict, rank; C: c1, c16, c64 callers):
  W_C_calls_s               calls per second
  W_p50_ms_C, W_p99_ms_C, W_p999_ms_C
                            latency
  ratio_c16                 Predict's rate over the echo's, 16 callers
  ratio_p50_c1_two_hops     Predict's median latency over the echo's through two processes, 1 caller
  predict_ranked_c16_calls_s
                            with a model that has a ranker
  predict_many_users_s      users per second, calls of 256, 4 in flight
  ingest_events_s           events per second, calls of 500, 4 in flight, each durable
  ingest_c16_calls_s, echo_ingest_c16_calls_s, ingest_ratio_c16
                            one event a call, 16 callers, and the echo of the same messages
  rounds, load_before       repetitions; running processes at the start (above 0.5: lower bounds)
"""

PREDICT = "/foretell.predictor.v1.PredictionService/Predict"
PREDICT_MANY = "/foretell.predictor.v1.PredictionService/PredictMany"
RANK = "/foretell.predictor.v1.PredictionService/Rank"
INGEST = "/foretell.predictor.v1.EventService/IngestEvents"

CALLERS = (1, 16, 64)
RANK_ITEMS = 20
"""Items that a Rank orders."""

MANY = 256
INGEST_CALL = 500
IN_FLIGHT = 4
MOST_ROUNDS = 5
RANKED = "ranked"


@dataclass(frozen=True)
class Work:
    """One kind of call."""

    name: str
    address: str
    method: str
    requests: tuple[bytes, ...]
    """They are sent in turn."""
    callers: int
    each: int = 1
    """What a call counts for: users or events."""


class Result:
    """What a run of a work gave."""

    def __init__(self, work: Work, seconds: NDArray[np.float64], elapsed_s: float) -> None:
        self.rate = len(seconds) * work.each / elapsed_s
        self.p50_ms, self.p99_ms, self.p999_ms = (
            float(value) * 1e3 for value in np.quantile(seconds, [0.5, 0.99, 0.999])
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("rpc", __doc__ or "", 1_200)
    parser.epilog = EPILOG
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S",
                        help="of each measurement (default: %(default)g)")  # fmt: skip
    options = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    figures: Figures = {"load_before": harness.load()}
    versions = shop.versions(options.cache_dir)
    with tempfile.TemporaryDirectory(prefix="rpc-") as folder, _shop(Path(folder), versions) as at:
        figures |= _measure(Path(folder), at, options.seconds, budget)
    for name, value in figures.items():
        say(f"{name:32} {value:.6g}" if value is not None else name)
    harness.finish("rpc", harness.versions("grpcio", "protobuf", "torch"), figures)
    return 0


@contextlib.contextmanager
def _shop(folder: Path, versions: Path) -> Iterator[tuple[ServiceProcess, ServiceProcess]]:
    """Embedder and predictor with the shop's data; both versions are registered."""
    log = folder / "log"
    port = ["--port", "0"]
    with started("embedder", [*port, "--data-dir", str(folder / "embedder")], log=log) as embedder:
        data = folder / "predictor"
        flags = [*port, "--data-dir", str(data), "--embedder", embedder.address]
        with started("predictor", flags, log=log) as predictor:
            shop.fill(embedder, predictor)
            for name in (shop.PLAIN, shop.RANKED):
                shop.register(versions / name, data)
            yield embedder, predictor


def _measure(
    folder: Path, services: tuple[ServiceProcess, ServiceProcess], seconds: float, budget: Budget
) -> Figures:
    embedder, predictor = services
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(foretell.Client(embedder.address, predictor.address))
        pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
        client.activate_model(shop.PLAIN)
        answers = _answers(folder / "answers", services)
        echo = stack.enter_context(started("bench.echo", [str(answers)]))
        two_hops = stack.enter_context(
            started("bench.echo", [str(answers), "--through", echo.address])
        )
        works = _works(predictor.address, echo.address, two_hops.address)
        ranked = [Work(RANKED, predictor.address, PREDICT, _predicts(), 16)]
        results: dict[str, list[Result]] = defaultdict(list)
        rounds = 0
        while rounds < MOST_ROUNDS and (
            not rounds or budget.spent * (1 + 1 / rounds) < budget.seconds
        ):
            for work in works:
                results[work.name].append(_run(pool, work, seconds))
            client.activate_model(shop.RANKED)
            results[RANKED].append(_run(pool, ranked[0], seconds))
            client.activate_model(shop.PLAIN)
            rounds += 1
            say(f"round {rounds}: {budget.spent:.0f} s")
    return {"rounds": rounds, **_figures(results)}


def _works(predictor: str, echo: str, two_hops: str) -> list[Work]:
    predicts, ranks = _predicts(), _ranks()
    works = [
        Work(f"{name}_c{callers}", address, method, requests, callers)
        for callers in CALLERS
        for name, address, method, requests in (
            ("echo", echo, PREDICT, predicts),
            ("two_hops", two_hops, PREDICT, predicts),
            ("predict", predictor, PREDICT, predicts),
            ("rank", predictor, RANK, ranks),
        )
    ]
    many = _events(INGEST_CALL, 200)
    single = _events(1, 4_000)
    return [
        *works,
        Work("predict_many", predictor, PREDICT_MANY, _predict_many(), IN_FLIGHT, MANY),
        Work("ingest_events", predictor, INGEST, many, IN_FLIGHT, INGEST_CALL),
        Work("echo_ingest_c16", echo, INGEST, single, 16),
        Work("ingest_c16", predictor, INGEST, single, 16),
    ]


def _figures(results: dict[str, list[Result]]) -> Figures:
    def middle(name: str, what: str) -> float:
        return float(median(getattr(result, what) for result in results[name]))

    def ratio(one: str, other: str, what: str) -> float:
        pairs = zip(results[one], results[other], strict=True)
        return float(median(getattr(a, what) / getattr(b, what) for a, b in pairs))

    figures: Figures = {}
    for name in ("echo", "two_hops", "predict", "rank"):
        for callers in CALLERS:
            work = f"{name}_c{callers}"
            figures[f"{work}_calls_s"] = middle(work, "rate")
            for quantile in ("p50", "p99", "p999"):
                key = f"{name}_{quantile}_ms_c{callers}"
                figures[key] = middle(work, f"{quantile}_ms")
    return {
        **figures,
        "ratio_c16": ratio("predict_c16", "echo_c16", "rate"),
        "ratio_p50_c1_two_hops": ratio("predict_c1", "two_hops_c1", "p50_ms"),
        "predict_ranked_c16_calls_s": middle(RANKED, "rate"),
        "predict_many_users_s": middle("predict_many", "rate"),
        "ingest_events_s": middle("ingest_events", "rate"),
        "ingest_c16_calls_s": middle("ingest_c16", "rate"),
        "echo_ingest_c16_calls_s": middle("echo_ingest_c16", "rate"),
        "ingest_ratio_c16": ratio("ingest_c16", "echo_ingest_c16", "rate"),
    }


# --- Messages -------------------------------------------------------------------------------------


def _predicts() -> tuple[bytes, ...]:
    return tuple(
        prediction_pb.PredictRequest(
            query=prediction_pb.PredictionQuery(user_id=user, k=10)
        ).SerializeToString()
        for user in shop.users()
    )


def _predict_many() -> tuple[bytes, ...]:
    users = shop.users()
    return tuple(
        prediction_pb.PredictManyRequest(
            queries=[
                prediction_pb.PredictionQuery(user_id=users[(begin + at) % len(users)], k=10)
                for at in range(MANY)
            ]
        ).SerializeToString()
        for begin in range(0, len(users), 97)
    )


def _ranks() -> tuple[bytes, ...]:
    rng = np.random.default_rng(1)
    return tuple(
        prediction_pb.RankRequest(
            query=prediction_pb.PredictionQuery(user_id=user),
            item_ids=[f"item-{at}" for at in rng.choice(shop.ITEMS, RANK_ITEMS, replace=False)],
        ).SerializeToString()
        for user in shop.users()
    )


def _events(each: int, calls: int) -> tuple[bytes, ...]:
    """Events of users whom nobody predicts for, so that histories stay as long as they are."""
    rng = np.random.default_rng(2)
    users = rng.integers(10_000, size=(calls, each)).tolist()
    chosen = rng.integers(shop.ITEMS, size=(calls, each)).tolist()
    return tuple(
        event_pb.IngestEventsRequest(
            events=[
                event_pb.Event(user_id=f"other-{user}", behavior_type="view", item_id=f"item-{at}")
                for user, at in zip(users[call], chosen[call], strict=True)
            ]
        ).SerializeToString()
        for call in range(calls)
    )


def _answers(folder: Path, services: tuple[ServiceProcess, ServiceProcess]) -> Path:
    """The services' own answers, for the echo to give."""
    folder.mkdir()
    embedder, predictor = services
    vector = np.ones((1, shop.DIMS), np.float32)
    search = embedder_pb.SearchRequest(
        collection=f"{shop.PLAIN}.items", vectors=to_block(vector), k=10
    ).SerializeToString()
    (folder / "Search.request").write_bytes(search)
    for address, method, request in (
        (predictor.address, PREDICT, _predicts()[0]),
        (predictor.address, RANK, _ranks()[0]),
        (predictor.address, INGEST, _events(1, 1)[0]),
        (embedder.address, "/foretell.embedder.v1.EmbedderService/Search", search),
    ):
        with grpc.insecure_channel(address) as channel:
            call: Any = channel.unary_unary(method)
            (folder / method.rsplit("/", 1)[1]).write_bytes(call(request, timeout=30))
    return folder


# --- The client -----------------------------------------------------------------------------------


def _run(pool: ProcessPoolExecutor, work: Work, seconds: float) -> Result:
    return Result(work, *pool.submit(_drive, work, seconds).result())


def _drive(work: Work, seconds: float) -> tuple[NDArray[np.float64], float]:
    """In the client's process: latencies of the calls, and the seconds that they took together."""
    return asyncio.run(_call(work, seconds))


async def _call(work: Work, seconds: float) -> tuple[NDArray[np.float64], float]:
    latencies: list[float] = []
    async with grpc.aio.insecure_channel(
        work.address, options=[("grpc.max_receive_message_length", -1)]
    ) as channel:
        method: Any = channel.unary_unary(
            work.method
        )  # bytes: the messages cost the client nothing
        for request in work.requests[:20]:
            await method(request, timeout=30)
        requests = iter(range(10**9))
        begin = time.perf_counter()

        async def caller() -> None:
            while time.perf_counter() - begin < seconds:
                request = work.requests[next(requests) % len(work.requests)]
                sent = time.perf_counter()
                await method(request, timeout=30)
                latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(caller() for _ in range(work.callers)))
        return np.array(latencies), time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())

"""What the services do when they are asked for more than they can.

The embedder gets Embed calls of 8 mixed texts (bench/texts.py), none of which it has met; the
predictor PredictMany calls of 64 users over bench/shop.py. Both run in processes of their own with
their default settings. The load comes from one more process:

- peak: 4 callers, each with one call in flight: the greatest goodput.
- sustainable: calls are due at random times (Poisson), 80 % as many a second as at the peak.
- overload: the same way, 5 times (PredictMany: 2 times) as many as are sustainable.

Goodput is what is answered OK and within the deadline of 2 s, of PredictMany by the model and not
by a fallback. A latency counts from when a call was due. Rounds go through all of it one after
another; a figure is the median of the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import numpy as np

import foretell
from bench import harness, shop
from bench.harness import Budget, Figures, say
from bench.texts import Texts
from foretell.embedder.v1 import embedder_service_pb2 as embedder_pb
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from serving.process import ServiceProcess, started

EPILOG = """
figures:
  peak_goodput_s            texts per second at the peak
  goodput_5x_ratio          texts per second in overload, over those at the peak
  refusal_server_p99_ms     of refused calls, from arrival to end, by the service's log
  refusal_client_p99_ms     of the same, from when they were due, in the (busy) client
  accepted_p99_ratio        p99 of the answered calls in overload, over that at the sustainable rate
  sustainable_p99_ms, accepted_p99_ms
                            these two
  refused_share, late_share of the calls in overload: refused; not ended in time
  client_cpu_share          CPU seconds of the load's process per second, in overload
  predict_peak_users_s, predict_goodput_2x_ratio, predict_sustainable_p99_ms,
  predict_accepted_p99_ratio, predict_refused_share, predict_fallback_share
                            of PredictMany
  rounds, load_before       repetitions; running processes at the start (above 0.5: lower bounds)
"""

EMBED = "/foretell.embedder.v1.EmbedderService/Embed"
PREDICT_MANY = "/foretell.predictor.v1.PredictionService/PredictMany"

TEXTS = 8
USERS = 64
CALLERS = 4
SUSTAINABLE = 0.8
"""Part of the peak."""

DEADLINE_S = 2.0
SETTLING_S = 1.0
"""Calls that are due before it do not count: what is measured is a steady state."""

MOST_ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """What calls of one kind got.

    Attributes:
        seconds: from when each was due to its end.
        codes: how each ended: OK, FALLBACK (an answer that is not the model's) or gRPC's name.
        elapsed_s: in which they were due.
        cpu_s: of the client's process.
    """

    seconds: list[float]
    codes: list[str]
    elapsed_s: float
    cpu_s: float

    @property
    def goodput(self) -> float:
        """Calls per second that were answered well."""
        return self.codes.count("OK") / self.elapsed_s

    def p99_ms(self, code: str) -> float | None:
        """Of the calls that ended so; None: there are none."""
        some = [s for s, c in zip(self.seconds, self.codes, strict=True) if c == code]
        return float(np.quantile(some, 0.99)) * 1e3 if some else None

    def share(self, code: str) -> float:
        """Of all calls."""
        return self.codes.count(code) / max(1, len(self.codes))


@dataclass(frozen=True)
class Load:
    """Calls of a kind, and who drives them."""

    pool: ProcessPoolExecutor
    address: str
    method: str
    requests: Callable[[int], list[bytes]]
    """So many new messages."""
    seconds: float

    def peak(self) -> Run:
        """Callers that wait for their answers."""
        requests = self.requests(int(self.seconds * 400))
        return self._drive(_closed, requests, CALLERS, self.seconds)

    def at(self, rate: float) -> Run:
        """Calls that are due at random times, so many a second."""
        seconds = self.seconds + SETTLING_S
        due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, int(rate * seconds)))
        return self._drive(_open, self.requests(len(due)), due.tolist())

    def _drive(self, *arguments: Any) -> Run:
        return self.pool.submit(_run, self.address, self.method, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("overload", __doc__ or "", 1_200)
    parser.epilog = EPILOG
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S",
                        help="of each measurement (default: %(default)g)")  # fmt: skip
    options = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    figures: Figures = {"load_before": harness.load()}
    versions = shop.versions(options.cache_dir)
    texts = Texts(options.cache_dir)
    rounds: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="overload-") as name,
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
    ):
        folder = Path(name)
        log = folder / "embedder.log"
        flags = ["--port", "0", "--data-dir", str(folder / "embedder")]
        with started("embedder", flags, log=log) as embedder:
            flags = ["--port", "0", "--data-dir", str(folder / "predictor")]
            flags += ["--embedder", embedder.address]
            with started("predictor", flags, log=folder / "predictor.log") as predictor:
                _prepare(embedder, predictor, versions, folder / "predictor")
                embed = Load(pool, embedder.address, EMBED, _embeds(texts), options.seconds)
                predict = Load(pool, predictor.address, PREDICT_MANY, _predicts(), options.seconds)
                while len(rounds) < MOST_ROUNDS and (
                    not rounds or budget.spent * (1 + 1 / len(rounds)) < budget.seconds
                ):
                    rounds.append(_embedder(embed, log) | _predictor(predict))
                    say(f"round {len(rounds)}: {budget.spent:.0f} s, {rounds[-1]}")
    for key in rounds[0]:
        figures[key] = float(median(one[key] for one in rounds if key in one))
    figures["rounds"] = len(rounds)
    for key, value in figures.items():
        say(f"{key:28} {value}")
    harness.finish("overload", harness.versions("grpcio", "protobuf", "torch"), figures)
    return 0


def _prepare(
    embedder: ServiceProcess, predictor: ServiceProcess, versions: Path, data_dir: Path
) -> None:
    shop.fill(embedder, predictor)
    shop.register(versions / shop.PLAIN, data_dir)
    with foretell.Client(embedder.address, predictor.address) as client:
        client.activate_model(shop.PLAIN)


def _embedder(load: Load, log: Path) -> dict[str, float]:
    peak = load.peak()
    rate = peak.goodput * SUSTAINABLE
    base = load.at(rate)
    logged = log.stat().st_size
    over = load.at(5 * rate)
    with log.open("rb") as file:
        file.seek(logged)
        refusals = [call["ms"] for line in file if (call := _refusal(line)) is not None]
    base_ms, over_ms = base.p99_ms("OK"), over.p99_ms("OK")
    refused_ms = over.p99_ms("RESOURCE_EXHAUSTED")
    if base_ms is None or over_ms is None or refused_ms is None:
        raise RuntimeError(f"no call was answered, or none refused: {set(over.codes)}")
    return {
        "peak_goodput_s": peak.goodput * TEXTS,
        "goodput_5x_ratio": over.goodput / peak.goodput,
        "refusal_server_p99_ms": float(np.quantile(refusals, 0.99)),
        "refusal_client_p99_ms": refused_ms,
        "accepted_p99_ratio": over_ms / base_ms,
        "sustainable_p99_ms": base_ms,
        "accepted_p99_ms": over_ms,
        "refused_share": over.share("RESOURCE_EXHAUSTED"),
        "late_share": over.share("DEADLINE_EXCEEDED"),
        "client_cpu_share": over.cpu_s / (load.seconds + SETTLING_S),
    }


def _refusal(line: bytes) -> dict[str, Any] | None:
    """A line of the log, if it is of a refused Embed."""
    if b"RESOURCE_EXHAUSTED" not in line:
        return None
    call: dict[str, Any] = json.loads(line)
    return call if call.get("method") == EMBED else None


def _predictor(load: Load) -> dict[str, float]:
    peak = load.peak()
    rate = peak.goodput * SUSTAINABLE
    base = load.at(rate)
    over = load.at(2 * rate)
    figures = {
        "predict_peak_users_s": peak.goodput * USERS,
        "predict_goodput_2x_ratio": over.goodput / peak.goodput,
        "predict_refused_share": over.share("RESOURCE_EXHAUSTED"),
        "predict_fallback_share": over.share("FALLBACK"),
    }
    base_ms, over_ms = base.p99_ms("OK"), over.p99_ms("OK")
    if base_ms is not None and over_ms is not None:
        figures["predict_sustainable_p99_ms"] = base_ms
        figures["predict_accepted_p99_ratio"] = over_ms / base_ms
    return figures


# --- Messages -------------------------------------------------------------------------------------


def _embeds(texts: Texts) -> Callable[[int], list[bytes]]:
    return lambda count: [
        embedder_pb.EmbedRequest(texts=texts.take("mixed", TEXTS)).SerializeToString()
        for _ in range(count)
    ]


def _predicts() -> Callable[[int], list[bytes]]:
    users = shop.users()
    messages = [
        prediction_pb.PredictManyRequest(
            queries=[
                prediction_pb.PredictionQuery(user_id=users[(begin + at) % len(users)], k=10)
                for at in range(USERS)
            ]
        ).SerializeToString()
        for begin in range(0, len(users), 7)
    ]
    return lambda count: [messages[at % len(messages)] for at in range(count)]


# --- The load, in a process of its own ------------------------------------------------------------

Send = Callable[[bytes, float], Any]
"""Calls with a message that was due at a time, and notes what came of it."""


@dataclass(frozen=True)
class _Ended:
    """A call: when it was due, how long it took from then, and what it got."""

    due: float
    seconds: float
    code: str
    answer: bytes


def _run(address: str, method: str, drive: Callable[..., Any], *arguments: Any) -> Run:
    return asyncio.run(_driven(address, method, drive, arguments))


async def _driven(
    address: str, method: str, drive: Callable[..., Any], arguments: Sequence[Any]
) -> Run:
    ended: list[_Ended] = []
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        call: Any = channel.unary_unary(method)  # bytes: messages cost the client nothing

        async def send(request: bytes, due: float) -> None:
            answer = b""
            try:
                answer = await call(request, timeout=DEADLINE_S - (time.perf_counter() - due))
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            seconds = time.perf_counter() - due
            ended.append(_Ended(due, seconds, code, answer if method == PREDICT_MANY else b""))

        cpu_s = time.process_time()
        begin, elapsed_s = await drive(send, *arguments)
        cpu_s = time.process_time() - cpu_s
    counted = [one for one in ended if one.due >= begin]
    return Run(
        [one.seconds for one in counted], [_graded(one) for one in counted], elapsed_s, cpu_s
    )


async def _closed(
    send: Send, requests: Sequence[bytes], callers: int, seconds: float
) -> tuple[float, float]:
    """Sends; from when on calls count, and for how many seconds."""
    left = iter(requests)
    begin = time.perf_counter()

    async def caller() -> None:
        for request in left:
            if time.perf_counter() - begin > seconds:
                return
            await send(request, time.perf_counter())

    await asyncio.gather(*(caller() for _ in range(callers)))
    return begin, time.perf_counter() - begin


async def _open(send: Send, requests: Sequence[bytes], due: Sequence[float]) -> tuple[float, float]:
    """Likewise."""
    begin = time.perf_counter()
    calls = []
    for request, after in zip(requests, due, strict=True):
        wait_s = begin + after - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        calls.append(asyncio.ensure_future(send(request, begin + after)))
    await asyncio.gather(*calls)
    return begin + SETTLING_S, due[-1] - SETTLING_S


def _graded(one: _Ended) -> str:
    if not one.answer:
        return one.code
    predictions = prediction_pb.PredictManyResponse.FromString(one.answer).predictions
    return "FALLBACK" if any(each.fallback_reason for each in predictions) else one.code


if __name__ == "__main__":
    sys.exit(main())

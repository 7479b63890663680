"""Several predictor processes behind one port: what they cost, and that they are one service.

The embedder and two predictors run over bench/shop.py with their default settings: one of a single
process, one of two (`--processes 2`). Predict is called over 16 connections for each process, in
two ways: at a steady rate (open loop, Poisson arrivals, the same rate for each process), and as
fast as 16 callers for each process can, each with one call in flight. What a call costs there
depends on how many of them share a pass of the model, so that is given too. Rounds go through all
of that in turn; a figure is the median of the rounds, a ratio the median of the rounds' ratios. CPU
time is that of the predictor's processes, user and system, supervisor included; neither the
embedder's nor the callers'.

Then one of the two processes is killed (SIGKILL) under the load of clients that retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any
from urllib import request

import grpc.aio
import numpy as np

import foretell
from bench import harness, shop
from bench.harness import Budget, Figures, say
from foretell.predictor.v1 import event_service_pb2 as event_pb
from foretell.predictor.v1 import event_service_pb2_grpc as event_grpc
from foretell.predictor.v1 import model_service_pb2 as model_pb
from foretell.predictor.v1 import model_service_pb2_grpc as model_grpc
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb
from foretell.predictor.v1 import prediction_service_pb2_grpc as prediction_grpc
from serving.process import ServiceProcess, started

EPILOG = """
figures (N: 1, 2 processes):
  cpu_ms_per_call_N         CPU time of a Predict at a steady rate
  cpu_ratio                 with two processes over with one
  busy_cpu_ms_per_call_N, busy_cpu_ratio
                            the same as fast as 16 callers for each process can
  calls_s_N                 Predict calls per second then
  queries_per_pass_N, busy_queries_per_pass_N
                            predictions that share a pass of the model, mean
  calls_on_kill, failed_calls_on_kill
                            calls while one of two processes was killed, and those that failed
  replaced_s                seconds from the kill until two processes served again
  seen_at_once              1: an event taken through one was seen by the other at once, each time
  activation_both           1: ActivateModel through one had switched both when it returned
  rounds, load_before       repetitions; running processes at the start (above 0.5: lower bounds)
"""

CALLERS = 16
"""For each process, each with a connection of its own."""

RATE = 60.0
"""Calls per second for each process, of the steady rate."""

CONNECTIONS = 16
"""To the two processes where it is asked what all see: the odds that they are of one process alone
are 1 to 32,768."""

EVENTS = 200
"""Taken through one connection and looked for through all."""

MOST_ROUNDS = 9
ACTIVATIONS = 4
KILL_AFTER_S = 3.0
REPLACED_S = 60.0
"""Longest wait for the process that takes the place of the killed one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("processes", __doc__ or "", 1_200)
    parser.epilog = EPILOG
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S",
                        help="of each measurement (default: %(default)g)")  # fmt: skip
    options = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    figures: Figures = {"load_before": harness.load()}
    versions = shop.versions(options.cache_dir)
    with (
        tempfile.TemporaryDirectory(prefix="processes-") as folder,
        _services(Path(folder), versions) as (one, two),
    ):
        figures |= _cost((one, two), options.seconds, budget)
        figures |= asyncio.run(_sight(two.process.address))
        figures |= asyncio.run(_kill(two.process))
    for name, value in figures.items():
        say(f"{name:24} {value:.6g}" if value is not None else name)
    harness.finish("processes", harness.versions("grpcio", "protobuf", "torch"), figures)
    return 0


@dataclass(frozen=True)
class Service:
    """A predictor of one process or more."""

    processes: int
    process: ServiceProcess
    """The only one, or the supervisor."""
    page: int
    """Port of the first one's page of metrics."""

    def passes(self) -> tuple[float, float]:
        """Predictions and passes of the model until now."""
        name = "foretell_forward_batch_queries"
        pages = [
            request.urlopen(f"http://127.0.0.1:{self.page + at}/metrics").read().decode()
            for at in range(self.processes)
        ]
        queries, times = (
            sum(float(line.split()[1]) for line in "\n".join(pages).splitlines()
                if line.startswith(f"{name}_{what} "))
            for what in ("sum", "count")
        )  # fmt: skip
        return queries, times


@contextlib.contextmanager
def _services(folder: Path, versions: Path) -> Iterator[tuple[Service, Service]]:
    """Predictors of one process and of two over one data directory, which holds the shop."""
    log = folder / "log"
    port = ["--port", "0"]
    page = _free_ports(3)
    with started("embedder", [*port, "--data-dir", str(folder / "embedder")], log=log) as embedder:
        data = folder / "predictor"
        flags = [*port, "--data-dir", str(data), "--embedder", embedder.address]
        pages = [[*flags, "--metrics-port", str(number)] for number in (page, page + 1)]
        with (
            started("predictor", pages[0], log=log) as one,
            started("predictor", [*pages[1], "--processes", "2"], log=log) as two,
        ):
            shop.fill(embedder, one)
            for name in (shop.PLAIN, shop.RANKED):
                shop.register(versions / name, data)
            with foretell.Client(predictor=one.address) as client:
                client.activate_model(shop.PLAIN)
            yield Service(1, one, page), Service(2, two, page + 1)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            sockets[0].bind(("127.0.0.1", 0))
            first = int(sockets[0].getsockname()[1])
            for at, one in enumerate(sockets[1:], 1):
                one.bind(("127.0.0.1", first + at))
            return first


# --- What a call costs ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What was measured of a service under a load."""

    cpu_ms: float
    """Of a call."""
    rate: float
    """Calls per second."""
    batch: float
    """Predictions that share a pass of the model, mean."""


def _cost(services: Sequence[Service], seconds: float, budget: Budget) -> Figures:
    rounds: list[dict[str, Cost]] = []
    while len(rounds) < MOST_ROUNDS and (
        not rounds or budget.spent * (1 + 1 / len(rounds)) < budget.seconds
    ):
        rounds.append(
            {
                f"{way}{service.processes}": asyncio.run(_measure(service, rate, seconds))
                for way, rate in (("", RATE), ("busy_", None))
                for service in services
            }
        )
        costs = ", ".join(f"{name} {cost.cpu_ms:.3f} ms" for name, cost in rounds[-1].items())
        say(f"round {len(rounds)}: {costs}; {budget.spent:.0f} s")
    figures: Figures = {"rounds": len(rounds)}
    for way in ("", "busy_"):
        for number in (1, 2):
            measured = [costs[f"{way}{number}"] for costs in rounds]
            figures[f"{way}cpu_ms_per_call_{number}"] = median(cost.cpu_ms for cost in measured)
            figures[f"{way}queries_per_pass_{number}"] = median(cost.batch for cost in measured)
            if way:
                figures[f"calls_s_{number}"] = median(cost.rate for cost in measured)
        figures[f"{way}cpu_ratio"] = median(
            costs[f"{way}2"].cpu_ms / costs[f"{way}1"].cpu_ms for costs in rounds
        )
    return figures


async def _measure(service: Service, rate: float | None, seconds: float) -> Cost:
    """What a Predict costs at so many calls per second for each process; None: at all there are."""
    connections = CALLERS * service.processes
    drive = _as_fast_as_they_can if rate is None else _steadily(rate * service.processes)
    async with _connections(service.process.address, connections) as channels:
        stubs = [prediction_grpc.PredictionServiceStub(channel) for channel in channels]
        await drive(stubs, time.perf_counter() + seconds / 4)  # warms up
        begin, cpu_s, passes = time.perf_counter(), _cpu_s(service), service.passes()
        calls = await drive(stubs, begin + seconds)
        took = time.perf_counter() - begin
        cpu_s = _cpu_s(service) - cpu_s
    queries, times = (
        after - before for after, before in zip(service.passes(), passes, strict=True)
    )
    return Cost(cpu_s / calls * 1e3, calls / took, queries / times)


Drive = Callable[[Sequence[Any], float], Awaitable[int]]
"""Calls by stubs until a time, and gives how many calls it were."""


async def _as_fast_as_they_can(stubs: Sequence[Any], end: float) -> int:
    requests = cycle(_requests())

    async def caller(stub: Any) -> int:
        calls = 0
        while time.perf_counter() < end:
            await stub.Predict(next(requests), timeout=30)
            calls += 1
        return calls

    return sum(await asyncio.gather(*map(caller, stubs)))


def _steadily(rate: float) -> Drive:
    """Poisson arrivals of so many calls per second, however fast the answers come."""
    rng = np.random.default_rng(3)

    async def drive(stubs: Sequence[Any], end: float) -> int:
        calls: list[Awaitable[object]] = []
        due = time.perf_counter()
        for stub, query in zip(cycle(stubs), cycle(_requests()), strict=False):
            due += rng.exponential(1 / rate)
            if due > end:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.append(asyncio.ensure_future(stub.Predict(query, timeout=30)))
        await asyncio.gather(*calls)
        return len(calls)

    return drive


def _requests() -> list[prediction_pb.PredictRequest]:
    return [
        prediction_pb.PredictRequest(query=prediction_pb.PredictionQuery(user_id=user, k=10))
        for user in shop.users()
    ]


def _cpu_s(service: Service) -> float:
    """Seconds of CPU that a service's processes have used, those that still run."""
    ticks = 0
    for pid in (service.process.process.pid, *_workers(service.process)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime; see proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _workers(service: ServiceProcess) -> list[int]:
    """Process ids of a supervisor's workers."""
    pid = service.process.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.asynccontextmanager
async def _connections(address: str, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Channels with a connection each."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=own))
            for _ in range(count)
        ]


# --- One service ----------------------------------------------------------------------------------


async def _sight(address: str) -> Figures:
    """Whether what one process has been told, all know."""
    async with _connections(address, CONNECTIONS) as channels:
        events = [event_grpc.EventServiceStub(channel) for channel in channels]
        seen = True
        for number in range(EVENTS):
            event = event_pb.Event(user_id="seen", behavior_type="view", item_id="item-1")
            ingest = event_pb.IngestEventsRequest(events=[event])
            await events[number % CONNECTIONS].IngestEvents(ingest, timeout=30)
            listing = event_pb.ListEventsRequest(user_id="seen", page_size=1_000)
            pages = await asyncio.gather(*(one.ListEvents(listing, timeout=30) for one in events))
            seen &= all(len(page.events) == number + 1 for page in pages)
        models = [model_grpc.ModelServiceStub(channel) for channel in channels]
        both = True
        for number in range(ACTIVATIONS):
            name = (shop.RANKED, shop.PLAIN)[number % 2]
            request = model_pb.ActivateModelRequest(version=name)
            await models[number].ActivateModel(request, timeout=120)
            infos = await asyncio.gather(
                *(model.GetInfo(model_pb.GetInfoRequest(), timeout=30) for model in models)
            )
            both &= all(info.model_version == name for info in infos)
    return {"seen_at_once": int(seen), "activation_both": int(both)}


async def _kill(service: ServiceProcess) -> Figures:
    """Kills one of two processes under load, and waits for the one that takes its place."""
    calls, failed = 0, 0
    killed_at = replaced_at = 0.0
    users = shop.users()

    async def caller(number: int) -> None:
        nonlocal calls, failed
        # Channels of equal settings would share one connection.
        settings = foretell.ClientSettings(keepalive_s=30 + number)
        async with foretell.AsyncClient(predictor=service.address, settings=settings) as client:
            while not replaced_at or time.perf_counter() < replaced_at + KILL_AFTER_S:
                calls += 1
                try:
                    await client.predict(users[calls % len(users)])
                except foretell.ForetellError as error:
                    failed += 1
                    say(f"failed: {error}")

    callers = [asyncio.create_task(caller(number)) for number in range(CALLERS)]
    await asyncio.sleep(KILL_AFTER_S)
    before = _workers(service)
    os.kill(before[0], signal.SIGKILL)
    killed_at = time.perf_counter()
    while not replaced_at:
        await asyncio.sleep(0.05)
        others = [pid for pid in _workers(service) if pid not in before]
        if others and _listens(others[0]):
            replaced_at = time.perf_counter()
        if time.perf_counter() > killed_at + REPLACED_S:
            raise RuntimeError(f"no process has taken the killed one's place in {REPLACED_S:g} s")
    await asyncio.gather(*callers)
    return {
        "calls_on_kill": calls,
        "failed_calls_on_kill": failed,
        "replaced_s": replaced_at - killed_at,
    }


def _listens(pid: int) -> bool:
    """Whether a process has a TCP socket that listens."""
    listening = {
        fields[9]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:])
        if fields[3] == "0A"
    }
    with contextlib.suppress(FileNotFoundError):  # one that was closed meanwhile
        opened = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
        return any(f"socket:[{inode}]" in opened for inode in listening)
    return False


if __name__ == "__main__":
    sys.exit(main())

"""Several predictor processes behind one port: what they cost, and that they are one service.

The embedder and two predictors run over bench/shop.py with their default settings: one of a single
process, one of two (`--processes 2`). Callers with a connection each, 16 for every process, send
Predict with one call in flight. Rounds go through both services in turn; a figure is the median of
the rounds, the ratio the median of the rounds' ratios. CPU time is that of the predictor's
processes, user and system, supervisor included; neither the embedder's nor the callers'.

Then one of the two processes is killed (SIGKILL) under the load of clients that retry.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio

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
figures:
  cpu_ms_per_call_1, cpu_ms_per_call_2
                            CPU time of a Predict with one process and with two
  cpu_ratio                 the second over the first
  cpu_ratio_same_callers    the same where the two processes have as many callers as the one
  calls_s_1, calls_s_2      Predict calls per second
  calls_on_kill, failed_calls_on_kill
                            calls while one of two processes was killed, and those that failed
  replaced_s                seconds from the kill until two processes served again
  seen_at_once              1: an event taken through one was seen by the other at once, each time
  activation_both           1: ActivateModel through one had switched both when it returned
  rounds, load_before       repetitions; running processes at the start (above 0.5: lower bounds)
"""

CALLERS = 16
"""For each process, each with a connection of its own."""

CONNECTIONS = 16
"""To the two processes where it is asked what all see: the odds that they are of one process alone
are 1 to 32,768."""

EVENTS = 200
"""Taken through one connection and looked for through all."""

MOST_ROUNDS = 5
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
        figures |= asyncio.run(_cost(one, two, options.seconds, budget))
        figures |= asyncio.run(_sight(two.address))
        figures |= asyncio.run(_kill(two))
    for name, value in figures.items():
        say(f"{name:24} {value:.6g}" if value is not None else name)
    harness.finish("processes", harness.versions("grpcio", "protobuf", "torch"), figures)
    return 0


@contextlib.contextmanager
def _services(folder: Path, versions: Path) -> Iterator[tuple[ServiceProcess, ServiceProcess]]:
    """Predictors of one process and of two over one data directory, which holds the shop."""
    log = folder / "log"
    port = ["--port", "0"]
    with started("embedder", [*port, "--data-dir", str(folder / "embedder")], log=log) as embedder:
        data = folder / "predictor"
        flags = [*port, "--data-dir", str(data), "--embedder", embedder.address]
        with (
            started("predictor", flags, log=log) as one,
            started("predictor", [*flags, "--processes", "2"], log=log) as two,
        ):
            shop.fill(embedder, one)
            for name in (shop.PLAIN, shop.RANKED):
                shop.register(versions / name, data)
            with foretell.Client(predictor=one.address) as client:
                client.activate_model(shop.PLAIN)
            yield one, two


# --- What a call costs ----------------------------------------------------------------------------


async def _cost(
    one: ServiceProcess, two: ServiceProcess, seconds: float, budget: Budget
) -> Figures:
    costs: list[tuple[float, float, float]] = []
    rates: list[tuple[float, float]] = []
    while len(costs) < MOST_ROUNDS and (
        not costs or budget.spent * (1 + 1 / len(costs)) < budget.seconds
    ):
        cost_1, rate_1 = await _measure(one, CALLERS, seconds)
        cost_2, rate_2 = await _measure(two, 2 * CALLERS, seconds)
        cost_same, _ = await _measure(two, CALLERS, seconds)
        costs.append((cost_1, cost_2, cost_same))
        rates.append((rate_1, rate_2))
        in_ms = ", ".join(f"{cost:.3f} ms" for cost in costs[-1])
        say(f"round {len(costs)}: {in_ms}; {budget.spent:.0f} s")
    return {
        "rounds": len(costs),
        "cpu_ms_per_call_1": median(first for first, _, _ in costs),
        "cpu_ms_per_call_2": median(second for _, second, _ in costs),
        "cpu_ratio": median(second / first for first, second, _ in costs),
        "cpu_ratio_same_callers": median(same / first for first, _, same in costs),
        "calls_s_1": median(rate for rate, _ in rates),
        "calls_s_2": median(rate for _, rate in rates),
    }


async def _measure(service: ServiceProcess, callers: int, seconds: float) -> tuple[float, float]:
    """Milliseconds of CPU that a Predict costs, and calls per second."""
    requests = [
        prediction_pb.PredictRequest(query=prediction_pb.PredictionQuery(user_id=user, k=10))
        for user in shop.users()
    ]
    async with _connections(service.address, callers) as channels:
        stubs = [prediction_grpc.PredictionServiceStub(channel) for channel in channels]
        turns = iter(range(10**9))

        async def until(end: float) -> int:
            """Calls until then."""

            async def caller(stub: Any) -> int:
                calls = 0
                while time.perf_counter() < end:
                    await stub.Predict(requests[next(turns) % len(requests)], timeout=30)
                    calls += 1
                return calls

            return sum(await asyncio.gather(*map(caller, stubs)))

        await until(time.perf_counter() + seconds / 4)  # warms up
        begin, before = time.perf_counter(), _cpu_s(service)
        calls = await until(begin + seconds)
        took, spent = time.perf_counter() - begin, _cpu_s(service) - before
    return spent / calls * 1e3, calls / took


def _cpu_s(service: ServiceProcess) -> float:
    """Seconds of CPU that a service's processes have used, those that still run."""
    ticks = 0
    for pid in (service.process.pid, *_workers(service)):
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

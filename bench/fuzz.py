"""Sends both services what no friend would send, and looks whether they mind.

A real embedder and a real predictor get messages of every method made from the contracts (whole,
mangled, and bytes that are none), concurrently; and connections that are not quite HTTP/2 or not
quite gRPC. Every answer but INTERNAL and UNKNOWN will do. What was stored before and is named by
no write is read again at the end. All of it follows from the seed; a request that met a bug is
printed, with the bytes in hexadecimal.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import strategies as st

import foretell
from bench import harness
from bench.fuzzing import kept
from bench.fuzzing.messages import READS, Request, examples, methods, requests
from bench.fuzzing.wire import Conversation, conversations, converse
from bench.harness import Budget, Figures, say
from foretell import limits
from serving.process import ServiceProcess, started

EPILOG = """
figures:
  requests          answered requests and connections
  internal          answers INTERNAL, but for internal_by_core
  unknown           answers UNKNOWN
  crashes           services that ended or cannot be reached
  unanswered        requests without an answer within 30 s
  data_changed      kept items, vectors and histories that are not what they were
  rss_growth_mb     what the service grew that grew most, from a fifth of the requests to the end
  rss_mb            its size at the end
  internal_by_core  calls that gRPC's own core could not read, which it calls INTERNAL
  codes_CODE        requests by the code of the answer
"""

CALLERS = 16
"""Requests in flight."""

ROUND = 40
"""Requests of a method in a round; in each all methods get their turn."""

CONNECTIONS = 60
"""Connections in a round."""

ANSWER_S = 30.0

WARM_UP_SHARE = 0.2
"""Of the requests, after which memory must stay flat."""

SHOWN_BYTES = 2_000
"""Of a request that met a bug."""


@dataclass
class Outcome:
    """What a run counted."""

    codes: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    by_core: int = 0
    crashes: int = 0
    unanswered: int = 0
    data_changed: int = 0
    warm_mb: dict[str, float] = field(default_factory=dict)
    rss_mb: dict[str, float] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """All that were sent."""
        return self.codes.total() + self.connections

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        bad = self.codes["INTERNAL"], self.codes["UNKNOWN"]
        return not any((*bad, self.crashes, self.unanswered, self.data_changed))

    def figures(self) -> Figures:
        """For the JSON line."""
        growth = {name: size - self.warm_mb[name] for name, size in self.rss_mb.items()}
        # Nothing, if a service crashed at once.
        memory = [(grown, self.rss_mb[name]) for name, grown in growth.items()]
        names = ("rss_growth_mb", "rss_mb")
        return {
            "requests": self.requests,
            "internal": self.codes["INTERNAL"],
            "unknown": self.codes["UNKNOWN"],
            "crashes": self.crashes,
            "unanswered": self.unanswered,
            "data_changed": self.data_changed,
            **dict(zip(names, max(memory, default=()), strict=False)),
            "internal_by_core": self.by_core,
            **{f"codes_{code.lower()}": number for code, number in sorted(self.codes.items())},
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Exit status 0: nothing was found."""
    parser = harness.parser("fuzz", __doc__ or "", 1_200)
    parser.epilog = EPILOG
    parser.add_argument("--requests", type=int, default=100_000, metavar="N",
                        help="at least so many, if time allows (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S",
                        help="what is sent follows from it (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, _services(Path(folder)) as services:
        outcome = run(services, options.requests, options.seed, Budget(options.budget_s))
    harness.finish("fuzz", harness.versions("grpcio", "protobuf", "hypothesis"), outcome.figures())
    return 0 if outcome.good else 1


@contextlib.contextmanager
def _services(folder: Path) -> Iterator[dict[str, ServiceProcess]]:
    """Both services, empty; small caches, so that memory can be flat."""
    log = folder / "log"
    flags = ["--port", "0", "--threads", "1"]
    embedder_flags = [*flags, "--data-dir", str(folder / "embedder"),
                      "--memory-cache-bytes", "1000000"]  # fmt: skip
    with started("embedder", embedder_flags, log=log) as embedder:
        more = ["--embedder", embedder.address, "--data-dir", str(folder / "predictor")]
        with started("predictor", [*flags, *more], log=log) as predictor:
            yield {"embedder": embedder, "predictor": predictor}


def run(services: dict[str, ServiceProcess], number: int, seed: int, budget: Budget) -> Outcome:
    """Sends so many requests, as long as the budget lasts and both services live."""
    addresses = {name: service.address for name, service in services.items()}
    outcome = Outcome()
    with foretell.Client(addresses["embedder"], addresses["predictor"]) as client:
        kept.put(client)
        before = kept.read(client)
        for turn in count():
            asyncio.run(_round(addresses, outcome, seed * 1_000_003 + turn))
            outcome.crashes = sum(not _lives(one) for one in services.values())
            if not outcome.crashes:
                outcome.rss_mb = {n: _rss_mb(one.process.pid) for n, one in services.items()}
            if outcome.requests <= WARM_UP_SHARE * number or not outcome.warm_mb:
                outcome.warm_mb = outcome.rss_mb
            sizes = ", ".join(f"{name} {size:.0f} MB" for name, size in outcome.rss_mb.items())
            say(f"{outcome.requests:,} of {number:,} requests; {sizes}")
            if outcome.crashes or outcome.requests >= number or not budget.left:
                break
        if not outcome.crashes:
            changed = kept.changes(before, kept.read(client))
            outcome.data_changed = len(changed)
            for name in changed:
                say(f"{name} has changed")
    return outcome


async def _round(addresses: dict[str, str], outcome: Outcome, seed: int) -> None:
    """Some requests of every method, then some connections."""
    by_service: dict[str, list[Request]] = {name: [] for name in addresses}
    everything: list[st.SearchStrategy[Request]] = []
    for method in methods():
        reading = method.name.startswith(READS)
        strategy = requests(method, kept.READABLE if reading else kept.WRITABLE)
        everything.append(strategy)
        by_service[_service(method.full_name)] += examples(strategy, ROUND, seed)
    await asyncio.gather(
        *(_send_all(addresses[name], some, outcome) for name, some in by_service.items())
    )
    talk: list[Conversation] = examples(conversations(st.one_of(everything)), CONNECTIONS, seed)
    for begin in range(0, len(talk), CALLERS):
        await asyncio.gather(
            *(
                _converse(tuple(addresses.values())[at % len(addresses)], one, outcome)
                for at, one in enumerate(talk[begin : begin + CALLERS])
            )
        )


def _service(full_name: str) -> str:
    return full_name.split(".")[1]


async def _send_all(address: str, some: list[Request], outcome: Outcome) -> None:
    size = ("grpc.max_send_message_length", limits.MESSAGE_BYTES)
    waiting = iter(some)
    async with grpc.aio.insecure_channel(address, options=[size]) as channel:

        async def caller() -> None:
            for request in waiting:  # shared: each takes the next one
                code = await _send(channel, request, outcome)
                outcome.codes[code] += 1
                if code in ("INTERNAL", "UNKNOWN"):
                    say(f"{code}: {request.method} {request.data[:SHOWN_BYTES].hex()}")

        await asyncio.gather(*(caller() for _ in range(CALLERS // 2)))


async def _send(channel: Any, request: Request, outcome: Outcome) -> str:
    """The name of the code that came back."""
    try:
        if request.streaming:
            stream = channel.unary_stream(request.method)(request.data, timeout=ANSWER_S)
            await stream.read()
            stream.cancel()
        else:
            await channel.unary_unary(request.method)(request.data, timeout=ANSWER_S)
    except grpc.aio.AioRpcError as error:
        code: str = error.code().name
        if code == "DEADLINE_EXCEEDED":
            outcome.unanswered += 1
            say(f"unanswered: {request.method} {request.data[:SHOWN_BYTES].hex()}")
        return code
    return "OK"


async def _converse(address: str, talk: Conversation, outcome: Outcome) -> None:
    outcome.connections += 1
    try:
        answers = await converse(address, talk)
    except OSError:
        return  # nobody listens: the server begins anew, or has crashed, which `run` sees
    for answer in answers:
        # gRPC's core says so of a head or a frame that it cannot read; ours come with details, and
        # those of the Python layer are UNKNOWN.
        if answer.status == grpc.StatusCode.INTERNAL.value[0] and not answer.details:
            outcome.by_core += 1
            continue
        for name in ("INTERNAL", "UNKNOWN"):
            if answer.status == grpc.StatusCode[name].value[0]:
                outcome.codes[name] += 1
                say(f"{name}: {answer} {talk.data[:SHOWN_BYTES].hex()}")


def _lives(service: ServiceProcess) -> bool:
    """Whether the process runs and says that it serves."""
    if service.process.poll() is not None:
        return False
    with grpc.insecure_channel(service.address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=ANSWER_S, wait_for_ready=True
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _rss_mb(pid: int) -> float:
    """Resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1_024
    raise RuntimeError(f"process {pid} has no memory")


if __name__ == "__main__":
    sys.exit(main())

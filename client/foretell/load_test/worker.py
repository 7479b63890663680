"""One process of the generator: sends its share of the calls and measures them."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np

from foretell._channel import ClientSettings, async_channel, call_metadata
from foretell.errors import ForetellError, UnavailableError
from foretell.load_test.schedule import Arrivals, Phase, arrivals
from foretell.load_test.tally import ANSWERED, DEGRADED, SKIPPED, Tally, record
from foretell.load_test.workload import METHODS, Workload
from foretell.predictor.v1 import prediction_service_pb2 as prediction_pb

REPORT_S: Final = 0.5
"""Pause between two reports of how it goes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a process is to do."""

    addresses: dict[str, str]
    """By service."""
    settings: ClientSettings
    workload: Workload
    arrivals: Arrivals
    share: int
    shares: int
    max_in_flight: int
    seed: int


@dataclass(slots=True)
class Progress:
    """What happened since the last report."""

    calls: int = 0
    bad: int = 0
    in_flight: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds."""


Results = dict[tuple[int, str], Tally]
"""By the phase's number and the method."""


def work(plan: Plan, parent: Connection) -> None:
    """Runs schedules until the parent sends None; talks to it by the connection.

    It says "ready", then for each (start, phases) it gets it sends Progress from time to time and
    the Results at the end; in place of any of them a ForetellError, or a bug's traceback.
    """
    # The default selector waits in whole milliseconds, by which calls would go out late.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        loop.run_until_complete(_Worker(plan, parent).serve())
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        pass  # the parent says why
    except ForetellError as error:
        with contextlib.suppress(OSError):
            parent.send(error)
    except BaseException:
        with contextlib.suppress(OSError):
            parent.send(traceback.format_exc())


class _Worker:
    def __init__(self, plan: Plan, parent: Connection) -> None:
        self._plan = plan
        self._parent = parent
        self._random = np.random.default_rng([plan.seed, plan.share])
        self._requests = plan.workload.requests(self._random)
        self._metadata = call_metadata(plan.settings.security)
        self._in_flight = 0
        self._results: Results = {}
        self._progress = Progress()

    async def serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            channels = {}
            for service in {METHODS[name].service for name in self._plan.workload.mix}:
                security = self._plan.settings.security
                channel = async_channel(
                    self._plan.addresses[service], self._plan.settings, security.credentials()
                )
                channels[service] = await stack.enter_async_context(channel)
                await self._connect(service, channel)
            calls: dict[str, Any] = {
                name: channels[METHODS[name].service].unary_unary(
                    METHODS[name].path,
                    request_serializer=lambda request: request.SerializeToString(),
                    response_deserializer=METHODS[name].answer.FromString,
                )
                for name in self._plan.workload.mix
            }
            self._parent.send("ready")
            while (order := await asyncio.to_thread(self._parent.recv)) is not None:
                reporting = asyncio.create_task(self._report())
                await self._run(calls, *order)
                reporting.cancel()
                self._parent.send(self._results)

    async def _connect(self, service: str, channel: grpc.aio.Channel) -> None:
        try:
            await asyncio.wait_for(channel.channel_ready(), self._plan.settings.timeout_s)
        except TimeoutError:
            address = self._plan.addresses[service]
            raise UnavailableError(f"the {service} at {address} cannot be reached") from None

    async def _run(self, calls: dict[str, Any], start: float, phases: Sequence[Phase]) -> None:
        """Sends what is due, from `start` (of time.monotonic) on, and waits for the answers."""
        plan = self._plan
        self._results = {}
        async with asyncio.TaskGroup() as group:
            for number, phase in enumerate(phases):
                tallies = {name: Tally() for name in plan.workload.mix}
                self._results |= {(number, name): tally for name, tally in tallies.items()}
                for offset in arrivals(phase, plan.arrivals, plan.share, plan.shares, self._random):
                    name, request = next(self._requests)
                    due = start + offset
                    # With nothing to wait for it still lets answers in.
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    self._progress.calls += 1
                    if self._in_flight >= plan.max_in_flight:
                        tallies[name].outcomes[SKIPPED] += 1
                        self._progress.bad += 1
                        continue
                    self._in_flight += 1
                    group.create_task(self._call(calls[name], request, due, tallies[name]))
                start += phase.seconds

    async def _call(self, method: Any, request: Any, due: float, tally: Tally) -> None:
        record(tally.lateness, time.monotonic() - due)
        try:
            answer = await method(
                request, timeout=self._plan.settings.timeout_s, metadata=self._metadata()
            )
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
        else:
            latency = time.monotonic() - due
            outcome = _outcome(answer)
            if outcome in (ANSWERED, DEGRADED):
                record(tally.latency, latency)
                self._progress.latencies.append(latency)
        finally:
            self._in_flight -= 1
        tally.outcomes[outcome] += 1
        self._progress.bad += outcome != ANSWERED

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            progress, self._progress = self._progress, Progress()
            progress.in_flight = self._in_flight
            self._parent.send(progress)


def _outcome(answer: Any) -> str:
    """Whether an answer is all that was asked for."""
    if isinstance(answer, prediction_pb.PredictResponse | prediction_pb.RankResponse):
        reason = answer.prediction.fallback_reason
        unavailable = prediction_pb.FALLBACK_REASON_EMBEDDER_UNAVAILABLE
        return DEGRADED if reason == unavailable else ANSWERED
    if answer.failures:
        return str(grpc_name(answer.failures[0].status.code))
    return ANSWERED


def grpc_name(number: int) -> str:
    """The name of a status code."""
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), "UNKNOWN")

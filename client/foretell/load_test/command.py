"""The command `foretell load-test`: its arguments and what it does with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import FailedPreconditionError, InvalidArgumentError, UnavailableError

if TYPE_CHECKING:
    from foretell._channel import ClientSettings
    from foretell._sync_client import Client
    from foretell.load_test.run import Generators, Measured

HELP = "send calls at given rates and report latencies; users load-test-0, ... get events"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    load = parser.add_argument_group("load")
    load.add_argument("--rate", metavar="CALLS_PER_S", default="100",
                      help="a rate (100), steps (100,200,400) or a ramp (100-400); with --find-max "
                      "where the search begins (default: %(default)s)")  # fmt: skip
    load.add_argument("--seconds", type=_number(0), default=10, metavar="S",
                      help="of each step or of the whole ramp (default: %(default)g)")  # fmt: skip
    load.add_argument("--warm-up", type=_number(-1), default=2, metavar="S",
                      help="seconds at the first rate that are not reported "
                      "(default: %(default)g)")  # fmt: skip
    load.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson",
                      help="calls at random times, as of many callers, or at equal distances "
                      "(default: %(default)s)")  # fmt: skip
    load.add_argument("--max-in-flight", type=_count, default=500, metavar="N",
                      help="calls that wait for an answer at once, of all processes; one that is "
                      "due beyond them is skipped and counted (default: %(default)s)")  # fmt: skip
    load.add_argument("--processes", type=_count, metavar="N",
                      help="that send the calls, each by connections of its own (default: one for "
                      "each 4 CPUs)")  # fmt: skip
    load.add_argument("--find-max", action="store_true",
                      help="search for the highest rate that holds --slo-p99-ms")  # fmt: skip
    load.add_argument("--slo-p99-ms", type=_number(0), metavar="MS",
                      help="the objective: 99 %% of the calls are answered in this time, and all "
                      "but 0.1 %% at all; exit status 1 where it is broken")  # fmt: skip
    calls = parser.add_argument_group("calls")
    calls.add_argument("--mix", default="predict", metavar="METHOD=WEIGHT,...",
                       help="of predict, rank, ingest, embed, search (default: "
                       "%(default)s)")  # fmt: skip
    calls.add_argument("--users", type=_count, default=1_000, metavar="N",
                       help="different ones (default: %(default)s)")  # fmt: skip
    calls.add_argument("--zipf", type=_number(-1), default=1.0, metavar="EXPONENT",
                       help="of Zipf's law, by which few users and items are in most calls; 0: "
                       "all alike (default: %(default)g)")  # fmt: skip
    calls.add_argument("--history", type=_number(-1, int), default=20, metavar="EVENTS",
                       help="that each user is given beforehand; 0: none "
                       "(default: %(default)s)")  # fmt: skip
    calls.add_argument("--clean-up", action="store_true",
                       help="delete the users and their events afterwards")  # fmt: skip
    calls.add_argument("--seed", type=_number(-1, int), default=0, metavar="N",
                       help="of all that is random (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/load-test"), metavar="FOLDER",
                        help="gets report.json and report.png (default: %(default)s)")  # fmt: skip


def _number(above: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """Numbers greater than a bound; -1 lets 0 in."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and (value > 0 or (value == 0 and above < 0)):
                return value
        least = "0 or more" if above < 0 else "greater than 0"
        raise argparse.ArgumentTypeError(f"{text!r} is no number {least}")

    return parse


def _count(text: str) -> int:
    return int(_number(0, int)(text))


def run(client: Client, options: argparse.Namespace) -> int:
    """Prepares, sends, reports; exit status 1 where an objective is broken.

    Raises:
        ForetellError: bad arguments, a service that does not answer, the extra `tools` is absent.
    """
    try:
        from rich.console import Console

        from foretell.load_test import report as reports
        from foretell.load_test.run import Generators, LiveLine
        from foretell.load_test.schedule import parse_rates
        from foretell.load_test.workload import Workload, clean_up, parse_mix, prepare
    except ModuleNotFoundError as error:
        raise FailedPreconditionError(
            f"foretell load-test needs {error.name}: pip install 'foretell[tools]'"
        ) from None

    phases = parse_rates(options.rate, options.seconds)
    if options.find_max and not options.slo_p99_ms:
        raise InvalidArgumentError(
            "--find-max needs an objective: --slo-p99-ms", field="slo_p99_ms"
        )
    if options.find_max and len(phases) > 1:
        raise InvalidArgumentError("--find-max begins at one rate, not several", field="rate")
    workload = Workload(parse_mix(options.mix), options.users, options.zipf)
    _check(client, workload.services(options.history), options)
    workload = prepare(client, workload, options.history)
    live = LiveLine()
    report: dict[str, Any] = {
        "mix": workload.mix,
        "arrivals": options.arrivals,
        "users": options.users,
        "zipf": options.zipf,
        "history": options.history,
        "max_in_flight": options.max_in_flight,
        "processes": _processes(options),
        "warm_up_s": options.warm_up,
    }
    try:
        with Generators(_plans(options, workload), live) as generators:
            report |= _measure(generators, phases, options)
    finally:
        live.close()
        if options.clean_up:
            clean_up(client, workload)
    reports.write(report, options.out)
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        console = Console(file=sys.stdout, highlight=False)
        if not console.is_terminal:
            console.width = 160
        reports.show(report, console)
        console.print(f"report.json and report.png are in {options.out}")
    if options.find_max:
        return 0 if report["max_rate"] else 1
    return 1 if any(phase.get("broken") for phase in report["phases"]) else 0


def _check(client: Client, needed: set[str], options: argparse.Namespace) -> None:
    """That the services are there: said before anything else is done."""
    for service, ask in (("predictor", client.predictor_info), ("embedder", client.embedder_info)):
        if service not in needed:
            continue
        try:
            ask()
        except UnavailableError as error:
            address = getattr(options, service)
            raise UnavailableError(
                f"the {service} at {address} cannot be reached: {error.message}"
            ) from None


def _processes(options: argparse.Namespace) -> int:
    return int(options.processes or max(1, (os.cpu_count() or 1) // 4))


def _plans(options: argparse.Namespace, workload: Any) -> list[Any]:
    from foretell.load_test.schedule import Arrivals
    from foretell.load_test.worker import Plan

    settings: ClientSettings = options.settings
    if options.timeout:
        settings = replace(settings, timeout_s=options.timeout)
    processes = _processes(options)
    if options.max_in_flight < processes:
        raise InvalidArgumentError(
            f"--max-in-flight {options.max_in_flight} is less than one for each of the "
            f"{processes} processes",
            field="max_in_flight",
        )
    return [
        Plan(
            addresses={"embedder": options.embedder, "predictor": options.predictor},
            settings=settings,
            workload=workload,
            arrivals=Arrivals(options.arrivals),
            share=share,
            shares=processes,
            max_in_flight=options.max_in_flight // processes,
            seed=int(options.seed),
        )
        for share in range(processes)
    ]


def _measure(
    generators: Generators, phases: list[Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What the report says of phases, the objective, and the search for the highest rate."""
    from foretell.load_test.find_max import broken, find_max
    from foretell.load_test.schedule import Phase

    def measure(wanted: list[Phase]) -> list[Measured]:
        rate = wanted[0].rate
        warm_up = [Phase(rate, rate, options.warm_up, measured=False)] if options.warm_up else []
        return generators.run([*warm_up, *wanted])

    slo = options.slo_p99_ms
    if options.find_max:
        rate, probes = find_max(
            lambda rate: measure([Phase(rate, rate, options.seconds)])[0], slo, phases[0].start_rate
        )
        tried = [{**one.measured.figures(), "broken": one.reasons} for one in probes]
        return {"slo_p99_ms": slo, "max_rate": rate, "phases": tried}
    measured = measure(phases)
    if not slo:
        return {"phases": [one.figures() for one in measured]}
    judged = [{**one.figures(), "broken": broken(one, slo)} for one in measured]
    return {"slo_p99_ms": slo, "phases": judged}

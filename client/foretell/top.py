"""The command `foretell top`: what both services do now, from their pages of metrics."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import FailedPreconditionError, UnavailableError

if TYPE_CHECKING:
    from rich.console import Group

    from foretell._sync_client import Client

HELP = "show what both services do now, from their pages of metrics (--metrics-port)"

TIMEOUT_S: Final = 5.0
"""For a page."""

Page = Counter[tuple[str, frozenset[tuple[str, str]]]]
"""Numbers by name and labels; those of a service's processes are added up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    known = os.environ.get("FORETELL_METRICS", "").split()
    parser.add_argument("pages", metavar="HOST:PORT", nargs="*" if known else "+", default=known,
                        help="a page of metrics; one for each process (environment: "
                        "FORETELL_METRICS, with spaces between them)")  # fmt: skip
    parser.add_argument("--interval", type=float, default=2.0, metavar="S",
                        help="seconds that rates are of (default: %(default)g)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="one picture, after one interval")


def run(client: Client, options: argparse.Namespace) -> int:
    """Shows it until Ctrl-C, or once; exit status 1 where a page did not answer.

    Raises:
        ForetellError: no page answers, or the extra `tools` is absent.
    """
    try:
        import prometheus_client.parser  # noqa: F401
        from rich.console import Console
        from rich.live import Live
    except ModuleNotFoundError as error:
        raise FailedPreconditionError(
            f"foretell top needs {error.name}: pip install 'foretell[tools]'"
        ) from None
    periods = watch(options.pages, options.interval)
    if options.once or options.json:
        figures = next(periods)
        if options.json:
            sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        else:
            Console(highlight=False).print(picture(figures))
        return 1 if figures["absent"] else 0
    with Live(auto_refresh=False, screen=True) as live:
        for figures in periods:
            live.update(picture(figures), refresh=True)
    return 0


def watch(addresses: list[str], interval_s: float) -> Iterator[dict[str, Any]]:
    """What happened in each interval, for ever.

    Raises:
        UnavailableError: no page answers at the start.
    """
    before, before_s = _look(addresses), time.monotonic()
    if before["absent"] == addresses:
        raise UnavailableError(f"no page of metrics at {', '.join(addresses)}")
    while True:
        time.sleep(interval_s)
        after, after_s = _look(addresses), time.monotonic()
        seconds = after_s - before_s
        periods = {name: Period(before[name], after[name], seconds) for name in _STATE}
        yield {
            "absent": after["absent"],
            **{
                name: {label: show(period) for label, show in _STATE[name].items()}
                for name, period in periods.items()
            },
            "calls": [
                {"service": name, **call} for name in periods for call in calls(periods[name])
            ],
        }
        before, before_s = after, after_s


def _look(addresses: list[str]) -> dict[str, Any]:
    """A service's page by its name, and the addresses where there is none."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, Any] = {"embedder": Page(), "predictor": Page(), "absent": []}
    for address in addresses:
        try:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
                families = list(text_string_to_metric_families(answer.read().decode()))
        except (OSError, ValueError):
            found["absent"].append(address)
            continue
        names = {family.name for family in families}
        page = found["embedder" if "foretell_queue_texts" in names else "predictor"]
        page["processes", frozenset()] += 1
        for family in families:
            for sample in family.samples:
                page[sample.name, frozenset(sample.labels.items())] += sample.value
    return found


@dataclass(frozen=True)
class Period:
    """Two looks at a service's page, and the seconds between them."""

    before: Page
    after: Page
    seconds: float

    def now(self, name: str, **labels: str) -> float:
        """The latest number, of all labels that are not given together."""
        return sum(value for _, value, _ in self._select(name, labels))

    def each(self, name: str) -> float:
        """The latest number where every process says the same."""
        return self.now(name) / max(self.now("processes"), 1)

    def by(self, label: str, name: str) -> dict[str, float]:
        """The latest numbers by the label."""
        return {found[label]: value for found, value, _ in self._select(name, {})}

    def rates(self, label: str, name: str) -> dict[str, float]:
        """A counter's growth per second by the label."""
        return {found[label]: gained / self.seconds for found, _, gained in self._select(name, {})}

    def rate(self, name: str, **labels: str) -> float:
        """A counter's growth per second; of a process that began anew it is taken for none."""
        return sum(gained for _, _, gained in self._select(name, labels)) / self.seconds

    def ratio(self, name: str, other: str) -> float | None:
        """One counter's growth over another's; None where that has not grown."""
        rate = self.rate(other)
        return self.rate(name) / rate if rate else None

    def quantile_ms(self, q: float, name: str, **labels: str) -> float | None:
        """Of a histogram of seconds, even within a bucket as Prometheus takes it; None: empty."""
        buckets = Counter[float]()
        for found, _, gained in self._select(f"{name}_bucket", labels):
            buckets[float(found["le"])] += gained  # type: ignore[assignment]  # floats too
        wanted, low, below = q * max(buckets.values(), default=0), 0.0, 0.0
        for edge, count in sorted(buckets.items()):
            if count >= wanted > 0:
                share = (wanted - below) / (count - below)
                return 1e3 * (low if edge == float("inf") else low + (edge - low) * share)
            low, below = edge, count
        return None

    def _select(
        self, name: str, labels: Mapping[str, str]
    ) -> Iterator[tuple[dict[str, str], float, float]]:
        """(labels, the latest number, by how much it grew) of a metric."""
        for key, value in self.after.items():
            if key[0] == name and labels.items() <= key[1]:
                yield dict(key[1]), value, max(0.0, value - self.before[key])


def calls(period: Period) -> Iterator[dict[str, Any]]:
    """A service's methods that were ever called."""
    for method in sorted(period.by("grpc_method", "grpc_server_started_total")):
        seconds = "grpc_server_handling_seconds"
        started = period.now("grpc_server_started_total", grpc_method=method)
        ended = period.rate("grpc_server_handled_total", grpc_method=method)
        good = period.rate("grpc_server_handled_total", grpc_method=method, grpc_code="OK")
        yield {
            "method": method,
            "calls/s": ended,
            "errors/s": ended - good,
            "p50 ms": period.quantile_ms(0.5, seconds, grpc_method=method),
            "p99 ms": period.quantile_ms(0.99, seconds, grpc_method=method),
            "in flight": started - period.now("grpc_server_handled_total", grpc_method=method),
        }


def _batches(name: str, unit: str) -> dict[str, Callable[[Period], Any]]:
    sizes = f"foretell_{name}_batch_{unit}"
    return {
        f"{name} p99 ms": lambda p: p.quantile_ms(0.99, f"foretell_{name}_seconds"),
        f"{unit} at once": lambda p: p.ratio(f"{sizes}_sum", f"{sizes}_count"),
    }


def _share(part: float, rest: float) -> float | None:
    return part / (part + rest) if part + rest else None


_PROCESS: Final[dict[str, Callable[[Period], Any]]] = {
    "processes": lambda p: p.now("processes"),
    "memory MiB": lambda p: p.now("process_resident_memory_bytes") / 2**20,
    "CPUs busy": lambda p: p.rate("process_cpu_seconds_total"),
}
_STATE: Final[dict[str, dict[str, Callable[[Period], Any]]]] = {
    "embedder": {
        **_PROCESS,
        "texts encoded/s": lambda p: p.rate("foretell_texts_encoded_total"),
        "cache hits": lambda p: _share(
            p.rate("foretell_texts_cached_total"), p.rate("foretell_texts_encoded_total")
        ),
        "texts waiting": lambda p: p.now("foretell_queue_texts"),
        **_batches("encode", "texts"),
        **_batches("search", "queries"),
        "items": lambda p: p.by("collection", "foretell_collection_items"),
        "index lag": lambda p: p.by("collection", "foretell_index_lag_vectors"),
    },
    "predictor": {
        **_PROCESS,
        **_batches("forward", "queries"),
        "predictions/s": lambda p: p.rates("fallback_reason", "foretell_predictions_total"),
        "model": lambda p: ", ".join(p.by("version", "foretell_model_info")),
        "embedder available": lambda p: p.each("foretell_embedder_available"),
        "events": lambda p: p.each("foretell_events"),
        "users": lambda p: p.each("foretell_users"),
        "texts without vector": lambda p: p.each("foretell_pending_texts"),
        "text lag s": lambda p: p.each("foretell_text_lag_seconds"),
    },
}
"""What is shown of each service."""


def picture(figures: Mapping[str, Any]) -> Group:
    """For the terminal."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("service", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("calls/s", "errors/s", "p50 ms", "p99 ms", "in flight"):
        table.add_column(name, justify="right", no_wrap=True)
    for call in figures["calls"]:
        style = "red" if call["errors/s"] else "" if call["calls/s"] else "dim"
        table.add_row(*map(_cell, call.values()), style=style)
    panels = []
    for service in _STATE:
        lines = Table.grid(padding=(0, 2))
        for name, value in figures[service].items():
            lines.add_row(name, _cell(value))
        panels.append(Panel(lines, title=service))
    absent = [f"[red]no page at {page}[/red]" for page in figures["absent"]]
    return Group(*absent, Columns(panels), table)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float() if value % 1 and abs(value) < 100:
            return f"{value:.2f}"
        case float() | int():
            return f"{value:,.0f}"
        case Mapping():
            return "\n".join(f"{name} {_cell(number)}" for name, number in value.items())
    return str(value)

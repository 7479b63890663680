"""What became of the calls of a phase; generators' tallies add up to one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from hdrh.histogram import HdrHistogram

MAX_MICROSECONDS: Final = 300_000_000
DIGITS: Final = 3
"""Latencies are kept to three digits, up to five minutes."""

ANSWERED, DEGRADED, SKIPPED = "OK", "DEGRADED", "SKIPPED"

QUANTILES: Final = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p999_ms": 99.9}


def histogram() -> Any:
    """An empty one, of microseconds."""
    return HdrHistogram(1, MAX_MICROSECONDS, DIGITS)


def record(into: Any, seconds: float) -> None:
    """Counts a time."""
    into.record_value(min(max(int(seconds * 1e6), 1), MAX_MICROSECONDS))


class Tally:
    """Counts of outcomes and times of a method's calls in a phase."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        """Calls by OK, DEGRADED (answered by a fallback because the embedder did not answer),
        SKIPPED (not sent: too many were in flight) or the status code."""
        self.latency = histogram()
        """Of answered calls, from when they were due."""
        self.lateness = histogram()
        """By which the generator sent calls late: the part of the latency that is its own."""

    def add(self, other: Tally) -> None:
        """Adds another's."""
        self.outcomes += other.outcomes
        self.latency.add(other.latency)
        self.lateness.add(other.lateness)

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """All together."""
        total = cls()
        for tally in tallies:
            total.add(tally)
        return total

    def __getstate__(self) -> tuple[Counter[str], bytes, bytes]:
        return self.outcomes, self.latency.encode(), self.lateness.encode()

    def __setstate__(self, state: tuple[Counter[str], bytes, bytes]) -> None:
        self.outcomes = state[0]
        self.latency, self.lateness = map(HdrHistogram.decode, state[1:])

    @property
    def calls(self) -> int:
        """How many were due."""
        return self.outcomes.total()

    @property
    def bad(self) -> int:
        """Calls without a full answer: skipped, failed or degraded."""
        return self.calls - self.outcomes[ANSWERED]

    def figures(self, rate: float, seconds: float) -> dict[str, Any]:
        """As one row of the report.

        Args:
            rate: calls per second that were due.
            seconds: of the phase.
        """
        answered = self.outcomes[ANSWERED] + self.outcomes[DEGRADED]
        failed = {
            name: count
            for name, count in sorted(self.outcomes.items())
            if name not in (ANSWERED, DEGRADED, SKIPPED)
        }
        return {
            "rate": rate,
            "answered_s": answered / seconds,
            **quantiles(self.latency),
            "max_ms": self.latency.get_max_value() / 1e3 if answered else None,
            "calls": self.calls,
            "degraded": self.outcomes[DEGRADED],
            "skipped": self.outcomes[SKIPPED],
            "failed": sum(failed.values()),
            "failures": failed,
            "late_p99_ms": quantiles(self.lateness)["p99_ms"],
        }


def quantiles(of: Any) -> dict[str, float | None]:
    """Milliseconds; None where nothing was counted."""
    if not of.get_total_count():
        return dict.fromkeys(QUANTILES)
    values: Mapping[float, int] = of.get_percentile_to_value_dict(list(QUANTILES.values()))
    return {name: values[percent] / 1e3 for name, percent in QUANTILES.items()}

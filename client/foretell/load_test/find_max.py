"""The search for the highest rate that holds an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from foretell.load_test.run import Measured
from foretell.load_test.tally import quantiles

PRECISION: Final = 0.05
"""How far above the rate that is found a rate is known to fail."""

MAX_PROBES: Final = 30
MIN_RATE: Final = 0.1
"""Calls per second, below which the search ends without a result."""

BAD_SHARE: Final = 0.001
"""Calls without a full answer, of all; more of them break every objective."""

LATE_SHARE: Final = 0.5
"""Part of the objective by which the generator may itself be late at p99."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A rate that was tried."""

    measured: Measured
    reasons: tuple[str, ...]
    """Why it does not hold the objective; empty where it does."""

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.measured.phase.rate


def broken(measured: Measured, slo_p99_ms: float) -> tuple[str, ...]:
    """Why a phase does not hold the objective, in words; empty where it does.

    Calls without a full answer count: what was skipped or refused has no latency.
    """
    total = measured.total
    if not total.calls:
        return ("no calls were due",)
    reasons = []
    p99_ms = quantiles(total.latency)["p99_ms"]
    late_ms = quantiles(total.lateness)["p99_ms"]
    if p99_ms is not None and p99_ms > slo_p99_ms:
        reasons.append(f"p99 is {p99_ms:.1f} ms")
    if total.bad > BAD_SHARE * total.calls:
        reasons.append(f"{total.bad / total.calls:.1%} of the calls without a full answer")
    if late_ms is not None and late_ms > LATE_SHARE * slo_p99_ms:
        reasons.append(f"the generator itself was {late_ms:.1f} ms late at p99")
    return tuple(reasons)


def bounds(probes: Sequence[Probe]) -> tuple[float, float]:
    """The highest rate that held below all that failed (0: none), and the lowest that failed."""
    failed = min((probe.rate for probe in probes if probe.reasons), default=math.inf)
    held = (probe.rate for probe in probes if not probe.reasons and probe.rate < failed)
    return max(held, default=0.0), failed


def find_max(
    measure: Callable[[float], Measured], slo_p99_ms: float, first: float
) -> tuple[float | None, list[Probe]]:
    """Doubles or halves the rate until the objective breaks or holds, then bisects; the rate that
    is found has held twice, unless MAX_PROBES came first.

    Args:
        measure: sends calls at a rate.
        slo_p99_ms: the objective: 99 % of the calls are answered in this time.
        first: calls per second to begin with.

    Returns:
        The rate, None where none held; and all that was tried, in order.
    """
    probes: list[Probe] = []
    rate = first
    while len(probes) < MAX_PROBES and rate >= MIN_RATE:
        measured = measure(rate)
        probes.append(Probe(measured, broken(measured, slo_p99_ms)))
        held, failed = bounds(probes)
        if math.isinf(failed):
            rate = held * 2
        elif not held:
            rate = failed / 2
        elif failed > held * (1 + PRECISION):
            rate = math.sqrt(held * failed)
        elif sum(probe.rate == held for probe in probes) < 2:
            rate = held
        else:
            break
    return bounds(probes)[0] or None, probes

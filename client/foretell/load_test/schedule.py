"""When calls are due."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError

RAMP_PHASES: Final = 10
"""Phases that a ramp is reported in."""

_NUMBER = r"(\d+(?:\.\d+)?)"


class Arrivals(StrEnum):
    """How calls follow one another at a given rate."""

    POISSON = "poisson"
    """Independently, as from many callers who know nothing of each other."""
    CONSTANT = "constant"
    """At equal distances."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time, over which the rate goes from one value to another evenly."""

    start_rate: float
    """Calls per second."""
    end_rate: float
    seconds: float
    measured: bool = True
    """Whether its calls are reported."""

    @property
    def rate(self) -> float:
        """The mean."""
        return (self.start_rate + self.end_rate) / 2


def parse_rates(text: str, seconds: float) -> list[Phase]:
    """The phases of `--rate`: 100, or steps 100,200,400, or a ramp 100-400.

    Args:
        text: calls per second.
        seconds: of each step, or of the whole ramp.

    Raises:
        InvalidArgumentError: it is none of them, or a rate is 0.
    """
    ramp = re.fullmatch(f"{_NUMBER}-{_NUMBER}", text)
    if ramp:
        edges = np.linspace(float(ramp[1]), float(ramp[2]), RAMP_PHASES + 1).tolist()
        phases = [Phase(start, end, seconds / RAMP_PHASES) for start, end in pairwise(edges)]
    elif re.fullmatch(f"{_NUMBER}(,{_NUMBER})*", text):
        phases = [Phase(float(rate), float(rate), seconds) for rate in text.split(",")]
    else:
        phases = []
    if not phases or not all(phase.rate > 0 for phase in phases):
        raise InvalidArgumentError(
            f"--rate: {text!r} is neither a rate (100), steps (100,200,400) nor a ramp (100-400) "
            "of calls per second greater than 0",
            reason="BAD_RATE",
            field="rate",
        )
    return phases


def arrivals(
    phase: Phase, kind: Arrivals, share: int, shares: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """When one of several generators sends its calls: seconds from the phase's start, ascending.

    Together the generators send at the phase's rate: a Poisson process is the sum of independent
    ones, equal distances are dealt out in turn.

    Args:
        phase: the rates.
        kind: how calls follow one another.
        share: which generator, from 0.
        shares: how many there are.
        random: of this generator alone.
    """
    calls = phase.rate * phase.seconds
    if kind is Arrivals.CONSTANT:
        due = np.arange(share, calls, shares, dtype=np.float64)
    else:
        # Given their number, a Poisson process's points are independent and uniform.
        due = np.sort(random.uniform(0, calls, random.poisson(calls / shares)))
    # `due` counts calls; the time at which that many were due solves
    # start_rate t + slope t^2 / 2 = due, here without cancellation where the slope is small.
    slope = (phase.end_rate - phase.start_rate) / phase.seconds
    root = np.sqrt(np.maximum(phase.start_rate**2 + 2 * slope * due, 0))
    return 2 * due / np.maximum(phase.start_rate + root, 1e-12)

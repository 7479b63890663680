"""What a check of the data finds, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from predictor.models.history import Ints

Mask = NDArray[np.bool_]

EXAMPLES = 3
"""Ids that stand for all: enough to look into the source."""


@dataclass(frozen=True)
class Finding:
    """One thing that is odd about the data."""

    name: str
    """For programs and headings, e.g. `bursts`."""
    found: str
    """What, and how much of it; a sentence without its full stop. It has no text of a user."""
    kept: str
    """What becomes of it, unless cleaning drops it."""
    events: Mask | None = None
    """(events,) which it touches, in the order of the source; None: it is not of events."""
    drops: bool = False
    """Whether cleaning drops these events."""
    noise: bool = False
    """Whether ignoring it costs what these events do to predictions of others, as `drops` does."""
    examples: Sequence[str] = ()
    """Ids, at most EXAMPLES."""


def share(part: float) -> str:
    """For people: a part of 1 in percent."""
    percent = 100 * part
    return "none" if part == 0 else f"{percent:.1f} %" if percent >= 0.1 else "below 0.1 %"


def counted(some: int, of: int, unit: str) -> str:
    """For people: "12 of 3,400 events (0.4 %)"."""
    return f"{some:,} of {of:,} {unit}" + (f" ({share(some / of)})" if some else "")


def most_frequent(codes: Ints, names: Sequence[str]) -> tuple[str, ...]:
    """Up to EXAMPLES names, those whose codes (not below 0) occur most often first."""
    counts = np.bincount(codes, minlength=1)
    best = np.argsort(-counts, kind="stable")[:EXAMPLES]
    return tuple(names[at] for at in best if counts[at])


def pairs(first: Ints, second: Ints) -> Ints:
    """(events,) one number for two, in their order: sorting it is faster than sorting rows.

    Users times seconds of a century stay below 2**63 up to two thousand million users.
    """
    if not len(first):
        return first
    low = int(second.min())
    numbers: Ints = first * (int(second.max()) - low + 1) + (second - low)
    return numbers

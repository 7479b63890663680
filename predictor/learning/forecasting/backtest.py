"""What forecasts would have been worth: made again at earlier instants, beside simple rules.

Rolling origin (Tashman, 2000, "Out-of-sample tests of forecasting accuracy"): at each of several
cuts the periods before it are known and those after it are forecast. The method is chosen on the
earlier cuts and measured on the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretell.errors import InvalidArgumentError
from predictor.learning.forecasting.periods import Floats, Ints
from predictor.learning.forecasting.smoothing import FORGETTING, Smoothing, Spread

OWN = "foretell"
"""Name of the forecast among the methods of a report."""

CUTS = 8
"""At most, to choose the method on, and again to measure on."""

COVERAGES = (0.8, 0.95)
"""Of the intervals."""

DRAWS = 1_000
"""Of the bootstrap."""
FEW_SERIES = 10
"""Fewer say nothing about others: no interval is given then."""


@dataclass(frozen=True)
class Backtest:
    """The method that all cuts choose, and what such a choice was worth."""

    method: Smoothing
    spread: Spread
    """Of its errors at all cuts."""
    report: dict[str, Any]
    """`cuts` (how many were measured on), `methods` (metrics by name, the OWN first) and `beats`
    (by simple rule: see `compare`)."""


def backtest(
    counts: Floats, days: Floats, groups: Ints, horizon: int, season: int | None
) -> Backtest:
    """Chooses a method and measures it.

    Args:
        counts: (series, periods).
        days: (periods,) length of each.
        groups: see Smoothing.forecast.
        horizon: periods to forecast.
        season: periods of a season, if there may be one.

    Raises:
        InvalidArgumentError: there are fewer periods than two cuts need.
    """
    periods = counts.shape[1]
    if periods < horizon + 2:
        raise InvalidArgumentError(
            f"the events cover {periods} whole periods; a forecast of {horizon} that is checked "
            f"needs {horizon + 2} at least: take shorter periods or a smaller horizon",
            reason="TOO_FEW_PERIODS",
            field="period",
        )
    # A horizon apart, unless the first would then lie in the first half of the periods.
    step = max(1, min(horizon, periods // 2 // (2 * CUTS)))
    cuts = range(periods - horizon, 0, -step)[::-1]
    tests = cuts[-min(CUTS, (len(cuts) + 1) // 2) :]
    trials = cuts[: -len(tests)][-CUTS:]

    def at(method: Smoothing, cuts: Sequence[int]) -> Floats:
        """(cuts, series, horizon)."""
        made = [method.forecast(counts[:, :cut], days[: cut + horizon], groups) for cut in cuts]
        return np.stack(made)

    def true(cuts: Sequence[int]) -> Floats:
        return np.stack([counts[:, cut : cut + horizon] for cut in cuts])

    usable = season if season is not None and trials[0] >= 2 * season else None
    seasons = [None] if usable is None else [None, usable]
    candidates = [Smoothing(rate, each) for each in seasons for rate in FORGETTING]

    def best(cuts: Sequence[int]) -> Smoothing:
        return min(candidates, key=lambda each: float(np.abs(at(each, cuts) - true(cuts)).sum()))

    tried = best(trials)
    spread = Spread.of(at(tried, trials), true(trials))
    expected, happened = at(tried, tests), true(tests)
    changes = np.diff(counts[:, : tests[0]], axis=1) if tests[0] > 1 else np.zeros((len(counts), 0))
    own = measure(expected, happened, changes)
    for coverage in COVERAGES:
        low, high = spread.interval(expected, coverage)
        within = (low <= happened) & (happened <= high)
        own[f"coverage_{coverage * 100:.0f}"] = float(within.mean())
    rules = simple_rules(counts, tests, horizon, season)
    methods = {OWN: own} | {name: measure(made, happened, changes) for name, made in rules.items()}
    every = [*trials, *tests]
    chosen = best(every)
    return Backtest(
        chosen,
        Spread.of(at(chosen, every), true(every)),
        {
            "cuts": len(tests),
            "methods": methods,
            "beats": {
                name: compare(expected, made, happened, changes) for name, made in rules.items()
            },
        },
    )


def simple_rules(
    counts: Floats, cuts: Sequence[int], horizon: int, season: int | None
) -> dict[str, Floats]:
    """What needs no model, each (cuts, series, horizon): the last period again, the mean of the
    last four, and, where a season has gone by, the same period of the last one."""

    def flat(periods: int) -> Floats:
        means = [counts[:, max(0, cut - periods) : cut].mean(axis=1) for cut in cuts]
        return np.repeat(np.stack(means)[:, :, None], horizon, axis=2)

    rules = {"last_period": flat(1), "mean_of_last_4": flat(4)}
    if season is not None and cuts[0] >= season:
        steps = np.arange(horizon) % season
        rules["seasonal_naive"] = np.stack([counts[:, cut - season + steps] for cut in cuts])
    return rules


def measure(expected: Floats, happened: Floats, changes: Floats) -> dict[str, float | None]:
    """Metrics of forecasts (cuts, series, horizon).

    WAPE (sum of absolute errors / sum of events) and bias (sum of errors / sum of events) over all
    series; MAE in events; MASE and RMSSE (Hyndman and Koehler, 2006) are means over the series that
    have changed: their error over that of the last-period rule, one period ahead, before the cuts.
    None where there is nothing to divide by.

    Args:
        changes: (series, periods - 1) differences between neighbouring periods before the cuts.
    """
    error = expected - happened
    total = happened.sum()
    absolute = np.abs(changes).mean(axis=1) if changes.shape[1] else np.zeros(len(changes))
    moved = absolute > 0
    found: dict[str, float | None] = {
        "wape": float(np.abs(error).sum() / total) if total else None,
        "bias": float(error.sum() / total) if total else None,
        "mae": float(np.abs(error).mean()),
        "mase": None,
        "rmsse": None,
    }
    if moved.any():
        squared = (changes[moved] ** 2).mean(axis=1)
        own = error[:, moved]
        found["mase"] = float((np.abs(own).mean(axis=(0, 2)) / absolute[moved]).mean())
        found["rmsse"] = float(np.sqrt((own**2).mean(axis=(0, 2)) / squared).mean())
    return found


def compare(
    ours: Floats, theirs: Floats, happened: Floats, changes: Floats, seed: int = 42
) -> dict[str, float | None]:
    """How much better a forecast is than another, on the same series and periods.

    `wape_gain` and `rmsse_gain` are their metric less ours, each with `_low` and `_high`, its 95 %
    interval by a bootstrap that draws whole series, since a series' periods are alike (None with
    fewer than FEW_SERIES). It says what other series would show in these same periods, not what
    other periods would. `better` and `worse` are shares of the series by their absolute error.

    Args:
        changes: see measure.
    """
    errors = np.stack([theirs, ours]) - happened
    absolute = np.abs(errors).sum(axis=(1, 3))  # (2, series)
    events = happened.sum(axis=(0, 2))
    gain = absolute[0] - absolute[1]
    found: dict[str, float | None] = {
        "better": float((gain > 0).mean()),
        "worse": float((gain < 0).mean()),
    }
    found |= _ratio("wape_gain", gain, events, seed)
    moved = np.abs(changes).sum(axis=1) > 0
    squared = (errors[:, :, moved] ** 2).mean(axis=(1, 3))
    scaled = np.sqrt(squared / (changes[moved] ** 2).mean(axis=1)) if moved.any() else squared
    return found | _ratio("rmsse_gain", scaled[0] - scaled[1], np.ones(moved.sum()), seed)


def _ratio(name: str, gain: Floats, weight: Floats, seed: int) -> dict[str, float | None]:
    """Sum of gains over sum of weights (series,), with its interval."""
    some = (weight > 0) | (gain != 0)
    gain, weight = gain[some], weight[some]
    total = weight.sum()
    low = high = None
    if total and len(gain) >= FEW_SERIES:
        rng = np.random.default_rng(seed)
        draws = (rng.integers(len(gain), size=len(gain)) for _ in range(DRAWS))
        sums = np.array([(gain[drawn].sum(), weight[drawn].sum()) for drawn in draws])
        ratios = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
        low, high = np.quantile(ratios, [0.025, 0.975]).tolist()
    mean = float(gain.sum() / total) if total else None
    return {name: mean, f"{name}_low": low, f"{name}_high": high}

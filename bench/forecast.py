"""Expected demand beside simple rules, on the held-back weeks and days of The Complete Journey.

Forecasts are made at eight instants near the end of the year, a week apart, each from what was
before it; the method is chosen at the eight before them (predictor.learning.forecasting.backtest).
LEVEL is

- department_week, category_week: all departments, all categories, four weeks ahead
- item_week: the 2,000 products most bought before the first of the instants, four weeks ahead
- all_items_week: every product of the catalogue, sold or not, four weeks ahead
- department_day, category_day: seven days ahead

Figures:

- LEVEL_METHOD_{wape,bias,mae,mase,rmsse}: METHOD is foretell, last_period, mean_of_last_4, and on
  days seasonal_naive, the same day of the week before. The year has no week of an earlier year.
- LEVEL_coverage_{80,95}: shares of the counts within the intervals, which should be 0.80 and 0.95.
- LEVEL_over_RULE_{wape,rmsse}: the rule's metric less foretell's, with _low and _high, its 95 %
  interval over series (they share these same weeks, so it says nothing of other weeks).
- LEVEL_series, LEVEL_seconds: choosing, measuring, and one forecast.

Levels that the budget does not reach are None.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import datasets, harness
from bench.harness import Budget, Figures, say
from predictor.learning.forecasting.backtest import CUTS, OWN, backtest
from predictor.learning.forecasting.demand import ITEM, Demand, demand_of
from predictor.learning.forecasting.periods import Period
from predictor.learning.sources import Source, read_files

METRICS = ("wape", "bias", "mae", "mase", "rmsse")


@dataclass(frozen=True)
class Level:
    """What is forecast."""

    by: str
    period: str
    horizon: int
    most_bought: int | None = None
    """Only so many series, those with the most events before the first instant."""


LEVELS = {
    "department_week": Level("department", "week", 4),
    "category_week": Level("category", "week", 4),
    "item_week": Level(ITEM, "week", 4, most_bought=2_000),
    "department_day": Level("department", "day", 7),
    "category_day": Level("category", "day", 7),
    "all_items_week": Level(ITEM, "week", 4),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = harness.parser("forecast", f"{__doc__}\n{datasets.HELP}", budget_s=600)
    options: argparse.Namespace = parser.parse_args(arguments)
    budget = Budget(options.budget_s)
    load = harness.load()
    files = datasets.files("journey", Path(), options.cache_dir)
    source = read_files(files.events, files.items)
    figures: Figures = {"load_before": load}
    for name, level in LEVELS.items():
        if not budget.left:
            say(f"{name}: beyond the budget")
            figures[f"{name}_{OWN}_wape"] = None
            continue
        figures |= measured(name, level, source)
    harness.finish("forecast", harness.versions("numpy", "scipy"), figures)
    return 0


def measured(name: str, level: Level, source: Source) -> Figures:
    """The figures of a level; says them as a table."""
    period = Period(level.period)
    demand = most_bought(demand_of(source, level.by, period), level)
    days = np.diff(demand.calendar.edges).astype(np.float64)
    coming = np.diff(demand.calendar.after(level.horizon)).astype(np.float64)
    begun = time.perf_counter()
    found = backtest(demand.counts, days, demand.groups, level.horizon, period.season)
    found.method.forecast(demand.counts, np.append(days, coming), demand.groups)
    seconds = time.perf_counter() - begun
    figures: Figures = {f"{name}_series": len(demand.names), f"{name}_seconds": seconds}
    methods = found.report["methods"]
    for method, metrics in methods.items():
        figures |= {f"{name}_{method}_{metric}": metrics[metric] for metric in METRICS}
    figures |= {f"{name}_{each}": methods[OWN][each] for each in ("coverage_80", "coverage_95")}
    for rule, gains in found.report["beats"].items():
        for metric in ("wape", "rmsse"):
            figures |= {
                f"{name}_over_{rule}_{metric}{end}": gains[f"{metric}_gain{end}"]
                for end in ("", "_low", "_high")
            }
    columns = (*METRICS, "coverage_80", "coverage_95")
    rows = {
        method: {each: f"{metrics[each]:.4f}" for each in columns if metrics.get(each) is not None}
        for method, metrics in methods.items()
    }
    say(f"{name}: {len(demand.names):,} series, {seconds:.1f} s, {found.method}")
    say(harness.table(columns, rows))
    return figures


def most_bought(demand: Demand, level: Level) -> Demand:
    """Those series alone that the level asks for."""
    if level.most_bought is None:
        return demand
    before = demand.counts.shape[1] - level.horizon - 2 * CUTS + 1
    events = demand.counts[:, :before].sum(axis=1)
    rows = np.sort(np.argsort(-events, kind="stable")[: level.most_bought])
    return replace(
        demand,
        names=[demand.names[row] for row in rows],
        counts=demand.counts[rows],
        groups=demand.groups[rows],
    )


if __name__ == "__main__":
    sys.exit(main())

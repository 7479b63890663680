"""`python -m predictor forecast`."""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from foretell.errors import InvalidArgumentError
from predictor.learning import sources
from predictor.learning.forecasting.backtest import COVERAGES, Backtest, backtest
from predictor.learning.forecasting.demand import ITEM, Demand, demand_of
from predictor.learning.forecasting.periods import Days, Floats, Period
from predictor.learning.measures.comparison import text_table
from predictor.learning.options import positive

REASONS = ("own events", "no events yet: as others that had none", "no events yet, nor any others")
"""What a forecast rests on."""

COLUMNS = (
    "period_start", "period_end", "expected", "low_80", "high_80", "low_95", "high_95", "reason",
)  # fmt: skip
"""Of the file, after the name of what is forecast."""


def add_forecast(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    command = commands.add_parser(
        "forecast", help="expected demand of coming periods", description=forecast.__doc__
    )
    command.add_argument("--events", type=Path, required=True, metavar="FILE",
                         help="CSV or Parquet with user_id, behavior_type, item_id, "
                         "timestamp")  # fmt: skip
    command.add_argument("--items", type=Path, metavar="FILE", help="CSV or Parquet: item_id, "
                         "text, attributes; items without events are forecast too")  # fmt: skip
    command.add_argument("--by", default=ITEM, metavar="WHAT", help="item, or an attribute of the "
                         "items, such as category (default: %(default)s)")  # fmt: skip
    command.add_argument("--period", default="week", metavar="LENGTH", help="day, week, month, or "
                         "a number of days such as 14d; in UTC (default: %(default)s)")  # fmt: skip
    command.add_argument("--horizon", type=positive, default=1, metavar="N",
                         help="how many coming periods (default: %(default)s)")  # fmt: skip
    command.add_argument("--behavior-type", nargs="+", default=(), metavar="TYPE",
                         help="events that count as demand (default: all)")  # fmt: skip
    command.add_argument("--out", type=Path, required=True, metavar="FILE",
                         help="CSV to write")  # fmt: skip
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=forecast, show=show)


def forecast(options: argparse.Namespace) -> dict[str, Any]:
    """Writes how many events each item or category is expected to have in coming periods, with the
    intervals that hold 80 and 95 of 100 counts, and shows what the same forecasts would have been
    worth earlier, beside simple rules. Begins with the first period that the events do not cover
    whole.
    """
    _check_writable(options.out)
    period = Period(options.period)
    source = sources.read_files(options.events, options.items, progress=True)
    demand = demand_of(source, options.by, period, options.behavior_type)
    coming = demand.calendar.after(options.horizon)
    edges = np.concatenate([demand.calendar.edges, coming[1:]])
    days = np.diff(edges).astype(np.float64)
    known = len(demand.calendar)
    tested = backtest(demand.counts, days[:known], demand.groups, options.horizon, period.season)
    expected = tested.method.forecast(demand.counts, days, demand.groups)
    _write(options.out, options.by, demand, coming, expected, tested)
    return {
        "out": str(options.out),
        "by": options.by,
        "period": period.name,
        "horizon": options.horizon,
        "series": len(demand.names),
        "series_without_events": int((demand.counts.sum(axis=1) == 0).sum()),
        "periods": known,
        "from": str(demand.calendar.edges[0]),
        "forecast_from": str(coming[0]),
        "forecast_to": str(coming[-1]),
        "expected_events": float(expected.sum()),
        "forgetting": tested.method.forgetting,
        "season": tested.method.season,
        "notes": list(demand.notes),
        **tested.report,
    }


def _check_writable(path: Path) -> None:
    """Before minutes of work are done for a file that cannot be written."""
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else "is in no folder that exists"
        raise InvalidArgumentError(f"--out {path} {why}", reason="BAD_PATH", field="out")


def _write(
    path: Path, by: str, demand: Demand, coming: Days, expected: Floats, tested: Backtest
) -> None:
    """A line for each series and period, the whole file or none of it."""
    ends = [end for each in COVERAGES for end in tested.spread.interval(expected, each)]
    events = demand.counts.sum(axis=1)
    starts = [str(day) for day in coming]
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    os.close(handle)
    written = Path(name)
    try:
        with written.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("item_id" if by == ITEM else by, *COLUMNS))
            for row, series in enumerate(demand.names):
                new = 0 if events[row] else 1 if expected[row].any() else 2
                for step, (start, end) in enumerate(itertools.pairwise(starts)):
                    bounds = (int(each[row, step]) for each in ends)
                    mean = f"{expected[row, step]:.4g}"
                    writer.writerow((series, start, end, mean, *bounds, REASONS[new]))
        written.chmod(0o644)  # as if it had been opened under its name
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


_METRICS = ("wape", "bias", "mae", "mase", "rmsse", "coverage_80", "coverage_95")


def show(result: dict[str, Any]) -> str:
    """The result as plain text."""
    period = result["period"]
    season = f", seasons of {result['season']} periods" if result["season"] else ", no season"
    lines = [
        f"{result['series']:,} series ({result['series_without_events']:,} without events), "
        f"{result['periods']} periods ({period}) from {result['from']}",
        *result["notes"],
        f"each period weighs {result['forgetting']:.0%} less than the one after it{season}",
        "",
        text_table(f"Forecasts at earlier instants: {result['cuts']}", _METRICS, result["methods"]),
        "",
    ]
    lines.append("Gains over the simple rules, with 95 % intervals over series")
    for name, found in result["beats"].items():
        gains = [f"{each} {_gain(found, each)}" for each in ("wape", "rmsse")]
        share = f"better in {found['better']:.0%} of the series, worse in {found['worse']:.0%}"
        lines.append(f"  {name}: {', '.join(gains)}; {share}")
    lines.append("")
    lines.append(
        f"{result['expected_events']:,.0f} events expected from {result['forecast_from']} up to "
        f"{result['forecast_to']}, each by name in {result['out']}"
    )
    return "\n".join(lines)


def _gain(found: dict[str, float | None], metric: str) -> str:
    gain, low, high = (found[f"{metric}_gain{end}"] for end in ("", "_low", "_high"))
    if gain is None:
        return "-"
    return f"{gain:+.4f}" + ("" if low is None else f" ({low:+.4f} to {high:+.4f})")

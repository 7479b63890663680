"""The report of a load test: a table, JSON, and a picture of rate against latency."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]
"""What report.json holds: `phases` (figures by phase, see Tally.figures), the settings, and with an
objective `slo_p99_ms`; after a search `max_rate`."""

_COLUMNS: Final = {
    "calls/s": ("rate", "{:,.1f}"),
    "answered/s": ("answered_s", "{:,.1f}"),
    "p50 ms": ("p50_ms", "{:,.2f}"),
    "p90": ("p90_ms", "{:,.2f}"),
    "p99": ("p99_ms", "{:,.2f}"),
    "p99.9": ("p999_ms", "{:,.2f}"),
    "max": ("max_ms", "{:,.2f}"),
    "degraded": ("degraded", "{:,}"),
    "skipped": ("skipped", "{:,}"),
    "failed": ("failed", "{:,}"),
    "late p99": ("late_p99_ms", "{:,.2f}"),
}

_LINES: Final = {"p50": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}


def show(report: Report, console: Console) -> None:
    """Prints the table; with several methods a row for each below that of all."""
    table = Table(box=None, pad_edge=False)
    for name in ("", *_COLUMNS):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for phase in report["phases"]:
        table.add_row("all", *_cells(phase))
        if len(phase["methods"]) > 1:
            for name, figures in phase["methods"].items():
                table.add_row(f"  {name}", *_cells(figures), style="dim")
    console.print(table)
    for phase in report["phases"]:
        failures = ", ".join(f"{count:,} {name}" for name, count in phase["failures"].items())
        if failures:
            console.print(f"{phase['rate']:,.1f} calls/s: failed were {failures}")
        for reason in phase.get("broken", ()):
            console.print(f"{phase['rate']:,.1f} calls/s: {reason}")
    if "max_rate" in report:
        console.print(
            f"{report['max_rate']:,.1f} calls/s is the highest rate that holds "
            f"p99 <= {report['slo_p99_ms']:g} ms"
            if report["max_rate"]
            else f"no rate holds p99 <= {report['slo_p99_ms']:g} ms"
        )


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [
        "-" if figures[key] is None else form.format(figures[key])
        for key, form in _COLUMNS.values()
    ]


def write(report: Report, folder: Path) -> None:
    """Writes report.json and report.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    plot(report).savefig(folder / "report.png", dpi=120)


def plot(report: Report) -> Figure:
    """Rate against latency, both logarithmic."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    phases = sorted(
        (phase for phase in report["phases"] if phase["p50_ms"] is not None),
        key=lambda phase: float(phase["rate"]),
    )
    rates = [phase["rate"] for phase in phases]
    for label, key in _LINES.items():
        axes.plot(rates, [phase[key] for phase in phases], marker="o", label=label)
    incomplete = [one for one in phases if one["skipped"] or one["failed"] or one["degraded"]]
    if incomplete:
        axes.scatter(
            [phase["rate"] for phase in incomplete],
            [phase["p99_ms"] for phase in incomplete],
            s=120,
            c="black",
            marker="x",
            label="some calls without a full answer",
            zorder=3,
        )
    if report.get("slo_p99_ms"):
        axes.axhline(report["slo_p99_ms"], color="gray", linestyle="--", label="objective of p99")
    if report.get("max_rate"):
        axes.axvline(report["max_rate"], color="gray", linestyle=":", label="highest rate")
    axes.set(xlabel="calls per second", ylabel="latency, ms")
    if phases:  # nothing cannot be drawn on a logarithmic scale
        axes.set(xscale="log", yscale="log")
        axes.legend()
    axes.set_title(", ".join(f"{name} {share:.0%}" for name, share in report["mix"].items()))
    axes.grid(visible=True, which="both", alpha=0.3)
    return figure

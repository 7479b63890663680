"""The demo's report: for the terminal (rich) and as a page (report.html)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import foretell

LINES = 6
"""Lines of a basket that are shown."""


@dataclass(frozen=True)
class Line:
    """One event, for people."""

    behavior_type: str
    text: str


@dataclass(frozen=True)
class Basket:
    """Events of one time."""

    title: str
    lines: Sequence[Line]
    more: int
    """Lines that are not shown."""


@dataclass(frozen=True)
class RankedItem:
    """An item of an answer, for people."""

    item_id: str
    text: str
    interest_score: float
    probability: float
    known: bool
    """Whether the user had it before."""


@dataclass(frozen=True)
class Profile:
    """What one user did, and is predicted to do."""

    user_id: str
    baskets: Sequence[Basket]
    """Newest first."""
    prediction: foretell.Prediction
    items: Sequence[RankedItem]


@dataclass(frozen=True)
class Row:
    """One method of an evaluation."""

    name: str
    values: Sequence[float | None]
    ours: bool


@dataclass(frozen=True)
class EvaluationTable:
    """Methods by metrics."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Step:
    """What took how long."""

    name: str
    seconds: float
    note: str


@dataclass
class Report:
    """All that the report says."""

    title: str
    events: int
    users: int
    items: int
    model_version: str
    profiles: Sequence[Profile]
    tables: Sequence[EvaluationTable]
    plots: Sequence[str]
    """Paths relative to the page."""
    steps: Sequence[Step]
    peak_memory_mb: dict[str, float]
    commands: Sequence[str] = field(default_factory=list)


def write_page(report: Report, path: Path) -> None:
    """Writes report.html."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("serving.demo", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(report=report)
    path.write_text(page, encoding="utf-8")


def show(report: Report, console: Console) -> None:
    """Prints the report."""
    for profile in report.profiles:
        console.rule(f"[bold]user {profile.user_id}")
        _show_profile(profile, console)
    console.rule("[bold]how good are the predictions?")
    for evaluation in report.tables:
        table = Table(title=evaluation.title, caption=evaluation.note, title_justify="left")
        table.add_column("")
        for column in evaluation.columns:
            table.add_column(column, justify="right")
        for row in evaluation.rows:
            values = ["-" if value is None else f"{value:.4f}" for value in row.values]
            table.add_row(row.name, *values, style="bold green" if row.ours else "")
        console.print(table)
    console.rule("[bold]what it took")
    for step in report.steps:
        console.print(f"{step.seconds:7.1f} s  {step.name}  [dim]{step.note}")
    memory = ", ".join(f"{name} {size:,.0f} MB" for name, size in report.peak_memory_mb.items())
    console.print(f"peak memory: {memory}")
    console.rule("[bold]try it yourself")
    for command in report.commands:
        console.print(command, soft_wrap=True, highlight=False)


def _show_profile(profile: Profile, console: Console) -> None:
    for basket in profile.baskets:
        shown = "; ".join(
            f"{escape(line.text)} [dim]({line.behavior_type})[/dim]" for line in basket.lines
        )
        more = f" [dim]and {basket.more} more[/dim]" if basket.more else ""
        console.print(f"[bold]{basket.title}[/bold]  {shown}{more}", highlight=False)
    types = Table(title="next behavior", title_justify="left", box=None)
    types.add_column("type")
    types.add_column("probability", justify="right")
    types.add_column("")
    for one in profile.prediction.behavior_types[:8]:
        bar = "█" * round(30 * one.probability)
        types.add_row(escape(one.behavior_type), f"{one.probability:.1%}", bar)
    console.print(types)
    if not profile.items:
        return
    items = Table(title="likely to want", title_justify="left", box=None)
    items.add_column("", justify="right")
    items.add_column("item", overflow="fold")
    items.add_column("interest", justify="right")
    items.add_column("probability", justify="right")
    for position, item in enumerate(profile.items, 1):
        known = " [dim](had before)[/dim]" if item.known else ""
        items.add_row(
            str(position),
            f"{escape(item.text)}{known}",
            f"{item.interest_score:.2f}",
            f"{item.probability:.1%}",
        )
    console.print(items)

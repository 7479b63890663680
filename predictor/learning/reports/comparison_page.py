"""report.html of `compare`: one file, that can be sent, printed, and read without its pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from predictor.learning.leaks import iso
from predictor.learning.measures.side_by_side import BASELINE
from predictor.learning.reports.comparison_plots import Picture
from predictor.learning.reports.model_card import (
    ITEM_COLUMNS,
    ITEMS_EXPLAINED,
    TYPE_COLUMNS,
    TYPES_EXPLAINED,
)
from predictor.learning.reports.plots import MOST_TYPES

TEMPLATE = "comparison.html.j2"

TASKS = (
    ("items", "Next items", ITEM_COLUMNS, ITEMS_EXPLAINED),
    ("types", "Next behavior type", TYPE_COLUMNS, TYPES_EXPLAINED),
    ("known_item_types", "Behavior type, the item known", TYPE_COLUMNS, TYPES_EXPLAINED),
)

INSTANTS = ("test_from", "validation_from")
"""Of a protocol: in microseconds."""

PER_TYPE = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "support": "came",
    "predicted": "predicted",
}


def page(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The page, with its pictures inside.

    Args:
        report: what `compare` found.
        pictures: of it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("predictor.learning", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["signed"] = "{:+.4f}".format
    environment.filters["probability"] = lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}"
    environment.filters["uri"] = _uri
    tasks = [
        {
            "title": title,
            "explained": explained,
            "columns": [
                (name, label)
                for name, label in columns
                if any(_has(metrics, name) for metrics in report[key]["methods"].values())
            ],
            "pictures": [picture for picture in pictures if picture.task == key],
            **report[key],
        }
        for key, title, columns, explained in TASKS
        if key in report
    ]
    return environment.get_template(TEMPLATE).render(
        versions=report["versions"],
        protocol=_protocol(report["protocol"]),
        contexts=report["protocol"]["test_contexts"],
        tasks=tasks,
        baseline=BASELINE,
        labels=dict((*ITEM_COLUMNS, *TYPE_COLUMNS)),
        per_type=PER_TYPE,
        most_types=MOST_TYPES,
    )


def _has(metrics: Mapping[str, Any], column: str) -> bool:
    """Whether there is anything to show; of no cold items there is no recall."""
    return column in metrics and (column != "cold_recall_at_10" or bool(metrics["cold_targets"]))


def _protocol(told: Mapping[str, Any]) -> dict[str, str]:
    """How the data were divided, for people."""
    return {
        name.replace("_", " "): iso(value) if name in INSTANTS else str(value)
        for name, value in told.items()
        if value is not None
    }


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

"""What bench.quality trains on which set, and which figures it reads from the reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from bench import stored
from bench.harness import Figures
from bench.stored import Stored
from predictor.learning.measures.comparison import SEQUENCE
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.splits import Protocol
from predictor.models.version import OWN

Report = Mapping[str, Any]
Methods = dict[str, dict[str, float]]
"""Metrics by method, under the names of figures."""

ITEM_METRICS = {name: ("items", name) for name in stored.ITEM_FIGURES}
NATURALLY_COLD = {"natural_cold_recall_at_10": ("items", "cold_recall_at_10")}
COLD_AND_WARM = {
    "cold_recall_at_10": ("items", "cold_recall_at_10"),
    "warm_recall_at_10": ("items", "warm_recall_at_10"),
}
"""In a report of a training with held-out items, the cold ones are these."""
CALIBRATION = {"item_calibration_ratio": ("items", "calibration_ratio")}
TYPE_METRICS = {
    "type_accuracy": ("types", "accuracy"),
    "type_precision": ("types", "precision"),
    "type_recall": ("types", "recall"),
    "type_macro_f1": ("types", "f1"),
    "type_auc": ("types", "roc_auc"),
    "type_mse": ("types", "mse"),
    "type_ece": ("types", "ece"),
    "known_item_type_accuracy": ("known_item_types", "accuracy"),
    "known_item_type_macro_f1": ("known_item_types", "f1"),
}
"""Figure's name to where it is in a report: part, and key of a method's metrics there."""

METRICS = (
    *ITEM_METRICS, *CALIBRATION, *NATURALLY_COLD, *COLD_AND_WARM, *TYPE_METRICS, "seconds",
)  # fmt: skip
"""Names of all metrics in figures."""


@dataclass(frozen=True)
class Trial:
    """One training per seed, and what is read from its report."""

    protocol: Protocol
    metrics: Mapping[str, tuple[str, str]]
    config: FitConfig = field(default_factory=FitConfig)
    methods: Mapping[str, str] = field(default_factory=lambda: {OWN: ""})
    """Methods of the report that are shown, under which name; "" is the whole system."""
    baselines: bool = False
    """Whether all others are shown too, under their own names."""
    parts: bool = True
    """Whether the ranker and the type models are fitted too."""
    once: Sequence[Callable[[Stored], Figures]] = ()
    """What is measured on the first seed's version alone."""

    def shown(self, method: str) -> str | None:
        """What a method is called in figures; None: it is left out."""
        return self.methods.get(method, method if self.baselines else None)


def _microseconds(day: str) -> int:
    return int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()) * 1_000_000


LEAVE_ONE_OUT = Protocol("leave-one-out")
HELD_OUT = replace(LEAVE_ONE_OUT, hold_out=0.1)

OURS: dict[str, dict[str, Trial]] = {
    "beauty": {
        "whole": Trial(
            LEAVE_ONE_OUT,
            ITEM_METRICS | CALIBRATION | NATURALLY_COLD,
            baselines=True,
            once=[stored.ranker_times, stored.without_popularity],
        ),
        "held-out": Trial(
            HELD_OUT, COLD_AND_WARM, methods={OWN: "", SEQUENCE: SEQUENCE}
        ),
        "without-row-dropout": Trial(
            HELD_OUT,
            COLD_AND_WARM,
            FitConfig(row_dropout=0.0),
            methods={
                OWN: "without_row_dropout",
                SEQUENCE: f"{SEQUENCE}_without_row_dropout",
            },
        ),
    },
    "movielens": {
        "whole": Trial(
            Protocol("every", test_share=0.2),
            TYPE_METRICS | ITEM_METRICS | CALIBRATION,
            baselines=True,
            once=[partial(stored.types_over, baseline="decayed_shares"), stored.ranker_times],
        )
    },
    "journey": {
        "whole": Trial(
            Protocol(
                "time",
                test_from=_microseconds("2017-12-01"),
                validation_from=_microseconds("2017-11-01"),
            ),
            ITEM_METRICS | CALIBRATION | TYPE_METRICS,
            baselines=True,
            once=[partial(stored.items_over, baseline="tifu_knn"), stored.ranker_times],
        )
    },
}  # fmt: skip
"""By set, in the order in which they run."""

IDS_ALONE = FitConfig(
    model_type="transformer", dims=64, layers=1, history_length=50, text_dims=0, terms=False,
    traces=False, row_dropout=0.0, negatives=0, popularity_discount=0.0, late_weight=0.0,
)  # fmt: skip
"""A plain transformer over item ids, full softmax: the shape of the peers."""

PEERS: dict[str, dict[str, Trial]] = {
    "beauty": {
        "id-transformer": Trial(
            LEAVE_ONE_OUT,
            ITEM_METRICS,
            IDS_ALONE,
            methods={SEQUENCE: "id_transformer"},
            parts=False,
        )
    }
}  # fmt: skip
"""Peers that are trainings of ours."""


def methods_of(report: Report, trial: Trial) -> Methods:
    """The trial's metrics of every method in a training's report, as far as they apply.

    Where the report does not tell the sequence model from the whole system, they are the same.
    """
    found: Methods = {OWN: {}}
    for name, (part, key) in trial.metrics.items():
        methods = report.get(part, {})
        for method, metrics in methods.items():
            value = metrics.get(key)
            if value is not None:
                found.setdefault(method, {})[name] = float(value)
    if SEQUENCE not in found:
        items = {name for name, (part, _) in trial.metrics.items() if part == "items"}
        found[SEQUENCE] = {name: value for name, value in found[OWN].items() if name in items}
    return found


def summary(set_name: str, trial: Trial, seeds: Sequence[Methods]) -> Figures:
    """Figures of a trial: mean and spread over seeds of each method that it is read for."""
    figures: Figures = {}
    for method in dict.fromkeys(method for each in seeds for method in each):
        shown = trial.shown(method)
        if shown is None:
            continue
        prefix = f"{set_name}_{shown}" if shown else set_name
        for name in dict.fromkeys(name for each in seeds for name in each.get(method, {})):
            values = [each[method][name] for each in seeds if name in each.get(method, {})]
            figures |= mean_and_spread(f"{prefix}_{name}", values)
    return figures


def mean_and_spread(name: str, values: Sequence[float]) -> Figures:
    """The mean, and the sample standard deviation (None of a single value)."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {f"{name}_mean": statistics.fmean(values), f"{name}_spread": spread}


def split_name(name: str) -> tuple[str, str]:
    """The method (empty: ours) and the metric in a figure's name without set and statistic."""
    fitting = [metric for metric in METRICS if name == metric or name.endswith(f"_{metric}")]
    metric = max(fitting, key=len, default=name)
    return name.removesuffix(metric).removesuffix("_"), metric

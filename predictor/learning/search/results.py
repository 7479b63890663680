"""What a search found, for people and programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtrit  # type: ignore[import-untyped]

from predictor.learning.search.folds import Fold
from predictor.learning.search.trial import LOG_LOSS, NDCG, Metric

SHOWN = 5
"""Trials in the table and in the picture of folds."""

DEFAULTS = 1
"""Number of the trial that has what `train` takes without a configuration file."""

CONFIDENCE = 0.95
"""Two trials are told apart where the interval of their difference lies on one side of zero."""


FEW = 100
"""Predictions by which a share is known to within 10 points only."""


@dataclass(frozen=True)
class Row:
    """A finished trial."""

    number: int
    """From 1, among the finished ones."""
    settings: Mapping[str, Any]
    folds: tuple[float, ...]
    """The metric on each; fewer where it was pruned."""
    value: float | None
    """Mean over the folds; of a pruned trial, where it stood; None where it had nothing."""
    why: str | None
    """The reason why it was pruned; None where it was not."""
    epochs: tuple[int, ...]
    seconds: float

    @property
    def spread(self) -> float | None:
        """Standard deviation over the folds; None of a single one."""
        return float(np.std(self.folds, ddof=1)) if len(self.folds) > 1 else None


@dataclass(frozen=True)
class Found:
    """All finished trials."""

    metric: Metric
    rows: Sequence[Row]
    """In their order."""
    fewest: int
    """Predictions that the smallest fold is measured on."""

    @property
    def ranking(self) -> list[Row]:
        """Those that were not pruned, the best first."""
        whole = [row for row in self.rows if row.why is None and row.value is not None]
        return sorted(whole, key=lambda row: -self.metric.sign * (row.value or 0.0))

    @property
    def best(self) -> Row | None:
        """The best one."""
        return next(iter(self.ranking), None)

    @property
    def notes(self) -> list[str]:
        """What to know before the best is believed."""
        ranking = self.ranking
        if not ranking:
            return []
        best, said = ranking[0], []
        defaults = next((row for row in ranking if row.number == DEFAULTS), None)
        if best is defaults:
            said.append("no trial is better than the settings without a search (trial 1)")
        elif defaults is not None:
            said.append(_against(best, defaults, "the settings without a search (trial 1)"))
        if len(ranking) > 1 and ranking[1] is not defaults:
            said.append(_against(best, ranking[1], f"the second (trial {ranking[1].number})"))
        if self.fewest < FEW:
            said.append(
                f"a fold is measured on {self.fewest} predictions alone: figures of so few are "
                "mostly chance"
            )
        if len(self.rows) > 1:
            said.append(
                f"the best of {len(self.rows)} trials is a little lucky: what it is worth shows on "
                "the test part, which the search has not seen"
            )
        return said


def found(trials: Sequence[FrozenTrial], folds: Sequence[Fold]) -> Found:
    """Reads what trials on these folds noted."""
    names = {trial.user_attrs["metric"] for trial in trials if "metric" in trial.user_attrs}
    metric = LOG_LOSS if names == {LOG_LOSS.name} else NDCG
    fewest = min(len(fold.part.validation) for fold in folds)
    return Found(metric, [_row(at, trial, metric) for at, trial in enumerate(trials, 1)], fewest)


def _row(number: int, trial: FrozenTrial, metric: Metric) -> Row:
    noted = trial.user_attrs
    pruned = trial.state == TrialState.PRUNED
    return Row(
        number,
        trial.params,
        tuple(metric.sign * score for score in noted.get("scores", ())),
        None if trial.value is None else metric.sign * trial.value,
        noted.get("why", "") if pruned else None,
        tuple(noted.get("epochs", ())),
        noted.get("seconds", 0.0),
    )


def _against(best: Row, other: Row, name: str) -> str:
    """Whether the difference to another trial, fold by fold, is more than noise."""
    mean, count = abs(float(np.mean(best.folds) - np.mean(other.folds))), len(best.folds)
    if count < 2:
        return f"whether the best (trial {best.number}) beats {name}, one fold cannot tell"
    spread = float(np.std(np.subtract(best.folds, other.folds), ddof=1))
    reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * spread / math.sqrt(count)
    verdict = "beats" if mean > reach else "is within noise of"
    return (
        f"the best (trial {best.number}) {verdict} {name}: they differ by {mean:.4f} +- {reach:.4f}"
        f" ({CONFIDENCE:.0%}, paired over {count} folds)"
    )


def report(found: Found) -> dict[str, Any]:
    """The findings in search.json."""
    best = found.best
    return {
        "metric": found.metric.name,
        "better": "higher" if found.metric.sign > 0 else "lower",
        "best": None if best is None else _entry(best),
        "notes": found.notes,
        "trials": [_entry(row) for row in found.rows],
    }


def _entry(row: Row) -> dict[str, Any]:
    return {
        "trial": row.number,
        "state": "complete" if row.why is None else "pruned",
        **({} if row.why is None else {"why": row.why}),
        "mean": row.value,
        "spread": row.spread,
        "folds": list(row.folds),
        "epochs": list(row.epochs),
        "seconds": round(row.seconds, 1),
        "settings": dict(row.settings),
    }


def table(result: Mapping[str, Any]) -> str:
    """The best trials of a report side by side, and what to know of them."""
    whole = [entry for entry in result["trials"] if entry["state"] == "complete"]
    whole.sort(key=lambda entry: entry["mean"], reverse=result["better"] == "higher")
    shown = whole[:SHOWN]
    pruned = len(result["trials"]) - len(whole)
    rows = {
        "trial": [entry["trial"] for entry in shown],
        **{name: [entry[name] for entry in shown] for name in ("mean", "spread", "seconds")},
        # Blank where a setting has no effect beside the others.
        **{name: [entry["settings"].get(name, "") for entry in shown] for name in result["space"]},
    }
    cells = {name: [_cell(value) for value in values] for name, values in rows.items()}
    width = max(10, *(len(cell) for values in cells.values() for cell in values)) + 2
    lines = [
        f"{result['metric']} ({result['better']} is better): mean and standard deviation over "
        f"{len(result['folds'])} folds by {result['folds_by']}; "
        f"{len(result['trials'])} trials, {pruned} of them pruned",
        *(
            name.ljust(21) + "".join(cell.rjust(width) for cell in values)
            for name, values in cells.items()
        ),
    ]
    return "\n".join([*lines, "", *result["notes"]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

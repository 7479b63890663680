"""Measures a model and the baselines on the same targets, with the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError
from foretell.vectors import Vectors
from predictor.learning.baselines import item_baselines
from predictor.learning.data import Targets, history_of
from predictor.learning.metrics import (
    Floats,
    ItemScorer,
    batches,
    item_metrics,
)
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.learning.type_baselines import type_baselines
from predictor.learning.type_metrics import TypeScorer, type_metrics
from predictor.models.history import Ints
from predictor.models.sequence import Outputs, SequenceModel
from predictor.models.version import OWN, Version, softmax

REPEATS = 0.05
"""Share of repeated purchases in training from which on repeats are answered by default."""


@dataclass(frozen=True)
class Space:
    """All vectors in the model's space: what serving reads from the derived collections."""

    items: Vectors
    """(items, dims)."""
    texts: Vectors
    """(texts, dims)."""


def outputs(model: SequenceModel, targets: Targets, space: Space, history_length: int) -> Outputs:
    """What the model says about every context, read exactly as serving reads it."""
    parts = [
        model.predict(history_of(targets, rows, history_length, space.items, space.texts))
        for rows in batches(len(targets))
    ]
    return Outputs(
        np.concatenate([part.type_logits for part in parts]),
        np.concatenate([part.queries for part in parts]),
    )


def item_scorer(found: Outputs, space: Space) -> ItemScorer:
    """The model's scores of all items."""
    return lambda targets, rows: found.queries[rows] @ space.items.T


def type_scorer(found: Outputs, temperature: float) -> TypeScorer:
    """The model's calibrated probabilities."""
    return lambda targets, rows: softmax(found.type_logits[rows], temperature)


def compare(
    version: Version, found: Outputs, space: Space, part: Split, warm: NDArray[np.bool_]
) -> dict[str, Any]:
    """The metrics of the version and of every baseline on the test targets.

    Args:
        found: what the version's network says about part.test.
        space: the vectors of part's items and texts.
        warm: (items,) whether training saw the item.

    Returns:
        items and types, each from method to metrics, the version's OWN first; a part is missing
        where the targets have none of it.
    """
    test, train = part.test, part.train
    exclude = version.config.repeats == "excluded"
    report: dict[str, Any] = {}
    if (test.item >= 0).any():
        scorers = {OWN: item_scorer(found, space), **item_baselines(train)}
        report["items"] = {
            method: item_metrics(scorer, test, warm, exclude_history=exclude)
            for method, scorer in scorers.items()
        }
    if (test.type >= 0).any():
        own = type_scorer(found, version.config.type_temperature)
        type_scorers = {OWN: own, **type_baselines(train)}
        report["types"] = {
            method: measure_types(scorer, test) for method, scorer in type_scorers.items()
        }
    return report


def measure_types(scorer: TypeScorer, targets: Targets) -> dict[str, Any]:
    """type_metrics of every line that has a type."""
    probabilities, true = line_probabilities(scorer, targets)
    return type_metrics(probabilities, true, targets.events.behavior_types)


def line_probabilities(scorer: TypeScorer, targets: Targets) -> tuple[Floats, Ints]:
    """Probabilities (lines, types) and the true type (lines,) of the lines that have one."""
    contexts = np.concatenate([scorer(targets, rows) for rows in batches(len(targets))])
    some = targets.type != -1
    return contexts[targets.row[some]], targets.type[some]


def evaluate_version(version: Version, dataset: Dataset, part: Split) -> dict[str, Any]:
    """Measures a stored version as training does.

    Args:
        part: the division of the data, by the version's own protocol or another.

    Raises:
        InvalidArgumentError: the version was trained on vectors of another encoder.
    """
    config = version.config
    if dataset.encoder != config.encoder:
        raise InvalidArgumentError(
            f"version {config.version} was trained on {config.encoder.name} "
            f"({config.encoder.pooling}, {config.encoder.cols} dimensions), but the embedder has "
            f"{dataset.encoder.name} ({dataset.encoder.pooling}, {dataset.encoder.cols})",
            reason="OTHER_ENCODER",
            field="encoder",
        )
    part = part.with_types(config.behavior_types)
    space, warm = read_space(version, dataset)
    found = outputs(version.network, part.test, space, config.history_length)
    return compare(version, found, space, part, warm)


def read_space(version: Version, dataset: Dataset) -> tuple[Space, NDArray[np.bool_]]:
    """The data set's vectors in the version's space, and which of its items have a residual."""
    rows = {version.item_ids[at]: row for row, at in enumerate(version.warm)}
    at = np.array([rows.get(item_id, -1) for item_id in dataset.events.item_ids], np.int64)
    residuals = np.zeros((len(at), version.config.dims), np.float32)
    residuals[at >= 0] = version.residuals[at[at >= 0]]
    apply = version.projection.apply
    items = apply(dataset.item_vectors, texts=dataset.item_texts, residuals=residuals)
    return Space(items, apply(dataset.text_vectors, texts=dataset.events.texts)), at >= 0


_ITEM_COLUMNS = (
    "hits_at_10", "recall_at_10", "ndcg_at_10", "coverage_at_10",
    "warm_recall_at_10", "cold_recall_at_10", "contexts",
)  # fmt: skip
_TYPE_COLUMNS = (
    "accuracy", "precision", "recall", "f1", "roc_auc", "mse", "log_loss", "ece", "lines",
)  # fmt: skip


def tables(report: dict[str, Any]) -> str:
    """The comparison as plain text."""
    parts = [
        text_table(title, columns, report[key])
        for title, key, columns in (
            ("Next items, full ranking", "items", _ITEM_COLUMNS),
            ("Next behavior type", "types", _TYPE_COLUMNS),
        )
        if key in report
    ]
    return "\n\n".join(parts)


def text_table(title: str, columns: Sequence[str], rows: dict[str, dict[str, Any]]) -> str:
    """Rows by name under a title, numbers with four digits."""
    width = max(map(len, rows)) + 2
    lines = [title, " " * width + "  ".join(column.rjust(10) for column in columns)]
    for name, values in rows.items():
        cells = [_cell(values.get(column)).rjust(max(10, len(column))) for column in columns]
        lines.append(name.ljust(width) + "  ".join(cells))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def confusion_text(confusion: Sequence[Sequence[int]], behavior_types: Sequence[str]) -> str:
    """A confusion matrix as plain text, true types down, predicted ones across."""
    width = max(len(name) for name in (*behavior_types, "true \\ predicted")) + 2
    lines = ["true \\ predicted".ljust(width) + "".join(n.rjust(width) for n in behavior_types)]
    for name, row in zip(behavior_types, confusion, strict=True):
        lines.append(name.ljust(width) + "".join(f"{count:,}".rjust(width) for count in row))
    return "\n".join(lines)

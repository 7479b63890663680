"""Measures a version and the baselines on the same targets, with the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError
from predictor.learning.measures.answers import Answers, answer
from predictor.learning.measures.baselines import item_baselines, popularity
from predictor.learning.measures.evaluation import measure_types, read_space
from predictor.learning.measures.metrics import (
    Floats,
    ItemHits,
    ItemScorer,
    K,
    calibration_ratio,
    item_hits,
)
from predictor.learning.measures.type_baselines import type_baselines
from predictor.learning.measures.type_metrics import type_metrics
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.calibration import CANDIDATES
from predictor.models.history import Ints
from predictor.models.version import OWN, Version

SEQUENCE = "model"
"""Name of the sequence model alone among the methods of a report."""

PICTURED = (OWN, SEQUENCE, "popular", "personal_frequency")
"""Methods whose recall is drawn by popularity and by length of history."""


@dataclass(frozen=True)
class Comparison:
    """What was measured, and what pictures are made of."""

    answers: Answers
    report: dict[str, Any]
    """items, types, and known_item_types (for a model that knows the item), each from method to
    metrics, the version's OWN first; a part is missing where the targets have none of it."""
    hits: dict[str, ItemHits]
    """Of the version first, then of the methods in PICTURED."""
    popularity: Ints
    """(items,) events of each in training."""

    @property
    def item_probabilities(self) -> Floats:
        """(contexts, CANDIDATES) of the version's own hits."""
        calibration = self.answers.version.config.item_calibration
        return calibration.probabilities(self.hits[OWN].top_score)


def compare(
    answers: Answers,
    dataset: Dataset,
    part: Split,
    warm: NDArray[np.bool_],
    *,
    item_methods: bool = True,
) -> Comparison:
    """Measures a version and every baseline on the test targets.

    Args:
        answers: the version's for part.test.
        dataset: part is its division.
        warm: (items,) whether training saw the item.
        item_methods: whether to measure baselines for items, which large catalogues make long.
    """
    test, train = part.test, part.train
    found = Comparison(answers, {}, {}, popularity(train))
    if (test.item >= 0).any():
        scorers = item_baselines(train, dataset.item_vectors) if item_methods else {}
        _compare_items(found, scorers, part, ~part.held_out if part.held_out.any() else warm)
    if (test.type >= 0).any():
        own = measure_types(answers.type_scorer, test, answers.chosen_types)
        baselines = type_baselines(train)
        found.report["types"] = {OWN: own} | {
            method: measure_types(scorer, test) for method, scorer in baselines.items()
        }
    if answers.version.item_type_model is not None:
        probabilities, chosen, true = answers.line_types()
        measured = type_metrics(probabilities, true, train.behavior_types, chosen)
        found.report["known_item_types"] = {OWN: measured}
    return found


def _compare_items(
    found: Comparison, baselines: dict[str, ItemScorer], part: Split, warm: NDArray[np.bool_]
) -> None:
    answers = found.answers
    scorers: dict[str, ItemScorer] = {OWN: answers.item_scorer}
    if answers.version.ranker is not None:
        scorers[SEQUENCE] = answers.search_scorer
    scorers |= baselines
    report = found.report["items"] = {}
    for method, scorer in scorers.items():
        hits = item_hits(
            scorer, part.test, exclude_history=answers.exclude_history,
            returned=CANDIDATES if method == OWN else K,
        )  # fmt: skip
        report[method] = hits.metrics(warm)
        if method in PICTURED:
            found.hits[method] = hits
    report[OWN]["calibration_ratio"] = calibration_ratio(found.item_probabilities, found.hits[OWN])


def evaluate_version(version: Version, dataset: Dataset, part: Split) -> Comparison:
    """Measures a stored version as training does.

    Args:
        part: the division of the data, by the version's own protocol or another.

    Raises:
        InvalidArgumentError: the version was trained on vectors of another encoder.
    """
    check_encoder(version, dataset)
    part = part.with_types(version.config.behavior_types)
    space, warm = read_space(version, dataset)
    return compare(answer(version, part.test, space), dataset, part, warm)


def check_encoder(version: Version, dataset: Dataset) -> None:
    """Raises InvalidArgumentError if a version was trained on vectors of another encoder."""
    config = version.config
    if dataset.encoder != config.encoder:
        raise InvalidArgumentError(
            f"version {config.version} was trained on {config.encoder.name} "
            f"({config.encoder.pooling}, {config.encoder.cols} dimensions), but the embedder has "
            f"{dataset.encoder.name} ({dataset.encoder.pooling}, {dataset.encoder.cols})",
            reason="OTHER_ENCODER",
            field="encoder",
        )


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
            ("Behavior type, the item known", "known_item_types", _TYPE_COLUMNS),
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

"""What a sequence model says of targets, read as serving reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Targets, history_of
from predictor.learning.measures.metrics import (
    Floats,
    ItemScorer,
    batches,
)
from predictor.learning.measures.type_metrics import TypeScorer, type_metrics
from predictor.learning.sources import Dataset
from predictor.models.calibration import softmax
from predictor.models.history import NONE, Ints
from predictor.models.sequence.network import Outputs, SequenceModel
from predictor.models.version import Version

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
        np.concatenate([part.log_gaps for part in parts]),
    )


def item_scorer(found: Outputs, space: Space) -> ItemScorer:
    """The model's scores of all items."""
    return lambda targets, rows: found.queries[rows] @ space.items.T


def type_scorer(found: Outputs, temperature: float) -> TypeScorer:
    """The model's calibrated probabilities."""
    return lambda targets, rows: softmax(found.type_logits[rows], temperature)


def measure_types(
    scorer: TypeScorer, targets: Targets, chosen: Ints | None = None
) -> dict[str, Any]:
    """type_metrics of every line that has a type.

    Args:
        chosen: (contexts,) the types to name; None: the most probable ones.
    """
    probabilities, true = line_probabilities(scorer, targets)
    if chosen is not None:
        chosen = chosen[targets.row[targets.type != NONE]]
    return type_metrics(probabilities, true, targets.events.behavior_types, chosen)


def line_probabilities(scorer: TypeScorer, targets: Targets) -> tuple[Floats, Ints]:
    """Probabilities (lines, types) and the true type (lines,) of the lines that have one."""
    contexts = np.concatenate([scorer(targets, rows) for rows in batches(len(targets))])
    some = targets.type != NONE
    return contexts[targets.row[some]], targets.type[some]


def read_space(version: Version, dataset: Dataset) -> tuple[Space, NDArray[np.bool_]]:
    """The data set's vectors in the version's space, and which of its items have a residual."""
    rows = {version.item_ids[at]: row for row, at in enumerate(version.warm)}
    at = np.array([rows.get(item_id, -1) for item_id in dataset.events.item_ids], np.int64)
    residuals = np.zeros((len(at), version.config.dims), np.float32)
    residuals[at >= 0] = version.residuals[at[at >= 0]]
    apply = version.projection.apply
    items = apply(dataset.item_vectors, texts=dataset.item_texts, residuals=residuals)
    return Space(items, apply(dataset.text_vectors, texts=dataset.events.texts)), at >= 0

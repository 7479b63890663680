"""Plots of a training, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from predictor.learning import evaluation
from predictor.learning.data import Targets
from predictor.learning.fitting import Epoch
from predictor.learning.metrics import Floats
from predictor.learning.type_metrics import roc_auc
from predictor.models.history import Ints
from predictor.models.sequence import Outputs

MOST_TYPES = 30
"""Types in a confusion matrix whose counts can still be read: the most frequent."""

MOST_CURVES = 10
"""Types among ROC curves that can still be told apart: the most frequent."""


def draw(
    curve: list[Epoch], found: Outputs, targets: Targets, temperature: float
) -> dict[str, bytes]:
    """All plots of a training, as PNG by file name; those of types where the targets have any."""
    images = {"training.png": training_curve(curve)}
    if (targets.type >= 0).any():
        scorer = evaluation.type_scorer(found, temperature)
        probabilities, true = evaluation.line_probabilities(scorer, targets)
        names = targets.events.behavior_types
        confusion = np.array(
            evaluation.measure_types(scorer, targets)["confusion_matrix"], np.int64
        )
        images["confusion_matrix.png"] = confusion_matrix(confusion, names)
        images["roc.png"] = roc_curves(probabilities, true, names)
    return images


def training_curve(curve: Sequence[Epoch]) -> bytes:
    """Losses on training data and measures on validation data by epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, measures = figure.subplots(1, 2)
    epochs = [epoch.epoch for epoch in curve]
    losses.plot(epochs, [epoch.type_loss for epoch in curve], marker="o", label="type")
    if any(epoch.item_loss for epoch in curve):
        losses.plot(epochs, [epoch.item_loss for epoch in curve], marker="o", label="item")
    losses.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    for name in curve[0].validation:
        values = [epoch.validation[name] for epoch in curve]
        measures.plot(epochs, values, marker="o", label=name.replace("_", " "))
    measures.set(title="Validation", xlabel="epoch", ylim=(0, None))
    for axes in (losses, measures):
        axes.legend()
        axes.grid(alpha=0.3)
    return _png(figure)


def confusion_matrix(confusion: NDArray[np.int64], behavior_types: Sequence[str]) -> bytes:
    """Counts of (true, predicted) types, coloured by share of the true type."""
    kept = _largest(confusion.sum(axis=1), MOST_TYPES)
    counts = confusion[np.ix_(kept, kept)]
    names = [behavior_types[code] for code in kept]
    size = 2.5 + 0.7 * len(kept)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true type")
    axes.set_xticks(range(len(kept)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(kept)), names)
    axes.set(title="Next behavior type", xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    return _png(figure)


def roc_curves(probabilities: Floats, true: Ints, behavior_types: Sequence[str]) -> bytes:
    """A ROC curve per type against all others."""
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    counts = np.bincount(true[true >= 0], minlength=len(behavior_types))
    for code in _largest(counts, MOST_CURVES):
        positive = true == code
        area = roc_auc(probabilities[:, code], positive)
        if area is None:
            continue
        false_rate, true_rate = roc_points(probabilities[:, code], positive)
        axes.plot(false_rate, true_rate, label=f"{behavior_types[code]} ({area:.3f})")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance (0.500)")
    axes.set(title="ROC, one type against the rest", xlabel="false positive rate")
    axes.set(ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right", title="area under the curve")
    axes.grid(alpha=0.3)
    return _png(figure)


def roc_points(
    scores: Floats, positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    by = np.argsort(-scores, kind="stable")
    # Equal scores fall together: one point for all of them.
    ends = np.append(np.flatnonzero(np.diff(scores[by])), len(scores) - 1)
    right = np.cumsum(positive[by])[ends]
    wrong = ends + 1 - right
    false_rate = np.concatenate([[0.0], wrong / max(1, wrong[-1])])
    true_rate = np.concatenate([[0.0], right / max(1, right[-1])])
    return false_rate, true_rate


def _largest(counts: NDArray[np.int64], most: int) -> Ints:
    """The `most` types with the largest counts, in their own order."""
    kept: Ints = np.sort(np.argsort(-counts, kind="stable")[:most])
    return kept


def _png(figure: Figure) -> bytes:
    # A canvas of its own instead of pyplot: no global state, no display, safe in threads.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

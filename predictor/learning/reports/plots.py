"""Pictures of a version for people, as PNG: how it learned, what it gets right, how sure it is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from predictor.learning.measures.metrics import (
    Floats,
    ItemHits,
    K,
    Stratum,
    recall_by_history,
    recall_by_popularity,
)
from predictor.learning.measures.type_metrics import equal_mass_bins, roc_auc
from predictor.learning.reports.item_map import ItemMap
from predictor.learning.sequence.fitting import Epoch
from predictor.models.history import Ints

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart; without yellow, which is hard
to see on white."""

GREY = "#BBBBBB"
MARKERS = "os^Dv<>"
LINES = ("-", "--", "-.", ":")

MOST_TYPES = 30
"""Types in a confusion matrix whose counts can still be read: the most frequent."""

MOST_CURVES = 10
"""Types among curves that can still be told apart: the most frequent."""

CURVE_POINTS = 2_000
"""Of a curve: more are invisible."""

BINS = 15
"""Points of a calibration curve, each of the same number of predictions."""


@dataclass(frozen=True)
class TypeResults:
    """Types that were predicted, one row per line of a target basket."""

    names: Sequence[str]
    probabilities: Floats
    """(lines, types)."""
    true: Ints
    """(lines,) negative where training never saw the type."""
    predicted: Ints
    """(lines,)."""


@dataclass(frozen=True)
class ItemResults:
    """Lists of items that were predicted."""

    hits: Mapping[str, ItemHits]
    """By method: the version first, then what it is compared with."""
    popularity: Ints
    """(items,) events in training."""
    probabilities: Floats | None = None
    """As the version's hits.top, that each is a target; None where it gives none."""


def pictures(
    curve: Sequence[Epoch] = (),
    types: TypeResults | None = None,
    items: ItemResults | None = None,
    space: ItemMap | None = None,
) -> dict[str, bytes]:
    """All pictures that can be made of what is given, as PNG by file name."""
    found: dict[str, bytes] = {}
    if curve:
        found["training.png"] = training_curve(curve)
    if types is not None and (types.true >= 0).any():
        found["confusion_matrix.png"] = confusion_matrix(types)
        found["roc.png"] = roc_curves(types)
        found["precision_recall.png"] = precision_recall_curves(types)
        found["type_calibration.png"] = type_calibration(types)
    if items is not None and len(next(iter(items.hits.values())).context):
        found["recall_by_popularity.png"] = popularity_strata(items)
        found["recall_by_history.png"] = history_strata(items)
        if items.probabilities is not None:
            found["item_calibration.png"] = item_calibration(items)
    if space is not None:
        found["item_map.png"] = draw_map(space)
    return found


def training_curve(curve: Sequence[Epoch]) -> bytes:
    """Losses on training data and measures on validation data by epoch."""
    names = list(curve[0].validation)
    columns = min(3, 1 + len(names))
    rows = -(-(1 + len(names)) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    losses, *measures = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for empty in measures[len(names) :]:
        empty.remove()
    measures = measures[: len(names)]
    epochs = [epoch.epoch for epoch in curve]
    by_task = {
        "behavior type": [epoch.type_loss for epoch in curve],
        "item": [epoch.item_loss for epoch in curve],
        "time gap": [epoch.gap_loss for epoch in curve],
    }
    for at, (label, values) in enumerate(by_task.items()):
        if any(values):
            losses.plot(epochs, values, color=COLOURS[at], marker=MARKERS[at], label=label)
    losses.set(title="Training loss", ylabel="mean loss (types and items: nats)")
    losses.legend(title="of the next")
    best = max(curve, key=lambda epoch: epoch.score).epoch
    # A panel each: scales differ, and a change of a percent must be visible.
    for axes, name in zip(measures, names, strict=True):
        axes.plot(epochs, [e.validation[name] for e in curve], color=COLOURS[0], marker="o")
        axes.axvline(best, color=COLOURS[3], linestyle=":", label=f"kept: epoch {best}")
        axes.set(title=f"Validation: {_words(name)}")
        axes.legend()
    for axes in (losses, *measures):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return as_png(figure)


def confusion_matrix(types: TypeResults) -> bytes:
    """Lines by (true, predicted) type, coloured by share of the true type."""
    known = types.true >= 0
    confusion = np.zeros((len(types.names),) * 2, np.int64)
    np.add.at(confusion, (types.true[known], types.predicted[known]), 1)
    kept = largest(confusion.sum(axis=1), MOST_TYPES)
    counts = confusion[np.ix_(kept, kept)]
    names = [types.names[code] for code in kept]
    size = 2.5 + 0.7 * len(kept)
    figure = Figure(figsize=(size + 1.5, size), layout="constrained")
    axes = figure.subplots()
    # Of all lines of the true type, also where not all predicted types are shown.
    shares = counts / np.maximum(1, confusion.sum(axis=1)[kept, None])
    image = axes.imshow(shares, cmap="cividis_r", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true type's lines")
    axes.set_xticks(range(len(kept)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(kept)), names)
    axes.set(
        title="Next behavior type: what came, what was predicted",
        xlabel="predicted type",
        ylabel="true type",
    )
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour)
    return as_png(figure)


def roc_curves(types: TypeResults) -> bytes:
    """A ROC curve per type against all others."""
    figure, axes = _panel()
    for code, style in _curves(types):
        positive = types.true == code
        area = roc_auc(types.probabilities[:, code], positive)
        if area is None:
            continue
        points = roc_points(types.probabilities[:, code], positive)
        axes.plot(*thinned(*points), label=f"{types.names[code]} ({area:.3f})", **style)
    axes.plot([0, 1], [0, 1], color=GREY, label="chance (0.500)")
    axes.set(title="ROC, each type against the rest", xlim=(0, 1), ylim=(0, 1.01))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.legend(loc="lower right", title="area under the curve")
    return as_png(figure)


def precision_recall_curves(types: TypeResults) -> bytes:
    """Precision by recall, per type against all others."""
    figure, axes = _panel()
    for code, style in _curves(types):
        positive = types.true == code
        if not positive.any():
            continue
        recall, precision, average = precision_recall_points(types.probabilities[:, code], positive)
        label = f"{types.names[code]} ({average:.3f}, share {positive.mean():.3f})"
        axes.step(*thinned(recall, precision), where="pre", label=label, **style)
    axes.set(title="Precision and recall, each type against the rest", xlim=(0, 1), ylim=(0, 1.01))
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(loc="best", title="average precision; at random: the share")
    return as_png(figure)


def roc_points(
    scores: Floats, positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
    right, wrong = _above(scores, positive)
    false_rate = np.concatenate([[0.0], wrong / max(1, wrong[-1])])
    true_rate = np.concatenate([[0.0], right / max(1, right[-1])])
    return false_rate, true_rate


def precision_recall_points(
    scores: Floats, positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Recall and precision at every threshold, and the average precision (the area below)."""
    right, wrong = _above(scores, positive)
    recall = np.concatenate([[0.0], right / max(1, right[-1])])
    precision = right / (right + wrong)
    average = float((np.diff(recall) * precision).sum())
    return recall, np.concatenate([precision[:1], precision]), average


def _above(scores: Floats, positive: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Positives and negatives that score at or above each distinct score, the largest first."""
    by = np.argsort(-scores, kind="stable")
    # Equal scores fall together: one point for all of them.
    ends = np.append(np.flatnonzero(np.diff(scores[by])), len(scores) - 1)
    right = np.cumsum(positive[by])[ends]
    return right, ends + 1 - right


def type_calibration(types: TypeResults) -> bytes:
    """How often the most probable type came, by its probability."""
    known = types.true >= 0
    likely = types.probabilities[known]
    came = likely.argmax(axis=1) == types.true[known]
    return _calibration(
        likely.max(axis=1).astype(np.float64),
        came,
        "Is the type's probability right?",
        "predicted probability of the most probable type",
        "share of lines in which it came",
    )


def item_calibration(items: ItemResults) -> bytes:
    """How often an item of the ten best was a target, by its probability."""
    hits = next(iter(items.hits.values()))
    assert items.probabilities is not None
    given = hits.top[:, :K] >= 0
    return _calibration(
        items.probabilities[:, :K][given].astype(np.float64),
        hits.top_hit[:, :K][given],
        f"Is the item's probability right? The {K} best of each list",
        "predicted probability of the item",
        "share of items in the next basket",
        logarithmic=True,
    )


def _calibration(
    predicted: NDArray[np.float64],
    came: NDArray[np.bool_],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    logarithmic: bool = False,
) -> bytes:
    figure, axes = _panel()
    _, bin_ = np.unique(equal_mass_bins(predicted, min(BINS, len(predicted))), return_inverse=True)
    sizes = np.bincount(bin_)
    mean = np.bincount(bin_, predicted) / sizes
    share = np.bincount(bin_, came) / sizes
    error = np.sqrt(share * (1 - share) / sizes)
    shown = (share > 0) & (mean > 0) if logarithmic else np.ones(len(share), np.bool_)
    both = np.concatenate([mean[shown], share[shown], [0.5] if not shown.any() else []])
    low, top = float(both.min()), float(both.max())
    if logarithmic:
        low, top = low / 1.5, min(1.0, top * 1.5)
    else:
        low, top = max(0.0, low - 0.1), min(1.0, top + 0.1)
    axes.plot([low, top], [low, top], color=GREY, label="perfect")
    axes.errorbar(
        mean[shown], share[shown], yerr=1.96 * error[shown], color=COLOURS[0], marker="o",
        capsize=2, label=f"{len(predicted):,} predictions in {len(sizes)} groups,\n95 % "
        "intervals if independent",
    )  # fmt: skip
    if logarithmic:
        axes.set(xscale="log", yscale="log")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(low, top), ylim=(low, top))
    axes.legend(loc="upper left")
    return as_png(figure)


def popularity_strata(items: ItemResults) -> bytes:
    """Recall of target items by how often they occur in training."""
    return _strata(
        {name: recall_by_popularity(hits, items.popularity) for name, hits in items.hits.items()},
        "Rare and frequent items",
        "events of the target item in training",
        f"share of target items in the {K} best",
    )


def history_strata(items: ItemResults) -> bytes:
    """Hits of contexts by the length of their history."""
    return _strata(
        {name: recall_by_history(hits) for name, hits in items.hits.items()},
        "Short and long histories",
        "events in the user's history",
        f"hits among the {K} best / min({K}, target items)",
    )


def _strata(groups: Mapping[str, Sequence[Stratum]], title: str, xlabel: str, ylabel: str) -> bytes:
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    first = next(iter(groups.values()))
    for at, (name, strata) in enumerate(groups.items()):
        style = _style(at)
        axes.errorbar(
            np.arange(len(strata)) + 0.06 * (at - (len(groups) - 1) / 2),
            [stratum.recall for stratum in strata],
            yerr=[1.96 * stratum.standard_error for stratum in strata],
            marker=MARKERS[at % len(MARKERS)], capsize=2, label=_words(name), **style,
        )  # fmt: skip
    labels = [f"{_range(stratum)}\n(n={stratum.count:,})" for stratum in first]
    axes.set_xticks(range(len(first)), labels)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="95 % intervals")
    return as_png(figure)


def _range(stratum: Stratum) -> str:
    low, high = f"{stratum.low:,}", f"{stratum.high:,}"
    return low if low == high else f"{low}-{high}"


def draw_map(space: ItemMap) -> bytes:
    """The items of the map, each group with a colour and a marker of its own."""
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    # The last group is drawn first: what is called `other` lies below.
    for code in reversed(range(len(space.names))):
        inside = space.points[space.group == code]
        named = code < len(COLOURS)
        axes.scatter(
            inside[:, 0], inside[:, 1], s=14, alpha=0.8, linewidths=0,
            color=COLOURS[code] if named else GREY, marker=MARKERS[code] if named else ".",
            label=f"{space.names[code]} ({len(inside):,})",
        )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title="group (items)")
    axes.set(title=f"The {len(space.points):,} most frequent items in the model's space,\n"
             f"{space.title}; near means similar (t-SNE)")  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    return as_png(figure)


def _curves(types: TypeResults) -> list[tuple[int, dict[str, Any]]]:
    """The most frequent types, each with a style."""
    counts = np.bincount(types.true[types.true >= 0], minlength=len(types.names))
    return [(int(code), _style(at)) for at, code in enumerate(largest(counts, MOST_CURVES))]


def _style(at: int) -> dict[str, Any]:
    return {"color": COLOURS[at % len(COLOURS)], "linestyle": LINES[at // len(COLOURS) % 4]}


def largest(counts: NDArray[np.int64], most: int) -> Ints:
    """The `most` types with the largest counts, in their own order."""
    kept: Ints = np.sort(np.argsort(-counts, kind="stable")[:most])
    return kept


def thinned(*columns: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """At most CURVE_POINTS of the points, first and last among them."""
    size = len(columns[0])
    at = np.unique(np.linspace(0, size - 1, min(size, CURVE_POINTS)).astype(np.int64))
    return [column[at] for column in columns]


def _words(name: str) -> str:
    return name.replace("_at_", "@").replace("_", " ")


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def as_png(figure: Figure) -> bytes:
    """The figure as a file."""
    # A canvas of its own instead of pyplot: no global state, no display, safe in threads.
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

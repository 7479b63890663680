"""Pictures of several versions: curves over one another, what needs a panel beside one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from predictor.learning.measures.side_by_side import (
    BASELINE,
    ItemLists,
    Task,
    TypeAnswers,
    TypeLines,
)
from predictor.learning.measures.type_metrics import roc_auc
from predictor.learning.reports.plots import (
    COLOURS,
    GREY,
    LINES,
    ItemResults,
    TypeResults,
    as_png,
    confusion_matrix,
    history_strata,
    item_calibration,
    largest,
    popularity_strata,
    precision_recall_points,
    roc_points,
    thinned,
    type_calibration,
)

MOST_PANELS = 9
"""Types that have a panel of curves: the most frequent."""

MOST_LINES = 7
"""In one picture: the best, each with a colour of its own; the last is the best baseline."""


@dataclass(frozen=True)
class Picture:
    """One for the report and its folder."""

    task: str
    method: str | None
    """Whose it is; None: of several."""
    file: str
    text: str
    """What it shows, for those who do not see it too."""
    png: bytes


def draw(report: Mapping[str, Any], tasks: Mapping[str, Task]) -> list[Picture]:
    """All pictures.

    Args:
        report: of `compare`: by task, methods with their metrics, the best first.
        tasks: what they were measured on.
    """
    pictures: list[Picture] = []
    for title, task in tasks.items():
        methods = list(report[title]["methods"])
        if isinstance(task, ItemLists):
            pictures += _items(title, task, methods)
        else:
            pictures += _types(title, task, methods)
    return pictures


def _lines(methods: Sequence[str]) -> list[str]:
    """The best versions and the best baseline, in this order."""
    versions = [name for name in methods if not name.startswith(BASELINE)]
    baselines = [name for name in methods if name.startswith(BASELINE)]
    return versions[: MOST_LINES - 1] + baselines[:1]


def _items(title: str, task: ItemLists, methods: Sequence[str]) -> list[Picture]:
    shown = ItemResults({name: task.hits[name] for name in _lines(methods)}, task.popularity)
    pictures = [
        Picture(title, None, f"{title}_by_popularity.png",
                "Recall of target items by how often they occur in training.",
                popularity_strata(shown)),
        Picture(title, None, f"{title}_by_history.png",
                "Hits by the length of the user's history.", history_strata(shown)),
    ]  # fmt: skip
    for file, method in _own(title, methods):
        one = ItemResults({method: task.hits[method]}, task.popularity, task.probabilities[method])
        text = f"{method}: how often an item came, by its predicted probability."
        pictures.append(
            Picture(title, method, f"{file}_calibration.png", text, item_calibration(one))
        )
    return pictures


def _types(title: str, task: TypeLines, methods: Sequence[str]) -> list[Picture]:
    shown = {name: task.answers[name] for name in _lines(methods)}
    pictures = [
        Picture(title, None, f"{title}_roc.png",
                "ROC curves, each type against the rest, a panel a type.",
                _panels(task, shown, _roc, "false positive rate", "true positive rate", "default")),
        Picture(title, None, f"{title}_precision_recall.png",
                "Precision by recall, each type against the rest, a panel a type.",
                _panels(task, shown, _precision_recall, "recall", "precision", "steps-pre")),
    ]  # fmt: skip
    for file, method in _own(title, methods):
        own = task.answers[method]
        results = TypeResults(task.names, own.probabilities, task.true, own.predicted)
        pictures += [
            Picture(title, method, f"{file}_confusion.png",
                    f"{method}: true types down, predicted types across.",
                    confusion_matrix(results)),
            Picture(title, method, f"{file}_calibration.png",
                    f"{method}: how often the most probable type came, by its probability.",
                    type_calibration(results)),
        ]  # fmt: skip
    return pictures


def _own(title: str, methods: Sequence[str]) -> list[tuple[str, str]]:
    """Beginnings of file names, and the versions that have pictures of their own."""
    versions = [name for name in methods if not name.startswith(BASELINE)]
    return [
        (f"{title}_{number}_{name.replace('/', '_')}", name)
        for number, name in enumerate(versions, 1)
    ]


Curve = Callable[
    [NDArray[np.float32], NDArray[np.bool_]],
    tuple[NDArray[np.float64], NDArray[np.float64], float | None],
]
"""From scores and what is positive to x, y and the area below."""


def _roc(
    scores: NDArray[np.float32], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None]:
    return *roc_points(scores, positive), roc_auc(scores, positive)


def _precision_recall(
    scores: NDArray[np.float32], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float | None]:
    return precision_recall_points(scores, positive)


def _panels(
    task: TypeLines,
    shown: Mapping[str, TypeAnswers],
    curve: Curve,
    xlabel: str,
    ylabel: str,
    drawstyle: str,
) -> bytes:
    """A panel for each of the most frequent types, with a curve a method."""
    counts = np.bincount(task.true[task.true >= 0], minlength=len(task.names))
    kept = [code for code in largest(counts, MOST_PANELS) if counts[code]]
    columns = min(3, len(kept))
    rows = -(-len(kept) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 4.2 * rows), layout="constrained")
    panels: list[Axes] = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axes, code in zip(panels, kept, strict=False):
        positive = task.true == code
        for at, (name, own) in enumerate(shown.items()):
            x, y, area = curve(own.probabilities[:, code], positive)
            value = "-" if area is None else f"{area:.3f}"
            # Dashes show what lies beneath: versions may be equal.
            colour = GREY if name.startswith(BASELINE) else COLOURS[at % len(COLOURS)]
            axes.plot(*thinned(x, y), label=f"{value} {name}", color=colour,
                      linestyle=LINES[at % len(LINES)], drawstyle=drawstyle)  # fmt: skip
        axes.set(title=f"{task.names[code]} ({counts[code]:,} of {len(task.true):,})",
                 xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1.01))  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(title="area", fontsize="small")
    for empty in panels[len(kept) :]:
        empty.remove()
    return as_png(figure)

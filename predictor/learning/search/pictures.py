"""Pictures of a search, as PNG: how it went, what mattered, and how folds differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from predictor.learning.reports.plots import COLOURS, GREY, MARKERS, as_png
from predictor.learning.search.results import SHOWN, Found, Row
from predictor.learning.search.space import Space

COLUMNS = 4
"""Panels side by side."""

LETTERS = 25
"""Of the choices of a setting that fit below its panel."""


def draw(
    found: Found, folds: Sequence[str], importances: Mapping[str, float], space: Space
) -> dict[str, bytes]:
    """PNG by file name.

    Args:
        found: the trials; one is whole at least.
        folds: their names.
        importances: see Study.importances; empty where there are none.
        space: what was searched.
    """
    pictures = {
        "history.png": history(found),
        "slices.png": slices(found, space),
        "folds.png": fold_scores(found, folds),
    }
    if importances:
        pictures["importances.png"] = draw_importances(found, importances)
    return pictures


def history(found: Found) -> bytes:
    """The metric of each trial in their order, and the best so far."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    pruned, whole = _pruned(found), sorted(found.ranking, key=lambda row: row.number)
    if pruned:
        axes.scatter(*_points(pruned), color=GREY, marker="x", label="pruned: where it stood")
    axes.errorbar(
        *_points(whole), yerr=[row.spread or 0.0 for row in whole], color=COLOURS[0], marker="o",
        linestyle="", capsize=2, label="trial, with the standard deviation over folds",
    )  # fmt: skip
    best = np.maximum if found.metric.sign > 0 else np.minimum
    numbers, values = _points(whole)
    axes.step(
        [*numbers, len(found.rows) + 0.5], [*best.accumulate(values), best.reduce(values)],
        where="post", color=COLOURS[3], label="best so far",
    )  # fmt: skip
    axes.set(title="The search", xlabel="trial", ylabel=_label(found))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return as_png(figure)


def slices(found: Found, space: Space) -> bytes:
    """The metric by each setting, later trials darker."""
    columns = min(COLUMNS, len(space))
    lines = math.ceil(len(space) / columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.8 * lines), layout="constrained")
    panels = list(np.ravel(figure.subplots(lines, columns, squeeze=False, sharey=True)))
    pruned, whole = _pruned(found), found.ranking
    for axes, (name, distribution) in zip(panels, space.items(), strict=False):
        place = {}
        if isinstance(distribution, CategoricalDistribution):
            place = {choice: at for at, choice in enumerate(distribution.choices)}
            labels = ["-" if choice is None else str(choice) for choice in place]
            axes.set_xticks(range(len(place)), labels)
            if len("".join(labels)) > LETTERS:
                axes.tick_params("x", rotation=45)
            axes.set_xlim(-0.5, len(place) - 0.5)
        elif isinstance(distribution, FloatDistribution | IntDistribution) and distribution.log:
            axes.set_xscale("log")
        elif isinstance(distribution, IntDistribution):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for rows, style in ((pruned, {"marker": "x", "color": GREY}), (whole, _by_number(found))):
            having = [row for row in rows if name in row.settings]
            at = [place.get(row.settings[name], row.settings[name]) for row in having]
            colour = {"c": [row.number for row in having]} if "cmap" in style else {}
            axes.scatter(at, [row.value for row in having], **style, **colour)
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
    for empty in panels[len(space) :]:
        empty.remove()
    figure.suptitle(f"{_label(found)} by each setting; later trials darker, pruned ones grey")
    return as_png(figure)


def fold_scores(found: Found, folds: Sequence[str]) -> bytes:
    """The metric of the best trials on each fold: whether one is better everywhere."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(found.ranking[:SHOWN]):
        axes.plot(
            range(len(folds)), row.folds, color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)], label=f"{row.number} ({row.value:.4f})",
        )  # fmt: skip
    axes.set_xticks(range(len(folds)), [fill(name, 12) for name in folds], fontsize="small")
    axes.set(title="The best trials, fold by fold", xlabel="fold", ylabel=_label(found))
    axes.grid(alpha=0.3)
    axes.legend(title="trial (mean)")
    return as_png(figure)


def draw_importances(found: Found, importances: Mapping[str, float]) -> bytes:
    """How much of the scores' variance each setting explains."""
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(importances)), layout="constrained")
    axes: Axes = figure.subplots()
    names = list(importances)[::-1]
    axes.barh(names, [importances[name] for name in names], color=COLOURS[0])
    axes.set(title=f"What mattered, by {len(found.ranking)} trials (fANOVA)", xlim=(0, None))
    axes.set(xlabel="share of the variance that is explained")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    return as_png(figure)


def _pruned(found: Found) -> list[Row]:
    """Those that had a value before they were pruned."""
    return [row for row in found.rows if row.why is not None and row.value is not None]


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [row.number for row in rows], [row.value or 0.0 for row in rows]


def _by_number(found: Found) -> dict[str, object]:
    return {"marker": "o", "cmap": "Blues", "vmin": -len(found.rows) / 2, "vmax": len(found.rows)}


def _label(found: Found) -> str:
    return f"{found.metric.name} ({'more' if found.metric.sign > 0 else 'less'} is better)"

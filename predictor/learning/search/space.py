"""The settings that a search may choose, and from what.

Ranges hold the defaults of `recipe` with room on both sides. Sizes are choices rather than ranges,
since towers and heads share them evenly. What has no effect on the data at hand is not searched.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from foretell.errors import InvalidArgumentError
from predictor.learning.sequence.recipe import FULL_SOFTMAX_ITEMS, FitConfig, Recipe
from predictor.learning.sources import Dataset

Space = dict[str, BaseDistribution]
"""Distributions by the FitConfig field that they are of."""

Setting = str | bool | int | float | None

MODEL = "model_type"

ALWAYS: Space = {
    "learning_rate": FloatDistribution(3e-4, 3e-2, log=True),
    "dims": CategoricalDistribution((32, 64, 128, 256)),
    "hidden": CategoricalDistribution((32, 64, 128, 256)),
    "layers": IntDistribution(1, 3),
    "history_length": CategoricalDistribution((20, 50, 100, 200)),
    "batch_contexts": IntDistribution(16, 1024, log=True),
    "dropout": FloatDistribution(0.0, 0.6),
    "input_dropout": FloatDistribution(0.0, 0.5),
    "weight_decay": FloatDistribution(0.0, 0.1),
    "late_weight": FloatDistribution(0.0, 4.0),
}

WITH_ITEMS: Space = {
    "row_dropout": FloatDistribution(0.0, 0.5),
    "popularity_discount": FloatDistribution(0.0, 0.5),
    "negatives": CategoricalDistribution((0, 256, 1024, 4096)),
}

WITH_TEXTS: Space = {
    "text_dims": CategoricalDistribution((64, 128, 256, 384)),
    "terms": CategoricalDistribution((False, True)),
    "term_dropout": FloatDistribution(0.0, 0.6),
}

ALL = (*ALWAYS, *WITH_ITEMS, *WITH_TEXTS)
"""Fields that `--tune` may name."""


def space_of(
    dataset: Dataset,
    start: Recipe,
    fixed: FitConfig,
    models: Sequence[str] = (),
    tune: Collection[str] | None = None,
) -> Space:
    """What is searched: always with `start` in it.

    Args:
        dataset: says which fields have an effect.
        start: what `fixed` comes to on this data without a search.
        fixed: what the caller has decided; searched only where `tune` says so.
        models: encoders to choose from, where there are several.
        tune: fields to choose; None: all that have an effect and are not decided.

    Raises:
        InvalidArgumentError: a field of `tune` is unknown or has no effect on this data, or nothing
            is left to choose.
    """
    possible = _possible(dataset)
    for name in tune or ():
        if name not in ALL:
            raise _wrong(f"{name!r} is none of the settings that are searched: {', '.join(ALL)}")
        if name not in possible:
            raise _wrong(f"{name} has no effect on this data")
    free = [name for name in possible if getattr(fixed, name) is None]
    chosen = free if tune is None else [name for name in possible if name in tune]
    space = {name: _with(possible[name], getattr(start, name)) for name in chosen}
    if len(models) > 1:
        space[MODEL] = CategoricalDistribution(tuple(models))
    if not space:
        raise _wrong("the configuration decides everything: name what to choose with --tune")
    return space


def start_of(space: Space, start: Recipe) -> dict[str, Setting]:
    """The point of the space that `start` is."""
    return {name: getattr(start, name) for name in space}


def _possible(dataset: Dataset) -> Space:
    """Those that have an effect."""
    events = dataset.events
    found = dict(ALWAYS)
    if events.has_items:
        found |= WITH_ITEMS
        items = len(events.item_ids)
        sizes = [size for size in (0, 256, 1024, 4096) if size < items]
        # The softmax over more takes too much memory and time, see `recipe.resolve`.
        found["negatives"] = CategoricalDistribution(
            sizes if items <= FULL_SOFTMAX_ITEMS else sizes[1:]
        )
        if len(sizes) == 1:
            del found["negatives"]
    if np.any(dataset.item_vectors) or np.any(dataset.text_vectors):
        cols = dataset.encoder.cols
        axes = [size for size in (64, 128, 256, 384) if size < cols] or [cols]
        found |= WITH_TEXTS | {"text_dims": CategoricalDistribution(axes)}
    return found


def _with(distribution: BaseDistribution, value: Setting) -> BaseDistribution:
    """The distribution, with room for the value."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        return CategoricalDistribution(choices if value in choices else (*choices, value))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    assert isinstance(value, int | float)
    if isinstance(distribution, IntDistribution):
        low, high = min(distribution.low, int(value)), max(distribution.high, int(value))
        return IntDistribution(low, high, log=distribution.log)
    return FloatDistribution(
        min(distribution.low, value), max(distribution.high, value), log=distribution.log
    )


def _wrong(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="NOTHING_TO_TUNE", field="tune")

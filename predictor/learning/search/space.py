"""The settings that a search may choose, and from what.

Ranges hold the defaults of `recipe` with room on both sides. Sizes are choices rather than ranges,
since towers and heads share them evenly. What has no effect on the data at hand is not searched.

A setting may have an effect beside some others alone, as the width of a layer has where the model
is `mlp`: see `applies`. Those come behind what they depend on, and trials choose in this order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from foretell.errors import InvalidArgumentError
from predictor.learning.classic.recipe import CLASSIC, FEATURES, FINE_TUNED, ClassicRecipe
from predictor.learning.sequence.recipe import FULL_SOFTMAX_ITEMS, FitConfig, Recipe
from predictor.learning.sources import Dataset
from predictor.models.sequence.encoders import model_types

Space = dict[str, BaseDistribution]
"""Distributions by the FitConfig field that they are of."""

Setting = str | bool | int | float | None

MODEL = "model_type"

INPUTS: Space = {
    "clock": CategoricalDistribution((False, True)),
    "sentiment": CategoricalDistribution((False, True)),
}
"""Searched where `--tune` names them: on public data they are not worth their share of the trials
(docs/quality.md)."""

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

DIMS = (8, 16, 32, 64, 128, 256)
"""That classic models keep of a text."""

OF_CLASSIC: Space = {
    # None: principal components, and these only where validation says that texts help.
    "features": CategoricalDistribution((None, *FEATURES)),
    "dims": CategoricalDistribution(DIMS),
    "history_length": CategoricalDistribution((20, 50, 100, 200)),
    "hidden": CategoricalDistribution((16, 32, 64, 128, 256)),
    # At most: all models that have any stop early.
    "epochs": IntDistribution(10, 1_000, log=True),
    **INPUTS,
}

_BAG = ("features", "dims", "history_length", *INPUTS)
SETTINGS = {
    "linear": _BAG,
    "logistic": _BAG,
    "mlp": (*_BAG, "hidden", "epochs"),
    "lightgbm": (*_BAG, "epochs"),
    "word2vec_logistic": ("dims", "history_length", *INPUTS),
}
"""Classic models that are searched, and which of OF_CLASSIC each has."""

ALL = tuple(dict.fromkeys((*ALWAYS, *WITH_ITEMS, *WITH_TEXTS, *OF_CLASSIC)))
"""Fields that `--tune` may name."""


def models_of(fixed: FitConfig, models: Sequence[str]) -> tuple[str, ...]:
    """The models to choose from; none: what the data decide.

    Args:
        fixed: its model is the one where `models` names none.
        models: see Plan.

    Raises:
        InvalidArgumentError: one of them is not searched, or they are of two kinds.
    """
    found = tuple(models) or ((fixed.model_type,) if fixed.model_type else ())
    for model in found:
        if model not in (*model_types(), *SETTINGS):
            raise InvalidArgumentError(_not_searched(model), field="model")
    classic = [model for model in found if model in SETTINGS]
    if classic and len(classic) < len(found):
        raise InvalidArgumentError(
            f"{', '.join(classic)} and sequence models have other settings, and are measured by "
            "other things (behavior types; items): search them apart, and `compare` what is found",
            field="model",
        )
    return found


def _not_searched(model: str) -> str:
    if model == FINE_TUNED:
        why = "each trial would fine-tune an encoder and embed all texts again: try --epochs"
    elif model in CLASSIC:
        why = "what there is to choose of it, validation chooses whenever it is trained"
    else:
        why = f"there are {', '.join((*model_types(), *SETTINGS))}"
    return f"the model {model} is not searched: {why}"


def space_of(
    dataset: Dataset,
    starts: Sequence[Recipe] | Sequence[ClassicRecipe],
    fixed: FitConfig,
    models: Sequence[str] = (),
    tune: Collection[str] | None = None,
) -> Space:
    """What is searched: always with `starts` in it.

    Args:
        dataset: says which fields have an effect.
        starts: what `fixed` comes to on this data without a search: with the encoder that the first
            trial has, or with each of the classic models.
        fixed: what the caller has decided; searched only where `tune` says so.
        models: to choose from, where there are several.
        tune: fields to choose; None: all but INPUTS that have an effect and are not decided.

    Raises:
        InvalidArgumentError: a field of `tune` is unknown or has no effect on this data, or nothing
            is left to choose.
    """
    classic = [start.model_type for start in starts if isinstance(start, ClassicRecipe)]
    possible = _of_classic(dataset, classic, fixed, tune) if classic else _possible(dataset)
    for name in tune or ():
        if name not in ALL:
            raise _wrong(f"{name!r} is none of the settings that are searched: {', '.join(ALL)}")
        if name not in possible:
            models_too = f" and {', '.join(classic)}" if classic else ""
            raise _wrong(f"{name} has no effect on this data{models_too}")
    free = [name for name in possible if getattr(fixed, name) is None and name not in INPUTS]
    chosen = free if tune is None else [name for name in possible if name in tune]
    space: Space = {MODEL: CategoricalDistribution(tuple(models))} if len(models) > 1 else {}
    for name in chosen:
        space[name] = possible[name]
        for start in starts:
            if applies(name, {MODEL: start.model_type}):
                space[name] = _with(space[name], _at(start, fixed, name))
    if not space:
        raise _wrong("the configuration decides everything: name what to choose with --tune")
    return space


def applies(name: str, chosen: Mapping[str, Setting]) -> bool:
    """Whether a setting has an effect beside those of the same space that are chosen before it."""
    model = chosen.get(MODEL)
    if isinstance(model, str) and name not in (MODEL, *SETTINGS.get(model, (name,))):
        return False
    return name != "dims" or chosen.get("features") != "all"


def start_of(space: Space, start: Recipe | ClassicRecipe, fixed: FitConfig) -> dict[str, Setting]:
    """The point of the space that `start` is, which `fixed` comes to."""
    point: dict[str, Setting] = {}
    for name in space:
        if applies(name, point):
            point[name] = _at(start, fixed, name)
    return point


def _at(start: Recipe | ClassicRecipe, fixed: FitConfig, name: str) -> Setting:
    # To leave features out is not the same as to ask for those that are usual: see OF_CLASSIC.
    value: Setting = fixed.features if name == "features" else getattr(start, name)
    return value


def _of_classic(
    dataset: Dataset, models: Sequence[str], fixed: FitConfig, tune: Collection[str] | None
) -> Space:
    """Those of classic models that have an effect."""
    found = {
        name: distribution
        for name, distribution in OF_CLASSIC.items()
        if any(name in SETTINGS[model] for model in models)
    }
    if not dataset.events.has_times:
        del found["clock"]
    if not _has_texts(dataset):
        return {
            name: found[name] for name in found if name not in ("features", "dims", "sentiment")
        }
    cols, tuned = dataset.encoder.cols, tune or ()
    if "features" in found and fixed.dims not in (None, cols) and "dims" not in tuned:
        found["features"] = CategoricalDistribution(
            [None, *(name for name in FEATURES if name != "all")]
        )
    found["dims"] = CategoricalDistribution([dims for dims in DIMS if dims < cols] or [cols])
    if fixed.features == "all" and "features" not in tuned:
        del found["dims"]
    return found


def _has_texts(dataset: Dataset) -> bool:
    return bool(np.any(dataset.item_vectors) or np.any(dataset.text_vectors))


def _possible(dataset: Dataset) -> Space:
    """Those of sequence models that have an effect."""
    events = dataset.events
    found = dict(ALWAYS)
    if events.has_times:
        found["clock"] = INPUTS["clock"]
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
    if _has_texts(dataset):
        cols = dataset.encoder.cols
        axes = [size for size in (64, 128, 256, 384) if size < cols] or [cols]
        found |= WITH_TEXTS | {
            "text_dims": CategoricalDistribution(axes), "sentiment": INPUTS["sentiment"]
        }  # fmt: skip
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

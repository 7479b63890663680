"""From the training part of a data set to a fitted classic model."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch

from foretell.errors import InvalidArgumentError
from foretell.projection import Projection
from foretell.vectors import Vectors
from predictor.learning.classic.heads import HEADS, Head, Lines
from predictor.learning.classic.recipe import (
    BY_CONTENT,
    ClassicRecipe,
    FittedBag,
    resolve_classic,
)
from predictor.learning.classic.representation import representation
from predictor.learning.data import Events, Targets, history_of, training_targets
from predictor.learning.measures.baselines import popularity
from predictor.learning.measures.evaluation import Space
from predictor.learning.measures.metrics import Floats, batches
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.history import MICROSECONDS
from predictor.models.sequence.bag import (
    BAG,
    BagNetwork,
    features_of,
    log_shares_at,
    text_features_of,
)
from predictor.models.sequence.encoders import NetworkConfig

MOST_LINES = 100_000
"""Of targets to learn from, drawn at random."""

MOST_NUMBERS = 100_000_000
"""Lines times features: bounds memory, at 400 MB."""

MOST_VALIDATION_LINES = 20_000

TIES = 1e-3
"""What the most popular item has in the axis of popularity: far less than texts differ."""

FIRST_EVENTS = 20.0
"""Users' first events that all events count for in what comes after an empty history."""

CONTENT_HALF_LIFE = 4.0
"""Of the shares by which models about items answer types: they learn nothing about them."""


def fit_classic(
    dataset: Dataset, part: Split, config: FitConfig, *, progress: bool = False
) -> FittedBag:
    """Fits one of CLASSIC on part.train; what there is to choose, part.validation chooses.

    Args:
        config: with a model_type of CLASSIC; completed by `resolve_classic`.
        progress: whether to tell on the standard error what was chosen.

    Raises:
        InvalidArgumentError: the model cannot be fitted on these data, or has no such setting.
    """
    train = part.train
    recipe = resolve_classic(config, dataset, train)
    projection = representation(dataset, train, recipe)
    seen = popularity(train)
    residuals = np.zeros((len(seen), projection.cols), np.float32)
    residuals[:, -1] = TIES * seen / (seen.max(initial=0) + 1)
    space = _space(dataset, projection, residuals)
    network = _empty(train, recipe, projection.cols)
    if recipe.model_type in BY_CONTENT:
        head = _decayed_shares(network)
    else:
        head = _fit_head(network, part, space, recipe)
    _fill(network, head)
    if progress:
        shown = "  ".join(f"{name} {value:g}" for name, value in head.chosen.items())
        sys.stderr.write(f"{recipe.model_type}: {shown}\n")
    recipe = replace(recipe, chosen=head.chosen)
    return FittedBag(recipe, network, projection, residuals, seen > 0, space)


def _space(dataset: Dataset, projection: Projection, residuals: Vectors) -> Space:
    texts = dataset.item_texts or [""] * len(residuals)
    items = projection.apply(dataset.item_vectors, texts=texts, residuals=residuals)
    return Space(items, projection.apply(dataset.text_vectors, texts=dataset.events.texts))


def _empty(train: Events, recipe: ClassicRecipe, dims: int) -> BagNetwork:
    """The network with all that is but counted."""
    network = BagNetwork(
        NetworkConfig(
            behavior_types=len(train.behavior_types),
            dims=dims,
            hidden=recipe.hidden,
            model_type=f"{BAG}:{recipe.model_type}",
            layers=int(recipe.model_type == "mlp"),
            heads=1,
            positions=recipe.history_length,
            traces=False,
            dropout=0.0,
            input_dropout=0.0,
            clock=recipe.clock,
        )
    )
    targets = training_targets(train)
    later = targets.end > targets.begin
    counts, first = (
        np.bincount(types[types >= 0], minlength=len(train.behavior_types))
        for types in (train.type, targets.type[~later[targets.row]])
    )
    shares = (counts + 1) / (counts + 1).sum()
    start = (first + FIRST_EVENTS * shares) / (first.sum() + FIRST_EVENTS)
    with torch.no_grad():
        network.log_shares.copy_(torch.from_numpy(np.log(shares)))
        network.start.copy_(torch.from_numpy(np.log(start)))
        if train.has_times and later.any():
            end = targets.end[later]
            gaps = (train.timestamp[end] - train.timestamp[end - 1]) / MICROSECONDS
            network.log_gap.fill_(float(np.median(np.log(gaps))))
    return network.eval()


def _decayed_shares(network: BagNetwork) -> Head:
    """The user's own shares of the types."""
    types = network.config.behavior_types
    weight = np.zeros((types, features_of(network.config)))
    weight[:, log_shares_at(network.config, CONTENT_HALF_LIFE)] = np.eye(types)
    return Head([(weight, np.zeros(types))], 0.0, {})


def _fit_head(network: BagNetwork, part: Split, space: Space, recipe: ClassicRecipe) -> Head:
    """The fitted head, which reads features as the network makes them."""
    most = min(MOST_LINES, MOST_NUMBERS // features_of(network.config))
    learn = _lines(network, _drawn(training_targets(part.train), most, recipe.seed), space, recipe)
    if not len(learn.true):
        raise InvalidArgumentError(
            "no event to train on has an earlier one of its user: the model "
            f"{recipe.model_type} has no history to read",
            reason="TOO_FEW_EVENTS",
            field="user_id",
        )
    if len(np.unique(learn.true)) < 2:
        raise InvalidArgumentError(
            f"all {len(learn.true)} events to train on that follow another of their user have one "
            f"behavior type: the model {recipe.model_type} has nothing to tell apart",
            reason="ONE_BEHAVIOR_TYPE",
            field="behavior_type",
        )
    most = min(most, MOST_VALIDATION_LINES)
    judge = _lines(network, _drawn(part.validation, most, recipe.seed), space, recipe)
    log_shares = network.log_shares.detach().numpy()
    fit = HEADS[recipe.model_type]
    head = fit(learn, judge, log_shares, recipe)
    if recipe.texts is not None:
        return head
    for lines in (learn, judge):
        lines.features[:, : text_features_of(network.config)] = 0
    without = fit(learn, judge, log_shares, recipe)
    better = head if head.loss < without.loss else without
    return replace(better, chosen={**better.chosen, "texts": float(better is head)})


def _drawn(targets: Targets, most: int, seed: int) -> Targets:
    """The lines that have a type and a history; of too many some at random, of each type one."""
    lines = np.flatnonzero((targets.type >= 0) & (targets.end > targets.begin)[targets.row])
    if len(lines) > most:
        lines = np.random.default_rng(seed).permutation(lines)
        _, one = np.unique(targets.type[lines], return_index=True)
        lines = np.union1d(lines[:most], lines[one])
    chosen = np.zeros(len(targets), np.bool_)
    chosen[targets.row[lines]] = True
    some = replace(
        targets, row=targets.row[lines], item=targets.item[lines], type=targets.type[lines]
    )
    return some.subset(chosen)


def _lines(network: BagNetwork, targets: Targets, space: Space, recipe: ClassicRecipe) -> Lines:
    """Features of histories as serving makes them."""
    parts: list[Floats] = [np.zeros((0, features_of(network.config)), np.float32)]
    for rows in batches(len(targets)):
        batch = history_of(targets, rows, recipe.history_length, space.items, space.texts)
        parts.append(network.bag(batch).features())
    features = np.concatenate(parts)[targets.row]
    return Lines(features, targets.type, text_features_of(network.config))


def _fill(network: BagNetwork, head: Head) -> None:
    with torch.no_grad():
        for layer, (weight, bias) in zip(network.affine, head.layers, strict=True):
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    if head.trees:
        network.grow(head.trees)

"""From the training part of a data set to a fitted sequence model and its item space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from foretell.projection import Projection
from foretell.terms import most_terms
from foretell.vectors import Vectors
from predictor.learning.data import Targets
from predictor.learning.measures import baselines, evaluation
from predictor.learning.measures.evaluation import Space
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.sequence.fitting import Epoch, fit
from predictor.learning.sequence.item_space import ItemSpace, TextReader
from predictor.learning.sequence.learner import Learner
from predictor.learning.sequence.parallel import device
from predictor.learning.sequence.recipe import FitConfig, Recipe, resolve
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.sequence.network import NetworkConfig, SequenceNetwork

VALIDATION_CONTEXTS = 5_000
"""Measured after each epoch, at most: to choose an epoch, the same sample of many will do."""


@dataclass(frozen=True)
class FittedSequence:
    """A fitted model and all that follows from it."""

    recipe: Recipe
    network: SequenceNetwork
    curve: list[Epoch]
    projection: Projection
    residuals: Vectors
    """(items, dims)."""
    warm: NDArray[np.bool_]
    """(items,) whether the item has a residual."""
    space: Space


def fit_sequence(
    dataset: Dataset,
    part: Split,
    config: FitConfig,
    *,
    exclude_history: bool,
    progress: bool,
    stop: Callable[[Epoch], bool] | None = None,
) -> FittedSequence:
    """Fits on part.train; the epoch is chosen on part.validation.

    Args:
        config: completed by `recipe.resolve`.
        exclude_history: whether validation leaves items of the user's own history out.
        stop: see `fit`.
    """
    recipe = resolve(config, part.train)
    learner, reader = new_learner(dataset, part, recipe)
    warm = baselines.popularity(part.train) > 0
    part = replace(part, validation=_some(part.validation, recipe.seed))

    def validate(learner: Learner) -> tuple[float, dict[str, float]]:
        return _measure(learner, part, warm, exclude_history=exclude_history)

    curve = fit(learner, part.train, validate, progress=progress, stop=stop)
    space = learner.space
    return FittedSequence(
        recipe, learner.network, curve, space.projection(reader), space.residuals(), warm,
        space_of(learner),
    )  # fmt: skip


def new_learner(dataset: Dataset, part: Split, recipe: Recipe) -> tuple[Learner, TextReader]:
    """An untrained learner, reproducible by the recipe's seed, and how its texts are read."""
    train = part.train
    torch.manual_seed(recipe.seed)
    popularity = baselines.popularity(train)
    warm = np.flatnonzero(popularity > 0)
    read = np.unique(train.text[(train.item < 0) & (train.text >= 0)])
    item_texts = dataset.item_texts or [""] * len(train.item_ids)
    reader = TextReader(
        np.concatenate([dataset.item_vectors[warm], dataset.text_vectors[read]]),
        [*(item_texts[int(i)] for i in warm), *(train.texts[int(t)] for t in read)],
        recipe.text_dims or 1,
        most_terms=most_terms(recipe.dims) if recipe.terms else 0,
        beside=dataset.sentiment if recipe.sentiment else None,
    )
    network = SequenceNetwork(
        NetworkConfig(
            behavior_types=len(train.behavior_types),
            dims=recipe.dims,
            hidden=recipe.hidden,
            model_type=recipe.model_type,
            layers=recipe.layers,
            heads=recipe.heads,
            towers=recipe.towers,
            positions=recipe.history_length,
            traces=recipe.traces,
            dropout=recipe.dropout,
            input_dropout=recipe.input_dropout,
            clock=recipe.clock,
        )
    )
    space = ItemSpace(
        reader.read(dataset.item_vectors, item_texts),
        reader.read(dataset.text_vectors, train.texts),
        popularity,
        recipe.dims,
        terms=len(reader.terms),
        row_dropout=recipe.row_dropout,
        term_dropout=recipe.term_dropout,
        use_text=recipe.text_dims > 0,
        traces=recipe.traces,
        towers=recipe.towers,
    )
    return Learner(network, space, recipe).to(device()), reader


def _some(targets: Targets, seed: int) -> Targets:
    """At most VALIDATION_CONTEXTS, drawn at random."""
    chosen = np.random.default_rng(seed).permutation(len(targets)) < VALIDATION_CONTEXTS
    return targets if chosen.all() else targets.subset(chosen)


@torch.inference_mode()
def space_of(learner: Learner) -> Space:
    """All vectors as training has them now."""
    space = learner.space.eval()
    return Space(space.items().float().cpu().numpy(), space.texts().float().cpu().numpy())


def _measure(
    learner: Learner, part: Split, warm: NDArray[np.bool_], *, exclude_history: bool
) -> tuple[float, dict[str, float]]:
    """The validation score, and what to show beside it."""
    targets, vectors = part.validation, space_of(learner)
    found = evaluation.outputs(learner.network, targets, vectors, learner.recipe.history_length)
    shown: dict[str, float] = {}
    score = 0.0
    if len(part.train.behavior_types) > 1 and (targets.type >= 0).any():
        types = evaluation.measure_types(evaluation.type_scorer(found, 1.0), targets)
        shown = {"type_accuracy": types["accuracy"], "type_log_loss": types["log_loss"]}
        score = -types["log_loss"]
    if part.train.has_items and (targets.item >= 0).any():
        items = item_metrics(
            evaluation.item_scorer(found, vectors), targets, warm, exclude_history=exclude_history
        )
        if items["contexts"]:
            names = ("hits_at_10", "recall_at_10", "ndcg_at_10")
            shown |= {name: items[name] for name in names}
            score = items["ndcg_at_10"]  # finer than hits, and so less noisy
    return score, shown

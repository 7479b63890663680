"""From the training part of a data set to a fitted sequence model and its item space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretell.projection import Projection
from foretell.vectors import Vectors
from predictor.learning import baselines, evaluation
from predictor.learning.evaluation import Space
from predictor.learning.fitting import Epoch, FitConfig, Learner, fit, new_learner
from predictor.learning.item_space import Whitening
from predictor.learning.metrics import item_metrics
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.sequence import SequenceNetwork

TEXT_DIMS = 128
"""Principal axes of the text vectors that the projection reads: of MiniLM's 384, those beyond
change nothing measurable on groceries, and cost a third of a step."""


@dataclass(frozen=True)
class FittedSequence:
    """A fitted model and all that follows from it."""

    network: SequenceNetwork
    curve: list[Epoch]
    projection: Projection
    residuals: Vectors
    """(items, dims)."""
    warm: NDArray[np.bool_]
    """(items,) whether the item has a residual."""
    space: Space


def fit_sequence(
    dataset: Dataset, part: Split, config: FitConfig, *, exclude_history: bool, progress: bool
) -> FittedSequence:
    """Fits on part.train; the epoch is chosen on part.validation.

    Args:
        exclude_history: whether validation leaves items of the user's own history out.
    """
    train = part.train
    popularity = baselines.popularity(train)
    warm = popularity > 0
    read = np.unique(train.text[(train.item < 0) & (train.text >= 0)])
    fitted_on = np.concatenate([dataset.item_vectors[warm], dataset.text_vectors[read]])
    whitening = Whitening(fitted_on, TEXT_DIMS)
    learner = new_learner(
        train,
        whitening.apply(dataset.item_vectors),
        whitening.apply(dataset.text_vectors),
        popularity,
        config,
    )

    def space() -> tuple[Projection, Vectors, Space]:
        projection = learner.space.projection(whitening)
        residuals = learner.space.residuals()
        items = projection.apply(dataset.item_vectors, residuals=residuals)
        return projection, residuals, Space(items, projection.apply(dataset.text_vectors))

    def validate(learner: Learner) -> tuple[float, dict[str, float]]:
        _, _, vectors = space()
        found = evaluation.outputs(learner.network, part.validation, vectors, config.history_length)
        shown: dict[str, float] = {}
        score = 0.0
        if len(train.behavior_types) > 1 and (part.validation.type >= 0).any():
            types = evaluation.measure_types(evaluation.type_scorer(found, 1.0), part.validation)
            shown = {"type_accuracy": types["accuracy"], "type_log_loss": types["log_loss"]}
            score = -types["log_loss"]
        if train.has_items and (part.validation.item >= 0).any():
            items = item_metrics(
                evaluation.item_scorer(found, vectors), part.validation, warm,
                exclude_history=exclude_history,
            )  # fmt: skip
            if items["contexts"]:
                shown |= {name: items[name] for name in ("hits_at_10", "ndcg_at_10")}
                score = items["ndcg_at_10"]  # finer than hits, and so less noisy
        return score, shown

    curve = fit(learner, train, validate, progress=progress)
    return FittedSequence(learner.network, curve, *space()[:2], warm, space()[2])

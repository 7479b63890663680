"""Two tables for events that have texts and no items: the seed article's experiment, and ours.

`own_text` is the article's: a row's text vector -> that row's behavior type, by a logistic head
on the encoder's vectors, over a random division of the rows. It classifies a behavior that has
happened already, so it is no prediction. `next_type` is one: the type of a row from its user's
earlier rows, by the sequence model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from predictor.learning.data import training_targets
from predictor.learning.measures.evaluation import Space, measure_types, outputs, type_scorer
from predictor.learning.measures.type_metrics import type_metrics
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.history import Ints
from predictor.models.version import OWN, Version

TRAIN_CONTEXTS = 20_000
"""Training rows at most, drawn at random, over which the training accuracy is measured."""

ITERATIONS = 2_000
"""Of the solver at most; some hundreds are usual for vectors of length 1."""


def own_text(dataset: Dataset, share: float, seed: int) -> dict[str, Any] | None:
    """Fits on 1 - share of the rows that have a text, measures on the others.

    None: there are too few of them to fit on two types, or to measure on any.
    """
    events = dataset.events
    rows = np.flatnonzero(events.text >= 0)
    vectors, true = dataset.text_vectors[events.text[rows]], events.type[rows]
    held_out = np.random.default_rng(seed).random(len(rows)) < share
    train, validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if len(np.unique(true[train])) < 2 or not len(validation):
        return None
    head = LogisticRegression(max_iter=ITERATIONS).fit(vectors[train], true[train])
    predicted: Ints = head.predict(vectors)
    probabilities = np.zeros((len(validation), len(events.behavior_types)), np.float32)
    probabilities[:, head.classes_] = head.predict_proba(vectors[validation])
    majority = np.bincount(true[train]).argmax()
    return {
        "train_accuracy": float((predicted == true)[train].mean()),
        "validation_accuracy": float((predicted == true)[validation].mean()),
        "majority_accuracy": float((true[validation] == majority).mean()),
        **_summary(type_metrics(probabilities, true[validation], events.behavior_types)),
        "behavior_types": list(events.behavior_types),
        "train_rows": len(train),
        "validation_rows": len(validation),
    }


def next_type(
    version: Version, space: Space, part: Split, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The sequence model's table.

    Args:
        version: as trained.
        space: text vectors in its space.
        part: training accuracy is measured on part.train.
        measured: type_metrics of the held-out rows by method. They are targets only; their
            histories are the user's true earlier rows.
    """
    targets = training_targets(part.train)
    if len(targets) > TRAIN_CONTEXTS:
        order = np.random.default_rng(len(targets)).permutation(len(targets))
        targets = targets.subset(order < TRAIN_CONTEXTS)
    found = outputs(version.network, targets, space, version.config.history_length)
    own = measured[OWN]
    return {
        # The largest probability is the largest logit, whatever the temperature.
        "train_accuracy": measure_types(type_scorer(found, 1.0), targets)["accuracy"],
        "validation_accuracy": own["accuracy"],
        "majority_accuracy": measured["majority"]["accuracy"],
        **_summary(own),
        "behavior_types": list(part.train.behavior_types),
        "train_rows": len(part.train),
        "validation_rows": own["lines"],
    }


def _summary(metrics: dict[str, Any]) -> dict[str, Any]:
    kept = ("precision", "recall", "f1", "roc_auc", "mse", "log_loss", "confusion_matrix")
    return {name: metrics[name] for name in kept}

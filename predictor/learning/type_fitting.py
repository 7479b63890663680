"""Fits the type models: boosted trees on the prefixes of the training histories."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import lightgbm
import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Events, Targets, training_targets
from predictor.learning.splits import Split
from predictor.learning.type_metrics import type_metrics
from predictor.learning.type_rules import fit_rule, plain
from predictor.learning.type_tables import item_types, own_counts
from predictor.models.history import HISTORY_EVENTS, Ints
from predictor.models.type_models import NO_HISTORY, ItemTypeModel, Trees, TypeModel, chunks
from predictor.models.type_tables import Floats, ItemTypes

LEAST_LINES = 500
"""Of targets to learn from: a few leaves' worth."""

LEAST_VALIDATION_LINES = 100

MOST_LINES = 70_000
"""Of targets to learn from, drawn at random."""

MOST_VALIDATION_LINES = 20_000

MOST_EVENTS = 24_000_000
"""Of the histories of the targets to learn from: bounds time where users have thousands."""

ROUNDS = 600
PATIENCE = 40
"""Rounds without a smaller log loss on validation after which no more are tried."""

LEAF_LINES = 200
"""Of a leaf, and at most a twentieth of all lines."""

PARAMETERS = {
    "objective": "multiclass",
    "num_leaves": 15,
    "learning_rate": 0.03,
    "feature_fraction": 0.2,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}
"""Chosen on MovieLens' validation part, which is flat around them."""

Model = TypeVar("Model", bound=Trees)


@dataclass(frozen=True)
class FittedTypes:
    """The type models; one is missing where there is too little to learn it from."""

    next_type: TypeModel | None = None
    item_type: ItemTypeModel | None = None
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the model's NAME: rounds, and type_metrics of the validation lines; probabilities and
    choices are by a rule that was fitted on other users' lines."""


@dataclass(frozen=True)
class _Lines:
    """Targets, and what the tables must leave out of their features."""

    targets: Targets
    """Every line has a type."""
    own: Floats | None = None
    """(events of targets.events, types) see own_counts; None: nothing."""
    own_lines: Floats | None = None
    """(lines, types) the same of the lines' items."""

    @property
    def user(self) -> Ints:
        """(lines,) a number for each user."""
        # Where a user's events begin is their own, an empty history's too.
        return self.targets.begin[self.targets.row]

    def features(self, table: ItemTypes, *, has_times: bool) -> Floats:
        """(lines, features) of the item model, which begin with those of the other; without items
        of the other alone."""
        rule = plain(len(table.prior))
        item_model = ItemTypeModel("", table, rule, has_times)
        model = TypeModel("", table, rule, has_times)
        targets, parts = self.targets, []
        for rows, _ in chunks(targets.lengths(HISTORY_EVENTS)):
            lines = slice(*np.searchsorted(targets.row, [rows.start, rows.stop]))
            own = None if self.own is None else self.own[targets.positions(rows, HISTORY_EVENTS)]
            histories, row = targets.histories(rows), targets.row[lines] - rows.start
            if table.has_items:
                left = None if self.own_lines is None else self.own_lines[lines]
                parts.append(
                    item_model.features(histories, row, targets.item[lines], own, left)
                )
            else:
                parts.append(model.features(histories, own)[row])
        return np.concatenate(parts)


def fit_type_models(part: Split, item_vectors: Vectors, seed: int) -> FittedTypes:
    """Fits both models on part.train; rounds, calibration and decision rule on part.validation.

    A training target is predicted from its user's true earlier events, and what the tables count
    leaves that user out. Nothing is fitted again with the validation part.

    Args:
        part: with the vocabulary of types of the training part.
        item_vectors: (items, cols) of the items' texts.
        seed: of the draw of targets, the trees and the folds of the rule.
    """
    train = part.train
    learn = _learning(train, seed)
    judge = _drawn(_Lines(part.validation), MOST_VALIDATION_LINES, MOST_EVENTS, seed)
    true = learn.targets.type, judge.targets.type
    few = len(true[0]) < LEAST_LINES or len(true[1]) < LEAST_VALIDATION_LINES
    if few or len(np.unique(true[0])) < 2:
        return FittedTypes()
    table = item_types(train, item_vectors)
    has_times = train.has_times
    features = [lines.features(table, has_times=has_times) for lines in (learn, judge)]
    report: dict[str, dict[str, Any]] = {}

    def fitted(kind: type[Model], chosen: list[NDArray[np.bool_]], columns: int | None) -> Model:
        text, rounds, scores = _trees(
            [matrix[some, :columns] for matrix, some in zip(features, chosen, strict=True)],
            [types[some] for types, some in zip(true, chosen, strict=True)],
            len(table.prior),
            seed,
        )
        kept = true[1][chosen[1]]
        rule, probabilities, choices = fit_rule(scores, kept, judge.user[chosen[1]], seed)
        measured = type_metrics(probabilities, kept, train.behavior_types, choices)
        report[kind.NAME] = {"rounds": rounds, **measured}
        return kind(text, table, rule, has_times)

    of_user = TypeModel("", table, plain(len(table.prior)), has_times).features(NO_HISTORY).shape[1]
    next_type = fitted(TypeModel, [np.ones(len(types), np.bool_) for types in true], of_user)
    with_item = [lines.targets.item != -1 for lines in (learn, judge)]
    enough = with_item[0].sum() >= LEAST_LINES and with_item[1].sum() >= LEAST_VALIDATION_LINES
    item_type = fitted(ItemTypeModel, with_item, None) if table.has_items and enough else None
    return FittedTypes(next_type, item_type, report)


def _learning(train: Events, seed: int) -> _Lines:
    own = own_counts(train)
    return _drawn(_Lines(training_targets(train), own, own), MOST_LINES, MOST_EVENTS, seed)


def _drawn(lines: _Lines, most: int, most_events: int, seed: int) -> _Lines:
    """The lines that have a type; where they or their histories are too many, some at random."""
    targets = lines.targets
    typed = targets.type >= 0
    count = np.bincount(targets.row[typed], minlength=len(targets))
    order = np.random.default_rng(seed).permutation(len(targets))
    fits = np.cumsum(count[order]) <= most
    fits &= np.cumsum(targets.lengths(HISTORY_EVENTS)[order]) <= most_events
    chosen = np.zeros(len(targets), np.bool_)
    chosen[order[fits]] = True
    kept = chosen[targets.row] & typed
    some = replace(
        targets, row=targets.row[kept], item=targets.item[kept], type=targets.type[kept]
    ).subset(chosen & (count > 0))
    left = None if lines.own_lines is None else lines.own_lines[kept]
    return _Lines(some, lines.own, left)


def _trees(
    features: list[Floats], true: list[Ints], types: int, seed: int
) -> tuple[str, int, Floats]:
    """The trees in LightGBM's text format, their rounds, and their scores of the second part.

    Args:
        features: of the lines to learn from, and of those that say when to stop.
        true: the types of both.
        types: behavior types.
        seed: of the columns that a tree may read.
    """
    parameters = {
        **PARAMETERS,
        "num_class": types,
        "min_data_in_leaf": min(LEAF_LINES, len(true[0]) // 20),
        "seed": seed,
    }
    learn = lightgbm.Dataset(features[0], true[0], params=parameters)
    booster = lightgbm.train(
        parameters,
        learn,
        ROUNDS,
        valid_sets=[learn.create_valid(features[1], true[1])],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    rounds = booster.best_iteration
    text = booster.model_to_string(num_iteration=rounds)
    scores = booster.predict(features[1], num_iteration=rounds, raw_score=True, num_threads=1)
    return text, rounds, np.asarray(scores)

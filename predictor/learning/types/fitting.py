"""Fits the type models: boosted trees on the prefixes of the training histories."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import lightgbm
import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Events, Targets, training_targets
from predictor.learning.measures.type_metrics import type_metrics
from predictor.learning.splits import Split
from predictor.learning.types.rules import fit_rule, plain
from predictor.learning.types.tables import item_types, own_counts
from predictor.models.history import NONE, Histories, Ints
from predictor.models.types.models import (
    EVENTS,
    NO_HISTORY,
    ItemTypeModel,
    Rule,
    Trees,
    TypeModel,
    chunks,
)
from predictor.models.types.tables import Floats, ItemTypes

LEAST_LINES = 500
"""Of targets to learn from: a few leaves' worth."""

LEAST_VALIDATION_LINES = 100

MOST_LINES = 100_000
"""Of targets to learn from, drawn at random."""

MOST_VALIDATION_LINES = 20_000

MOST_EVENTS = 24_000_000
"""Of the histories of the targets to learn from: bounds time where users have thousands."""

ROUNDS = 400
PATIENCE = 30
"""Rounds without a smaller log loss on validation after which no more are tried."""

RECENCY = 4.0
"""How much more the last target weighs than the first, by rank in time: habits and catalogues
move on. On MovieLens' validation part it is worth .0014 of log loss."""

LEAF_LINES = 200
"""Of a leaf, and at most a twentieth of all lines."""

PARAMETERS = {
    "objective": "multiclass",
    "num_leaves": 15,
    "learning_rate": 0.05,
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

    @property
    def weights(self) -> Floats:
        """(lines,) what they count in learning: by their time, where there is one."""
        times = self.targets.as_of[self.targets.row]
        if not self.targets.events.has_times:
            return np.ones(len(times), np.float32)
        rank = np.searchsorted(np.sort(times), times)
        return (RECENCY ** (rank / len(times) - 1)).astype(np.float32)

    def histories(self, rows: slice) -> tuple[Histories, Floats | None]:
        """The last EVENTS events of some contexts, and what to leave out of the tables for them."""
        targets, events = self.targets, self.targets.events
        at = targets.positions(rows, EVENTS)
        return Histories(
            events.item[at],
            events.type[at],
            events.timestamp[at],
            targets.lengths(EVENTS)[rows],
            targets.as_of[rows],
        ), None if self.own is None else self.own[at]

    def features(self, table: ItemTypes) -> Floats:
        """(lines, features) of the item model, which begin with those of the other; without items
        of the other alone."""
        next_type, item_type = (
            _without_trees(TypeModel, self, table),
            _without_trees(ItemTypeModel, self, table),
        )
        targets, parts = self.targets, []
        for rows, _ in chunks(targets.lengths(EVENTS)):
            lines = slice(*np.searchsorted(targets.row, [rows.start, rows.stop]))
            histories, own = self.histories(rows)
            row, item = targets.row[lines] - rows.start, targets.item[lines]
            if table.has_items:
                left = None if self.own_lines is None else self.own_lines[lines]
                parts.append(item_type.features(histories, row, item, own, left))
            else:
                parts.append(next_type.features(histories, own)[row])
        return np.concatenate(parts)

    def having_item(self) -> NDArray[np.bool_]:
        """(lines,) which of them have an item."""
        some: NDArray[np.bool_] = self.targets.item != NONE
        return some


@dataclass(frozen=True)
class _Table:
    """What LightGBM reads."""

    features: Floats
    """(lines, k)."""
    true: Ints
    """(lines,) types."""
    user: Ints
    """(lines,)."""
    weights: Floats
    """(lines,)."""


@dataclass(frozen=True)
class _Chosen:
    """What validation says about one of the models."""

    rounds: int
    rule: Rule
    measured: dict[str, Any]


def fit_type_models(
    part: Split, item_vectors: Vectors, seed: int, *, refit: bool = True
) -> FittedTypes:
    """Fits both models.

    Rounds, calibration and decision rule are chosen on part.validation by models of part.train. A
    training target is predicted from its user's true earlier events, and what the tables count
    leaves that user out.

    Args:
        part: with the vocabulary of types of the training part.
        item_vectors: (items, cols) of the items' texts.
        seed: of the draw of targets, the trees and the folds of the rule.
        refit: whether trees and tables are then made again, of the training and the validation
            part, with as many more rounds as there are more lines. The report is that of the
            first fit: the second has no targets left to be measured on but the test part's.
    """
    train = part.train
    learn = _learning(train, seed)
    judge = _drawn(_Lines(part.validation), MOST_VALIDATION_LINES, MOST_EVENTS, seed)
    if not _enough(learn, judge) or len(np.unique(learn.targets.type)) < 2:
        return FittedTypes()
    table = item_types(train, item_vectors)
    kinds: list[type[Trees]] = [TypeModel]
    if table.has_items and _enough(learn, judge, having_item=True):
        kinds.append(ItemTypeModel)
    features = learn.features(table), judge.features(table)
    texts, chosen = {}, {}
    for kind in kinds:
        texts[kind], chosen[kind] = _choose(kind, (learn, judge), features, table, seed)
    if refit:
        first = len(learn.targets.type)
        learn = _learning(part.validation.events, seed)
        table = item_types(part.validation.events, item_vectors)
        whole = learn.features(table)
        for kind in kinds:
            rounds = round(chosen[kind].rounds * len(learn.targets.type) / first)
            read = _read_by(kind, learn, whole, table)
            texts[kind] = _trees(read, len(table.prior), seed, rounds)[0]

    def model(kind: type[Model]) -> Model | None:
        if kind not in kinds:
            return None
        return kind(texts[kind], table, chosen[kind].rule, train.has_times)

    return FittedTypes(
        model(TypeModel),
        model(ItemTypeModel),
        {kind.NAME: {"rounds": chosen[kind].rounds, **chosen[kind].measured} for kind in kinds},
    )


def given_items(model: ItemTypeModel, targets: Targets) -> Floats:
    """(lines, types) the probabilities of every line of the targets, from history and item."""
    parts = []
    for rows, _ in chunks(targets.lengths(EVENTS)):
        lines = slice(*np.searchsorted(targets.row, [rows.start, rows.stop]))
        histories, _ = _Lines(targets).histories(rows)
        row = targets.row[lines] - rows.start
        parts.append(model.predict(histories, row, targets.item[lines]))
    return np.concatenate(parts)


def _enough(learn: _Lines, judge: _Lines, *, having_item: bool = False) -> bool:
    counts = [int((lines.having_item() | (not having_item)).sum()) for lines in (learn, judge)]
    return counts[0] >= LEAST_LINES and counts[1] >= LEAST_VALIDATION_LINES


def _without_trees(kind: type[Model], lines: _Lines, table: ItemTypes) -> Model:
    return kind("", table, plain(len(table.prior)), lines.targets.events.has_times)


def _read_by(kind: type[Trees], lines: _Lines, features: Floats, table: ItemTypes) -> _Table:
    """The lines and features that a model reads, of those of both."""
    some = np.ones(len(features), np.bool_)
    if kind is ItemTypeModel:
        some = lines.having_item()
    else:
        read = _without_trees(TypeModel, lines, table).features(NO_HISTORY).shape[1]
        features = features[:, :read]
    return _Table(features[some], lines.targets.type[some], lines.user[some], lines.weights[some])


def _choose(
    kind: type[Trees],
    lines: tuple[_Lines, _Lines],
    features: tuple[Floats, Floats],
    table: ItemTypes,
    seed: int,
) -> tuple[str, _Chosen]:
    """Trees of the first lines, and what the others choose: rounds and rule."""
    types = len(table.prior)
    learn, judge = (
        _read_by(kind, part, matrix, table) for part, matrix in zip(lines, features, strict=True)
    )
    text, rounds, scores = _trees(learn, types, seed, ROUNDS, judge)
    rule, probabilities, choices = fit_rule(scores, judge.true, judge.user, seed)
    names = lines[0].targets.events.behavior_types
    return text, _Chosen(rounds, rule, type_metrics(probabilities, judge.true, names, choices))


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
    fits &= np.cumsum(targets.lengths(EVENTS)[order]) <= most_events
    chosen = np.zeros(len(targets), np.bool_)
    chosen[order[fits]] = True
    kept = chosen[targets.row] & typed
    some = replace(
        targets, row=targets.row[kept], item=targets.item[kept], type=targets.type[kept]
    ).subset(chosen & (count > 0))
    left = None if lines.own_lines is None else lines.own_lines[kept]
    return _Lines(some, lines.own, left)


def _trees(
    learn: _Table,
    types: int,
    seed: int,
    rounds: int,
    judge: _Table | None = None,
) -> tuple[str, int, Floats]:
    """The trees in LightGBM's text format, their rounds, and their scores of `judge`.

    Args:
        learn: the lines to learn from.
        types: behavior types.
        seed: of the columns that a tree may read.
        rounds: of trees, at most.
        judge: other lines, that say when to stop.
    """
    parameters = {
        **PARAMETERS,
        "num_class": types,
        "min_data_in_leaf": min(LEAF_LINES, len(learn.true) // 20),
        "seed": seed,
    }
    data = lightgbm.Dataset(learn.features, learn.true, weight=learn.weights, params=parameters)
    booster = lightgbm.train(
        parameters,
        data,
        rounds,
        valid_sets=None if judge is None else [data.create_valid(judge.features, judge.true)],
        callbacks=None if judge is None else [lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    best = booster.current_iteration() if judge is None else booster.best_iteration
    text = booster.model_to_string(num_iteration=best)
    if judge is None:
        return text, best, np.zeros((0, types), np.float32)
    scores = booster.predict(judge.features, num_iteration=best, raw_score=True, num_threads=1)
    return text, best, np.asarray(scores)

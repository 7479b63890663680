"""Baselines for behavior types: functions from history to probabilities, see `baselines`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from predictor.learning.data import Events, Targets, training_targets
from predictor.learning.measures.metrics import Floats
from predictor.learning.measures.type_metrics import TypeScorer

HALF_LIFE_EVENTS = 4.0
"""Of an event in decayed_shares."""

SHARES_EVENTS = 64
"""Latest events that decayed_shares looks at: older ones weigh less than 2^-16."""

PRIOR_EVENTS = 1.0
"""Events of the weight one that the prior counts for in decayed_shares."""


def type_baselines(train: Events) -> dict[str, TypeScorer]:
    """The baselines for behavior types, by name."""
    return {
        "majority": majority(train),
        "repeat_last": repeat_last(train),
        "markov": markov_types(train),
        "decayed_shares": decayed_shares(train),
    }


def majority(train: Events) -> TypeScorer:
    """The shares of the types in training, for everyone."""
    shares = _shares(train)
    return lambda targets, rows: np.broadcast_to(shares, (rows.stop - rows.start, len(shares)))


def repeat_last(train: Events) -> TypeScorer:
    """The type of the last event again, smoothed.

    Its probability is the share of repetitions in training (add-one); the other types divide the
    rest by their shares. Without smoothing one miss would make the log loss infinite.
    """
    shares = _shares(train)
    table = _transitions(train)
    repeated = (np.trace(table) + 1) / (table.sum() + 2)
    others = np.broadcast_to(shares, table.shape) * (1 - np.eye(len(shares)))
    rest = others.sum(axis=1, keepdims=True)
    probabilities = np.eye(len(shares)) * repeated + (1 - repeated) * others / np.maximum(
        rest, 1e-12
    )
    return _by_last_type(probabilities / probabilities.sum(axis=1, keepdims=True), shares)


def markov_types(train: Events) -> TypeScorer:
    """The shares of the types that follow the last one in training (one is added per type)."""
    table = _transitions(train) + 1.0
    return _by_last_type(table / table.sum(axis=1, keepdims=True), _shares(train))


def decayed_shares(train: Events) -> TypeScorer:
    """The user's own shares of the types, an event counting half after HALF_LIFE_EVENTS more.

    Smoothed by the shares in training, which count as PRIOR_EVENTS events.
    """
    prior = _shares(train) * np.float32(PRIOR_EVENTS)
    types = len(prior)

    def score(targets: Targets, rows: slice) -> Floats:
        lengths = targets.lengths(SHARES_EVENTS)[rows]
        at = targets.positions(rows, SHARES_EVENTS)
        ago = np.repeat(targets.end[rows] - 1, lengths) - at
        type_ = targets.events.type[at]
        cell = np.repeat(np.arange(len(lengths)), lengths) * types + type_
        weights = np.exp2(-ago / HALF_LIFE_EVENTS)
        size = len(lengths) * types
        own = np.bincount(cell[type_ >= 0], weights[type_ >= 0], minlength=size)
        summed = own.reshape(len(lengths), types) + prior
        shares: Floats = (summed / summed.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares

    return score


def _shares(train: Events) -> Floats:
    """(types,) with one event added to each type, so that none is impossible."""
    counts = np.bincount(train.type[train.type >= 0], minlength=len(train.behavior_types)) + 1.0
    shares: Floats = (counts / counts.sum()).astype(np.float32)
    return shares


def _transitions(train: Events) -> NDArray[np.float64]:
    """(types, types) lines of type j in a basket before which type i came last."""
    targets = training_targets(train)
    some = (targets.end > targets.begin)[targets.row]
    last = train.type[np.maximum(targets.end - 1, 0)][targets.row]
    table = np.zeros((len(train.behavior_types),) * 2)
    np.add.at(table, (last[some], targets.type[some]), 1)
    return table


def _by_last_type(table: NDArray[np.float64], without: Floats) -> TypeScorer:
    """Rows of the table by the type of the last event; `without` one (or with an unknown one)."""
    full = np.vstack([table, without]).astype(np.float32)

    def score(targets: Targets, rows: slice) -> Floats:
        begin, end = targets.begin[rows], targets.end[rows]
        last = targets.events.type[np.maximum(end - 1, 0)]
        last = np.where((end > begin) & (last >= 0), last, len(table))
        probabilities: Floats = full[last]
        return probabilities

    return score

"""Baselines: functions from history to scores, fitted on the training part like the model.

A network that does not beat them adds nothing (Ferrari Dacrema et al., 2019, "Are we really making
much progress?").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from predictor.learning.data import Events, Targets, ragged, training_targets
from predictor.learning.metrics import Floats, ItemScorer, TypeScorer
from predictor.models.history import Ints


def item_baselines(train: Events) -> dict[str, ItemScorer]:
    """The baselines for items, by name."""
    return {
        "popular": popular(train),
        "markov": markov(train),
        "personal_frequency": personal_frequency(train),
    }


def type_baselines(train: Events) -> dict[str, TypeScorer]:
    """The baselines for behavior types, by name."""
    return {
        "majority": majority(train),
        "repeat_last": repeat_last(train),
        "markov": markov_types(train),
    }


def popularity(events: Events) -> NDArray[np.int64]:
    """(items,) events of each item."""
    return np.bincount(events.item[events.item >= 0], minlength=len(events.item_ids))


def popular(train: Events) -> ItemScorer:
    """The items with the most events in training, for everyone."""
    counts = popularity(train).astype(np.float32)
    return lambda targets, rows: np.broadcast_to(counts, (rows.stop - rows.start, len(counts)))


def personal_frequency(train: Events) -> ItemScorer:
    """How often the user had an item; ties, and users without history, by popularity."""
    ties = _below_one(popularity(train))

    def score(targets: Targets, rows: slice) -> Floats:
        whole = len(targets.events)
        lengths = targets.lengths(whole)[rows]
        counts = _counts(targets.events, targets.positions(rows, whole), lengths)
        dense: Floats = counts.toarray().astype(np.float32) + ties
        return dense

    return score


def markov(train: Events) -> ItemScorer:
    """First-order Markov chain between baskets.

    The score of j is the sum over the items i of the last basket of the share of baskets with i
    whose next basket has j (Rendle et al., 2010, without factorisation); ties, and users without
    history, by popularity.
    """
    baskets = _counts(train, np.arange(len(train)), np.diff(train.first_of_basket))
    baskets.data[:] = 1
    user = train.user[train.first_of_basket[:-1]]
    before = np.flatnonzero(user[1:] == user[:-1])
    seen = np.asarray(baskets[before].sum(axis=0)).ravel()
    shares = sparse.diags(1 / np.maximum(1, seen)) @ (baskets[before].T @ baskets[before + 1])
    shares = shares.tocsr().astype(np.float32)
    # Smaller than any share that one transition can give.
    ties = _below_one(popularity(train)) * np.float32(1 / (2 * len(train)))

    def score(targets: Targets, rows: slice) -> Floats:
        begin, lengths = _last_basket(targets, rows)
        last = _counts(targets.events, ragged(begin, lengths), lengths)
        last.data[:] = 1
        dense: Floats = (last.astype(np.float32) @ shares).toarray() + ties
        return dense

    return score


def _below_one(counts: NDArray[np.int64]) -> Floats:
    ties: Floats = (counts / (counts.max(initial=0) + 1)).astype(np.float32)
    return ties


def _last_basket(targets: Targets, rows: slice) -> tuple[Ints, Ints]:
    """Where the last basket of each history begins, and its events (0 without history)."""
    events = targets.events
    begin, end = targets.begin[rows], targets.end[rows]
    some = end > begin
    last = events.first_of_basket[events.basket[np.maximum(end - 1, 0)]]
    return np.where(some, last, 0), np.where(some, end - last, 0)


def _counts(events: Events, at: Ints, lengths: Ints) -> sparse.csr_matrix:
    """(rows, items) how often each item occurs among ragged events."""
    item = events.item[at]
    row = np.repeat(np.arange(len(lengths)), lengths)
    some = item >= 0
    shape = (len(lengths), len(events.item_ids))
    ones = np.ones(int(some.sum()), np.float64)
    return sparse.csr_matrix((ones, (row[some], item[some])), shape=shape)


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

"""Baselines for items: functions from history to scores, fitted on the training part.

A network that does not beat them adds nothing (Ferrari Dacrema et al., 2019, "Are we really making
much progress?"). All are sparse products over batches of contexts; nothing loops over users.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from foretell.vectors import Vectors
from predictor.learning.data import Events, Targets, ragged
from predictor.learning.measures.metrics import Floats, ItemScorer, users
from predictor.models.history import Ints
from predictor.models.ranking.recommender import Recommender, unit_rows

DAY = 86_400_000_000
"""In microseconds."""

RECENT_DAYS = 28
"""Four whole weeks: shops have a weekly rhythm."""

RECENT_SHARE = 0.1
"""Of every user's events, where there are no times."""

HALF_LIFE_DAYS = 120.0
"""Of an event in decayed_frequency: the best of 30 to 240 on groceries."""

HALF_LIFE_BASKETS = 20.0
"""Of a basket, where there are no times and in tifu_knn: the same on groceries."""

NEIGHBOURS = 300
"""Similar users in tifu_knn."""

NEIGHBOUR_WEIGHT = 0.5
"""Of their mean: the best of 0.1 to 1 on groceries."""

MOST_USERS = 50_000
"""Training users that the neighbourhood methods look at: the first of them, which bounds memory."""

CONTENT_ITEMS = 1
"""Latest events whose texts a candidate is compared with in content: the best of 1 to 10 on
beauty products."""


def item_baselines(train: Events, item_vectors: Vectors | None = None) -> dict[str, ItemScorer]:
    """The baselines for items, by name.

    Args:
        train: the training part.
        item_vectors: (items, cols) of the items' texts; without them there is no `content`.
    """
    scorers = {
        "popular": popular(train),
        "recent_popular": recent_popular(train),
        "markov": markov(train),
        "personal_frequency": personal_frequency(train),
        "decayed_frequency": decayed_frequency(train),
        "tifu_knn": tifu_knn(train),
        "item_knn": item_knn(train),
    }
    if item_vectors is not None and item_vectors.any():
        scorers["content"] = content(train, item_vectors)
    return scorers


def popularity(events: Events) -> NDArray[np.int64]:
    """(items,) events of each item."""
    return np.bincount(events.item[events.item >= 0], minlength=len(events.item_ids))


def popular(train: Events) -> ItemScorer:
    """The items with the most events in training, for everyone."""
    return _for_everyone(popularity(train).astype(np.float32))


def recent_popular(train: Events) -> ItemScorer:
    """The items with the most events in the last RECENT_DAYS of training, ties by popularity.

    Without times: in the last RECENT_SHARE of every user's events.
    """
    if train.has_times:
        recent = train.timestamp > train.timestamp.max(initial=0) - RECENT_DAYS * DAY
    else:
        bounds = train.first_of_user
        left = bounds[train.user + 1] - np.arange(len(train))
        recent = left <= np.ceil(np.diff(bounds)[train.user] * RECENT_SHARE)
    counts = popularity(train.subset(recent)).astype(np.float32)
    return _for_everyone(counts + _below_one(popularity(train)))


def _for_everyone(scores: Floats) -> ItemScorer:
    return lambda targets, rows: np.broadcast_to(scores, (rows.stop - rows.start, len(scores)))


def personal_frequency(train: Events) -> ItemScorer:
    """How often the user had an item; ties, and users without history, by popularity."""
    ties = _below_one(popularity(train))

    def score(targets: Targets, rows: slice) -> Floats:
        begin, end = targets.begin[rows], targets.end[rows]
        counts = _counts(targets.events, ragged(begin, end - begin), end - begin)
        dense: Floats = counts.toarray() + ties
        return dense

    return score


def decayed_frequency(train: Events, days: float = HALF_LIFE_DAYS) -> ItemScorer:
    """Personal frequency in which an event counts half after every half-life.

    That is one of time; without times, of HALF_LIFE_BASKETS. Ties, and all items that the user
    never had, by popularity.
    """
    ties = popularity(train)

    def score(targets: Targets, rows: slice) -> Floats:
        events = targets.events
        age, half_life = (
            (events.timestamp, days * DAY)
            if events.has_times
            else (events.basket, HALF_LIFE_BASKETS)
        )
        weights = _decayed(events, targets.begin[rows], targets.end[rows], age, half_life)
        return _own_first(weights, ties)

    return score


def _own_first(weights: sparse.csr_matrix, popular: Ints) -> Floats:
    """Dense scores in the order of the weights, ties and all others by popularity.

    Only the order is kept: the weights of long histories span more than float32 tells apart.
    """
    row = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    by = np.lexsort((popular[weights.indices], weights.data, row))
    scores = np.tile(_below_one(popular), (weights.shape[0], 1))
    scores[row[by], weights.indices[by]] = 1 + np.arange(len(by)) - weights.indptr[:-1][row[by]]
    return scores


def tifu_knn(train: Events) -> ItemScorer:
    """The user's decayed frequency mixed with that of the most similar users.

    After Hu et al., 2020 ("Modeling personalized item frequency information for next-basket
    recommendation"), with one decay instead of two: a basket counts half after every
    HALF_LIFE_BASKETS. The score is the user's vector plus NEIGHBOUR_WEIGHT times the mean vector
    of the NEIGHBOURS training users with the largest cosine, the user aside; ties by popularity.
    """
    everyone = _training_users(train)
    vectors = _decayed(train, *everyone, train.basket, HALF_LIFE_BASKETS)
    unit = unit_rows(vectors)
    # Smaller than what any neighbour adds.
    ties = _below_one(popularity(train)) * np.float32(1e-9)

    def score(targets: Targets, rows: slice) -> Floats:
        events = targets.events
        own = _decayed(
            events, targets.begin[rows], targets.end[rows], events.basket, HALF_LIFE_BASKETS
        )
        similar = (unit_rows(own) @ unit.T).toarray()
        user = users(targets, rows)
        inside = np.flatnonzero((user >= 0) & (user < similar.shape[1]))
        similar[inside, user[inside]] = 0
        k = min(NEIGHBOURS, similar.shape[1])
        nearest = np.argpartition(similar, -k, axis=1)[:, -k:]
        weights = (np.take_along_axis(similar, nearest, axis=1) > 0) * np.float32(
            NEIGHBOUR_WEIGHT / k
        )
        bounds = np.arange(len(similar) + 1) * k
        mean = sparse.csr_matrix((weights.ravel(), nearest.ravel(), bounds), similar.shape)
        dense: Floats = (own + mean @ vectors).toarray() + ties
        return dense

    return score


def item_knn(train: Events) -> ItemScorer:
    """The recommender of this name: items that the same users had, repeats included."""
    recommender = Recommender({"item_knn": 1.0}, histories_of(train), None, repeats=True)

    def score(targets: Targets, rows: slice) -> Floats:
        found = recommender.blended(targets.histories(rows))
        return np.concatenate([scores for _, scores in found])

    return score


def histories_of(train: Events) -> sparse.csr_matrix:
    """(users, items) float32 log(1 + events) of the first MOST_USERS who have any: what the
    recommenders know of training."""
    some = train.item >= 0
    users, row = np.unique(train.user[some], return_inverse=True)
    kept = row < MOST_USERS
    shape = (min(len(users), MOST_USERS), len(train.item_ids))
    at = (row[kept], train.item[some][kept])
    counts = sparse.csr_matrix((np.ones(int(kept.sum()), np.float32), at), shape)
    counts.sum_duplicates()
    return counts.log1p().astype(np.float32)


def _training_users(train: Events) -> tuple[Ints, Ints]:
    """Where the events of each of MOST_USERS users begin and end."""
    bounds = train.first_of_user[: MOST_USERS + 1]
    return bounds[:-1], bounds[1:]


def content(train: Events, item_vectors: Vectors) -> ItemScorer:
    """Nearest text: cosine with the mean of the texts of the user's latest items.

    The texts' vectors count with length one; ties, and users without history, by popularity.
    """
    norms = np.linalg.norm(item_vectors, axis=1)
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    ties = _below_one(popularity(train)) * np.float32(1e-6)

    def score(targets: Targets, rows: slice) -> Floats:
        at, lengths = targets.positions(rows, CONTENT_ITEMS), targets.lengths(CONTENT_ITEMS)[rows]
        latest = _counts(targets.events, at, lengths) @ sparse.diags(inverse)
        query = latest @ item_vectors  # the length does not change the order
        query /= np.maximum(np.linalg.norm(query, axis=1, keepdims=True), np.float32(1e-12))
        dense: Floats = (query @ item_vectors.T) * inverse + ties
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
        dense: Floats = (last @ shares).toarray() + ties
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


def _decayed(
    events: Events, begin: Ints, end: Ints, age: Ints, half_life: float
) -> sparse.csr_matrix:
    """(rows, items) counts in the events begin[i] to end[i] that halve with their age.

    Args:
        age: (events,) a clock; a history's last event counts one.
        half_life: in ticks of that clock.
    """
    lengths = end - begin
    at = ragged(begin, lengths)
    ago = age[np.repeat(end - 1, lengths)] - age[at]
    return _counts(events, at, lengths, np.exp2(-ago / half_life))


def _counts(
    events: Events, at: Ints, lengths: Ints, weights: NDArray[np.float64] | None = None
) -> sparse.csr_matrix:
    """(rows, items) float32: how often each item occurs among ragged events, or its weight."""
    item = events.item[at]
    row = np.repeat(np.arange(len(lengths)), lengths)
    some = item >= 0
    values = np.ones(int(some.sum())) if weights is None else weights[some]
    shape = (len(lengths), len(events.item_ids))
    summed = sparse.csr_matrix((values, (row[some], item[some])), shape=shape)
    return summed.astype(np.float32)

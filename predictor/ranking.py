"""The second stage in serving: the version's ranker orders a few hundred items.

Runs in the model's worker thread, never on the event loop; requests that wait together are one
computation, by the code that training uses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.activation import ServedModel
from predictor.events import History
from predictor.histories import ItemNumbers, whole_histories
from predictor.models.history import Ints
from predictor.models.ranking.pairs import Pairs


class RankRequest(NamedTuple):
    """Whose items to order."""

    served: ServedModel
    history: History
    """Up to HISTORY_EVENTS."""
    query: Vectors
    """(dims,) of the sequence model."""
    found: Mapping[str, float]
    """What Search found, with its scores; best first."""
    more: bool
    """Whether the ranker may add candidates of its own."""
    repeats: bool
    """Whether the user's own items may be among those."""
    deny: Collection[str]
    """Items that may not."""


class Ranked(NamedTuple):
    """Items in order, best first."""

    ids: Sequence[str]
    scores: NDArray[np.float32]
    """Of these, and of any more that follow them."""


def rank_batch(requests: Sequence[RankRequest]) -> list[Ranked]:
    """Orders the items of each request; those with the same model and rules are one computation."""
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for at, request in enumerate(requests):
        key = (id(request.served), request.more, request.repeats)
        groups.setdefault(key, []).append(at)
    answers: dict[int, Ranked] = {}
    for chosen in groups.values():
        answers.update(zip(chosen, _rank([requests[at] for at in chosen]), strict=True))
    return [answers[at] for at in range(len(requests))]


def _rank(requests: Sequence[RankRequest]) -> list[Ranked]:
    served = requests[0].served
    ranker = served.version.ranker
    assert ranker is not None
    numbers = ItemNumbers(served.item_index, len(served.version.item_ids))
    histories = whole_histories(served, [request.history for request in requests], numbers)
    found = _pairs(numbers, [request.found for request in requests])
    pairs = found
    if requests[0].more:
        pairs = ranker.candidates(
            histories,
            found,
            repeats=requests[0].repeats,
            denied=_pairs(numbers, [request.deny for request in requests]),
        )
    numbers.add_known(served.version.item_ids, _below(pairs.item, len(served.version.item_ids)))
    vectors = _Vectors(served, numbers)
    of_pairs, known = vectors.look_up(pairs.item)
    # What Search has found exists, though its vector may still be on its way here.
    there = known | pairs.within(found)
    pairs, of_pairs = pairs.chosen(there), of_pairs[there]
    queries = np.stack([request.query for request in requests])
    model_scores = (of_pairs * queries[pairs.row]).sum(axis=1, dtype=np.float32)
    ids = numbers.ids(pairs.item)
    for at in np.flatnonzero(~known[there]).tolist():
        model_scores[at] = requests[pairs.row[at]].found[ids[at]]
    scores = ranker.score(histories, pairs, model_scores, lambda item: vectors.look_up(item)[0])
    ranked = []
    bounds = np.searchsorted(pairs.row, np.arange(len(requests) + 1))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        order = begin + np.argsort(-scores[begin:end], kind="stable")
        ranked.append(Ranked([ids[at] for at in order.tolist()], scores[order]))
    return ranked


def item_types(served: ServedModel, history: History, ids: Sequence[str]) -> NDArray[np.float32]:
    """(ids, behavior types) how likely the user does what with each item; the version has a model
    of it."""
    model = served.version.item_type_model
    assert model is not None
    numbers = ItemNumbers(served.item_index, len(served.version.item_ids))
    histories = whole_histories(served, [history], numbers)
    item = np.array(numbers.of(ids), np.int64)
    return model.predict(histories, np.zeros(len(ids), np.int64), item)


def _pairs(numbers: ItemNumbers, ids: Sequence[Iterable[str]]) -> Pairs:
    """Pairs of the position in `ids` and each of the items there."""
    item = [numbers.of(each) for each in ids]
    row = np.repeat(np.arange(len(item)), [len(each) for each in item])
    return Pairs.of(row, np.array([number for each in item for number in each], np.int64))


def _below(item: Ints, items: int) -> list[int]:
    known: list[int] = np.unique(item[item < items]).tolist()
    return known


class _Vectors:
    """Item vectors in the model's space by number."""

    def __init__(self, served: ServedModel, numbers: ItemNumbers) -> None:
        self._served = served
        self._numbers = numbers

    def look_up(self, item: Ints) -> tuple[Vectors, NDArray[np.bool_]]:
        """(n, dims), zero where there is none, and (n,) where there is one."""
        catalog = self._served.items
        vectors = np.zeros((len(item), self._served.version.config.dims), np.float32)
        known = np.zeros(len(item), np.bool_)
        if catalog is not None:
            catalog.fill(self._numbers.ids(item), vectors, known)
        return vectors, known

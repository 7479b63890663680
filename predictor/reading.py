"""From a query to what the model says: history, tokens, one forward pass for all that wait.

Runs in one worker thread, never on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np

from foretell.vectors import Vectors
from predictor.activation import ServedModel
from predictor.events import EventStore, History
from predictor.histories import ItemNumbers, times, whole_histories
from predictor.models.history import HISTORY_EVENTS, HistoryBatch, history_batch

SHARES_HALF_LIFE = 20.0
"""Events after which an event counts half in a user's shares of behavior types."""

SHARES_PRIOR = 5.0
"""Weight, in events, of all users' shares in a user's."""


NOTHING = History()


class Request(NamedTuple):
    """Whose history to read, and how."""

    served: ServedModel | None
    user_id: str
    inline: History
    text_vectors: Mapping[str, Vectors]
    """text_id to vector (1, dims), of inline texts that no collection has."""
    own_items: bool
    """Whether all of the user's items are needed, to leave them out."""
    without_model: int
    """Events that an answer without a model rests on."""


@dataclass
class Reading:
    """What the history of one query says."""

    history: History
    """What the answer rests on."""
    types: list[tuple[str, float]]
    """Probabilities of the next behavior type, most probable first."""
    predicted_type: str = ""
    """The one to name where only one can be named; "" where nothing is known."""
    expected_gap_s: float = 0.0
    """Seconds from the last event to the next; 0: unknown."""
    query: Vectors | None = None
    """(dims,) query vector of the model."""
    pending_texts: int = 0
    own_items: set[str] = field(default_factory=set)
    forward_us: int = 0
    """The forward pass, which it may have shared."""
    worked_us: int = 0
    """All that the worker thread did for its batch."""


def read_batch(store: EventStore, requests: Sequence[Request]) -> list[Reading]:
    """Answers each request; those with the same model share a forward pass."""
    begin = time.perf_counter_ns()
    readings = _read(store, requests)
    by_model: dict[int, list[int]] = {}
    for at, request in enumerate(requests):
        by_model.setdefault(id(request.served), []).append(at)
    for chosen in by_model.values():
        served = requests[chosen[0]].served
        if served is None:
            everybody = store.type_counts()
            for at in chosen:
                types = type_shares(readings[at].history.behavior_types, everybody)
                readings[at].types = types
                readings[at].predicted_type = types[0][0] if types else ""
        else:
            _forward(served, [readings[at] for at in chosen], [requests[at] for at in chosen])
    worked_us = (time.perf_counter_ns() - begin) // 1_000
    for reading in readings:
        reading.worked_us = worked_us
    return readings


def _read(store: EventStore, requests: Sequence[Request]) -> list[Reading]:
    """The histories; those that are equally long are read together."""
    wanted = [_events(request) for request in requests]
    stored: dict[tuple[int, bool], dict[str, History]] = {}
    for last, texts in set(wanted):
        if last > 0:
            users = {r.user_id for r, want in zip(requests, wanted, strict=True)
                     if r.user_id and want == (last, texts)}  # fmt: skip
            stored[last, texts] = store.histories(list(users), last, texts=texts)
    return [
        _reading(store, request, stored.get(want, {}).get(request.user_id, NOTHING))
        for request, want in zip(requests, wanted, strict=True)
    ]


def _events(request: Request) -> tuple[int, bool]:
    """How many stored events a request needs, and whether with their texts."""
    served = request.served
    last = request.without_model if served is None else served.history_events
    # Content answers need the texts themselves.
    return last - len(request.inline), served is None or served.items is None


def _reading(store: EventStore, request: Request, stored: History) -> Reading:
    served, inline = request.served, request.inline
    last = request.without_model if served is None else served.history_events
    history = stored.followed_by(inline).last(last)
    own: set[str] = set()
    if request.own_items:
        own = {*history.item_ids, *inline.item_ids} - {""}
        if request.user_id and last < HISTORY_EVENTS:
            own.update(store.items_of(request.user_id)[1])
    return Reading(history, [], own_items=own)


def _forward(served: ServedModel, readings: list[Reading], requests: list[Request]) -> None:
    """One forward pass for histories of one model."""
    length = served.version.config.history_length
    batch, pending = tokens(
        served,
        [reading.history.last(length) for reading in readings],
        {text_id: row for request in requests for text_id, row in request.text_vectors.items()},
    )
    begin = time.perf_counter_ns()
    probabilities, queries, gaps_s = served.version.predict(batch)
    chosen = probabilities.argmax(axis=1)
    type_model = served.version.type_model
    if type_model is not None:
        numbers = ItemNumbers(served.item_index, len(served.version.item_ids))
        histories = whole_histories(served, [reading.history for reading in readings], numbers)
        probabilities = type_model.predict(histories)
        chosen = type_model.choose(probabilities)
    forward_us = (time.perf_counter_ns() - begin) // 1_000
    names = served.version.config.behavior_types
    order = np.argsort(-probabilities, axis=1, kind="stable").tolist()
    rows = zip(readings, order, probabilities.tolist(), gaps_s.tolist(), strict=True)
    for row, (reading, best_first, of_types, gap_s) in enumerate(rows):
        reading.types = [(names[at], of_types[at]) for at in best_first]
        reading.predicted_type = names[chosen[row]]
        reading.query = queries[row]
        reading.expected_gap_s = gap_s
        reading.pending_texts = pending[row]
        reading.forward_us = forward_us


def tokens(
    served: ServedModel, histories: Sequence[History], text_vectors: Mapping[str, Vectors]
) -> tuple[HistoryBatch, list[int]]:
    """Histories as the model reads them, and for each how many texts have no vector yet.

    An event's vector is its item's; where the item has none, its text's.
    """
    config = served.version.config
    lengths = np.fromiter(map(len, histories), np.int64, len(histories))
    events = int(lengths.sum())
    vectors = np.zeros((events, config.dims), np.float32)
    known = np.zeros(events, np.bool_)
    pending = np.zeros(len(histories), np.int64)
    if served.items is not None:
        item_ids = chain.from_iterable(history.item_ids for history in histories)
        served.items.fill(list(item_ids), vectors, known)
    if served.texts is not None and not known.all():
        text_ids = list(chain.from_iterable(history.text_ids for history in histories))
        served.texts.fill(text_ids, vectors, known)
        ends = lengths.cumsum()
        for at in np.flatnonzero(~known).tolist():
            vector = text_vectors.get(text_ids[at])
            if vector is not None:
                vectors[at], known[at] = vector, True
            elif text_ids[at]:
                pending[np.searchsorted(ends, at, side="right")] += 1
    types = chain.from_iterable(history.behavior_types for history in histories)
    other = len(config.behavior_types)
    batch = history_batch(
        vectors,
        known,
        np.fromiter(map(served.type_index.get, types, repeat(other)), np.int64, events),
        times(histories),
        lengths,
        has_times=config.has_times,
    )
    return batch, pending.tolist()


def type_shares(
    behavior_types: Sequence[str], everybody: Mapping[str, int]
) -> list[tuple[str, float]]:
    """Probabilities of the next behavior type without a model, most probable first, from the types
    of a history, oldest first.

    The user's own types, each event counting half as much as one that is SHARES_HALF_LIFE events
    younger, smoothed with all users' shares as if these were SHARES_PRIOR events.
    """
    total = sum(everybody.values())
    weights = {name: SHARES_PRIOR * count / total for name, count in everybody.items()}
    for age, name in enumerate(reversed(behavior_types)):
        weights[name] = weights.get(name, 0.0) + 0.5 ** (age / SHARES_HALF_LIFE)
    total_weight = sum(weights.values())
    shares = [(name, weight / total_weight) for name, weight in weights.items()]
    return sorted(shares, key=lambda share: (-share[1], share[0]))

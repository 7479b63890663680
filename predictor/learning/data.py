"""Events as arrays, and what is to be predicted from them.

Everything is columnar and sorted by user, time and file order, so that a history is a slice and
nothing loops over users in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Target
from foretell.vectors import Vectors
from predictor.models.history import (
    HISTORY_EVENTS,
    NONE,
    UNKNOWN,
    Histories,
    HistoryBatch,
    Ints,
    history_batch,
)


@dataclass(frozen=True)
class Events:
    """What users did, sorted by user, then time, then the order of the source.

    Events of one user with the same timestamp are one basket.
    """

    user_ids: tuple[str, ...]
    behavior_types: tuple[str, ...]
    item_ids: tuple[str, ...]
    """The catalogue: items that may be predicted, whether they occur in an event or not."""
    texts: tuple[str, ...]
    user: Ints
    """(events,) index in user_ids."""
    type: Ints
    """(events,) index in behavior_types."""
    item: Ints
    """(events,) index in item_ids; NONE, or UNKNOWN where the catalogue lacks it."""
    text: Ints
    """(events,) index in texts; NONE where there is none."""
    timestamp: Ints
    """(events,) microseconds since 1970; without times in the source, the order instead."""
    has_times: bool

    def __len__(self) -> int:
        return len(self.user)

    def subset(self, chosen: NDArray[np.bool_]) -> Events:
        """The chosen events, with the same vocabularies."""
        columns = ("user", "type", "item", "text", "timestamp")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    @cached_property
    def first_of_user(self) -> Ints:
        """(users + 1,) where each user's events begin; the last element is the number of events."""
        counts = np.bincount(self.user, minlength=len(self.user_ids))
        bounds: Ints = np.concatenate([[0], np.cumsum(counts)])
        return bounds

    @cached_property
    def first_of_basket(self) -> Ints:
        """(baskets + 1,) where each basket begins; the last element is the number of events."""
        if not len(self):
            return np.zeros(1, np.int64)
        new = np.ones(len(self), np.bool_)
        new[1:] = (self.user[1:] != self.user[:-1]) | (self.timestamp[1:] != self.timestamp[:-1])
        return np.append(np.flatnonzero(new), len(self))

    @cached_property
    def basket(self) -> Ints:
        """(events,) which basket each event belongs to."""
        first = self.first_of_basket
        baskets: Ints = np.repeat(np.arange(len(first) - 1), np.diff(first))
        return baskets

    def with_types(self, names: Sequence[str]) -> Events:
        """The same events with this vocabulary of behavior types; others become UNKNOWN."""
        type_ = _recode(self.type, self.behavior_types, names)
        return replace(self, behavior_types=tuple(names), type=type_)

    def with_items(self, item_ids: Sequence[str]) -> Events:
        """The same events with this catalogue; other items become UNKNOWN."""
        item = _recode(self.item, self.item_ids, item_ids)
        return replace(self, item_ids=tuple(item_ids), item=item)

    @property
    def has_items(self) -> bool:
        """Whether an event has an item that can be predicted."""
        return bool((self.item >= 0).any())

    @property
    def has_texts(self) -> bool:
        """Whether an event has a text."""
        return bool((self.text >= 0).any())


def to_events(columns: EventColumns, catalogue: Sequence[str] | None = None) -> Events:
    """Sorts events and looks their items up.

    Args:
        columns: events in the order of the source.
        catalogue: ids of the items that can be predicted; None: those of the events.

    Raises:
        InvalidArgumentError: there are no events.
    """
    if not len(columns):
        raise InvalidArgumentError("there are no events", reason="NO_EVENTS", field="events")
    item = columns.item
    if catalogue is not None:
        item = _look_up(columns.item_ids, catalogue)[item] if len(columns.item_ids) else item
        item = np.where(columns.item < 0, NONE, item)
    order = np.arange(len(columns))
    timestamp = order if columns.timestamp is None else columns.timestamp
    by = np.lexsort((order, timestamp, columns.user))
    return Events(
        user_ids=tuple(columns.user_ids),
        behavior_types=tuple(columns.behavior_types),
        item_ids=tuple(columns.item_ids if catalogue is None else catalogue),
        texts=tuple(columns.texts),
        user=columns.user[by],
        type=columns.behavior_type[by],
        item=item[by],
        text=columns.text[by],
        timestamp=timestamp[by],
        has_times=columns.timestamp is not None,
    )


def _look_up(values: Sequence[str], vocabulary: Sequence[str]) -> Ints:
    """Position of each value in the vocabulary; NONE for "", UNKNOWN where it lacks one."""
    index = {value: position for position, value in enumerate(vocabulary)}
    index[""] = NONE
    return np.array([index.get(value, UNKNOWN) for value in values], np.int64)


def _recode(codes: Ints, before: Sequence[str], after: Sequence[str]) -> Ints:
    """The same values in another vocabulary."""
    # The two last elements are what the negative codes point to.
    table = np.concatenate([_look_up(before, after), [UNKNOWN, NONE]]).astype(np.int64)
    recoded: Ints = table[codes]
    return recoded


@dataclass(frozen=True)
class Targets:
    """What is to be predicted: baskets, each from a history that is a slice of `events`."""

    events: Events
    begin: Ints
    """(contexts,) where a context's history begins: the user's first event."""
    end: Ints
    """(contexts,) one behind its last event."""
    row: Ints
    """(lines,) ascending: the context that a line of a basket belongs to."""
    item: Ints
    """(lines,) the line's item, NONE or UNKNOWN."""
    type: Ints
    """(lines,) the line's behavior type, NONE or UNKNOWN."""
    as_of: Ints
    """(contexts,) microseconds: when the prediction is asked for."""

    def __len__(self) -> int:
        return len(self.begin)

    def with_types(self, names: Sequence[str]) -> Targets:
        """The same targets with this vocabulary of behavior types."""
        type_ = _recode(self.type, self.events.behavior_types, names)
        return replace(self, events=self.events.with_types(names), type=type_)

    def subset(self, chosen: NDArray[np.bool_]) -> Targets:
        """The chosen contexts with their lines."""
        lines = chosen[self.row]
        return Targets(
            events=self.events,
            begin=self.begin[chosen],
            end=self.end[chosen],
            row=(np.cumsum(chosen) - 1)[self.row[lines]],
            item=self.item[lines],
            type=self.type[lines],
            as_of=self.as_of[chosen],
        )

    def lengths(self, at_most: int) -> Ints:
        """(contexts,) events of each history, cut to its last `at_most`."""
        lengths: Ints = np.minimum(self.end - self.begin, at_most)
        return lengths

    def positions(self, rows: slice, at_most: int) -> Ints:
        """Indices in `events` of the last `at_most` events of each history of `rows`, ragged."""
        lengths = self.lengths(at_most)[rows]
        return ragged(self.end[rows] - lengths, lengths)

    def last_times(self) -> Ints:
        """(contexts,) time of each history's last event; of an empty one, of the very last."""
        times = self.events.timestamp
        if not len(times):
            return np.zeros(len(self), np.int64)
        last: Ints = np.where(
            self.end > self.begin, times[np.maximum(self.end - 1, 0)], times.max()
        )
        return last

    def histories(self, rows: slice) -> Histories:
        """Whole histories of some contexts, as the ranker and the type models read them."""
        at = self.positions(rows, HISTORY_EVENTS)
        events = self.events
        return Histories(
            events.item[at],
            events.type[at],
            events.timestamp[at],
            self.lengths(HISTORY_EVENTS)[rows],
            self.as_of[rows],
        )


def ragged(begin: Ints, lengths: Ints) -> Ints:
    """begin[0], begin[0]+1, ... for lengths[0] numbers, then the same from begin[1], and so on."""
    ends = np.cumsum(lengths)
    offsets: Ints = np.repeat(begin - (ends - lengths), lengths)
    return offsets + np.arange(len(offsets))


def targets_of(events: Events, target: NDArray[np.bool_]) -> Targets:
    """Targets for the masked events; those of one basket share a context. As of the last event."""
    lines = np.flatnonzero(target)
    baskets, row = np.unique(events.basket[lines], return_inverse=True)
    end = events.first_of_basket[baskets]
    begin = events.first_of_user[events.user[end]]
    targets = Targets(
        events, begin, end, row, events.item[lines], events.type[lines], np.zeros(0, np.int64)
    )
    return replace(targets, as_of=targets.last_times())


def given_targets(events: Events, targets: Sequence[Target]) -> Targets:
    """Targets from a file; the history of each of its users is all that the events hold of them.

    A user without events gets an empty history.

    Raises:
        InvalidArgumentError: there are none.
    """
    if not targets:
        raise InvalidArgumentError("there are no targets", reason="NO_TARGETS", field="targets")
    user_ids = list(dict.fromkeys(target.user_id for target in targets))
    row = _look_up([target.user_id for target in targets], user_ids)
    lines = np.argsort(row, kind="stable")
    user = _look_up(user_ids, events.user_ids)
    begin = np.where(user >= 0, events.first_of_user[user], 0)
    end = np.where(user >= 0, events.first_of_user[user + 1], 0)
    item = _look_up([target.item_id for target in targets], events.item_ids)
    type_ = _look_up([target.behavior_type for target in targets], events.behavior_types)
    found = Targets(
        events, begin, end, row[lines], item[lines], type_[lines], np.zeros(0, np.int64)
    )
    return replace(found, as_of=found.last_times())


def repeat_share(events: Events) -> float:
    """Share of the lines with an item, first baskets aside, whose user had the item before."""
    some = events.item >= 0
    user, basket = events.user[some], events.basket[some]
    pair = user * len(events.item_ids) + events.item[some]
    _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
    first_basket_of_user = events.basket[np.minimum(events.first_of_user[user], len(events) - 1)]
    later = basket > first_basket_of_user
    return float((basket > basket[first][inverse])[later].mean()) if later.any() else 0.0


def training_targets(events: Events) -> Targets:
    """Every basket of the events as a target, first ones (with an empty history) included."""
    return targets_of(events, np.ones(len(events), np.bool_))


def history_of(
    targets: Targets, rows: slice, history_length: int, item_vectors: Vectors, text_vectors: Vectors
) -> HistoryBatch:
    """The histories of some contexts as the model reads them: what serving does, from arrays.

    Args:
        item_vectors: (items, dims) in the model's space.
        text_vectors: (texts, dims) in the model's space.
    """
    events = targets.events
    at = targets.positions(rows, history_length)
    vectors, known = token_vectors(events.item[at], events.text[at], item_vectors, text_vectors)
    lengths = targets.lengths(history_length)[rows]
    types = np.where(events.type[at] < 0, len(events.behavior_types), events.type[at])
    return history_batch(
        vectors, known, types, events.timestamp[at], lengths, has_times=events.has_times
    )


def token_vectors(
    item: Ints, text: Ints, item_vectors: Vectors, text_vectors: Vectors
) -> tuple[Vectors, NDArray[np.bool_]]:
    """Each event's vector (events, dims), and whether it has one: its item's, else its text's."""
    cols = item_vectors.shape[1] or text_vectors.shape[1]
    vectors = np.zeros((len(item), cols), np.float32)
    by_item = item >= 0
    by_text = ~by_item & (text >= 0)
    vectors[by_item] = item_vectors[item[by_item]]
    vectors[by_text] = text_vectors[text[by_text]]
    return vectors, by_item | by_text

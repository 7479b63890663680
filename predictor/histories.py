"""Users' events as the ranker and the type models read them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat

import numpy as np

from predictor.activation import ServedModel
from predictor.events import History
from predictor.models.history import NONE, UNKNOWN, Histories, Ints, asked_at


class ItemNumbers:
    """Numbers of the items of some requests: the version's own, then those that are newer."""

    def __init__(self, known: Mapping[str, int], items: int) -> None:
        self._known = known
        self._items = items
        self._newer: dict[str, int] = {}
        self._ids: dict[int, str] = {}

    def of(self, ids: Iterable[str]) -> list[int]:
        """A number for each id; NONE for ""."""
        return [self._of(item_id) if item_id else NONE for item_id in ids]

    def ids(self, numbers: Ints) -> list[str]:
        """The ids of numbers that `of` gave, or that are the version's own."""
        return [self._ids.get(number, "") for number in numbers.tolist()]

    def add_known(self, ids: Sequence[str], numbers: Iterable[int]) -> None:
        """Makes ids of the version's own numbers known to `ids`."""
        self._ids.update((number, ids[number]) for number in numbers)

    def _of(self, item_id: str) -> int:
        number = self._known.get(item_id)
        if number is None:
            number = self._newer.setdefault(item_id, self._items + len(self._newer))
        self._ids[number] = item_id
        return number


def whole_histories(
    served: ServedModel, histories: Sequence[History], numbers: ItemNumbers
) -> Histories:
    """Histories as ranker and type models read them, as of now."""
    lengths = np.fromiter(map(len, histories), np.int64, len(histories))
    types = chain.from_iterable(history.behavior_types for history in histories)
    items = chain.from_iterable(history.item_ids for history in histories)
    time_us = _ascending(times(histories), lengths)
    now = np.full(len(histories), time.time_ns() // 1_000)
    last = now.copy()
    some = lengths > 0
    last[some] = time_us[np.cumsum(lengths)[some] - 1]
    return Histories(
        np.array(numbers.of(items), np.int64),
        np.fromiter(map(served.type_index.get, types, repeat(UNKNOWN)), np.int64, len(time_us)),
        time_us,
        lengths,
        asked_at(now, last, served.version.config.horizon),
    )


def times(histories: Sequence[History]) -> Ints:
    """(events,) microseconds of all histories, one behind the other."""
    count = sum(map(len, histories))
    return np.fromiter(chain.from_iterable(each.times_us for each in histories), np.int64, count)


def _ascending(time_us: Ints, lengths: Ints) -> Ints:
    """Times of ragged histories: none before that of an event before it, as in training.

    Inline events follow the stored ones, whatever time they give.
    """
    if (np.diff(time_us) >= 0).all():
        return time_us
    parts = np.split(time_us, np.cumsum(lengths)[:-1])
    return np.concatenate([np.maximum.accumulate(part) for part in parts])

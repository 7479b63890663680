"""Training sequences: long histories in overlapping windows, all positions of which are learned.

For each basket the context is the last event before it. The logits of a context are computed once
and shared by the lines of the basket; a basket never sees its own lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from predictor.learning.data import Events, ragged
from predictor.models.history import MICROSECONDS, Ints, gap_buckets, hours_of_week

LATE_HALF_LIFE = 2.0
"""In baskets before the user's last: by it falls what late baskets count more."""

FIRST_WEIGHT = 0.1
"""Of users' first baskets, which nothing came before: they say what is popular, and no more."""


@dataclass(frozen=True)
class Batch:
    """Some windows, padded on the right, with what follows their contexts."""

    item: Ints
    """(windows, time) item of each event; negative where there is none, and in the padding."""
    text: Ints
    """(windows, time) the same for texts."""
    type: Ints
    """(windows, time)."""
    gap: Ints
    """(windows, time)."""
    hour: Ints
    """(windows, time) of the week."""
    context: Ints
    """(contexts,) position in the flattened (windows * time); -1: nothing came before."""
    log_gap: NDArray[np.float32]
    """(contexts,) log of the seconds since the context; NaN without context or time."""
    row: Ints
    """(lines,) ascending: the context that a line of a basket belongs to."""
    line_item: Ints
    """(lines,) negative where the line has no item of the catalogue."""
    line_type: Ints
    """(lines,)."""
    weight: NDArray[np.float32]
    """(lines,) each basket's lines sum to basket size ** basket_power."""


class Windows:
    """The windows of some events.

    A user's events are cut into windows of `length`, each starting half a window after the one
    before. A context belongs to the first window in which at least half a window lies before it (or
    the user's whole history does), so every basket is learned once, and from about as long a
    history as serving reads.
    """

    def __init__(
        self, events: Events, length: int, basket_power: float = 1.0, late_weight: float = 0.0
    ) -> None:
        """Cuts windows.

        Args:
            length: events of a window, at most.
            basket_power: a basket's lines count together as their number to this power.
            late_weight: a basket counts 1 + late_weight * 0.5 ** (baskets to its user's last one /
                LATE_HALF_LIFE): what is predicted in the end comes after the last ones.
        """
        self._events = events
        self._weight = _weights(events, basket_power, late_weight)
        stride = max(1, length // 2)
        first_of_user = events.first_of_user
        users = np.flatnonzero(np.diff(first_of_user))
        begin, events_of = first_of_user[users], np.diff(first_of_user)[users]
        windows_of = 1 + np.maximum(0, -(-(events_of - length) // stride))
        number = ragged(np.zeros(len(users), np.int64), windows_of)
        self.begin: Ints = np.repeat(begin, windows_of) + number * stride
        self.lengths: Ints = np.minimum(
            length, np.repeat(begin + events_of, windows_of) - self.begin
        )
        self._assign_contexts(begin, windows_of, length, stride)

    def _assign_contexts(self, begin: Ints, windows_of: Ints, length: int, stride: int) -> None:
        """For each basket: its window, and the offset of its context in there (-1: none)."""
        events = self._events
        first_of_basket = events.first_of_basket[:-1]
        # Users without events have no window: count the others only.
        position = np.cumsum(np.diff(events.first_of_user) > 0) - 1
        user = position[events.user[first_of_basket]]
        offset = first_of_basket - 1 - begin[user]
        # Contexts beyond the first window belong to window k where length + (k-1) * stride <=
        # offset < length + k * stride.
        number = np.maximum(0, (offset - length) // stride + 1)
        first_window = np.cumsum(windows_of) - windows_of
        window = first_window[user] + number
        # Baskets lie in the order of users and time, so windows ascend.
        self._offset = np.where(offset < 0, -1, offset - number * stride)
        self._first_basket = np.searchsorted(window, np.arange(len(self.begin) + 1))

    def __len__(self) -> int:
        return len(self.begin)

    @cached_property
    def contexts(self) -> Ints:
        """(windows,) contexts of each window, the empty history aside."""
        first = np.concatenate([[0], np.cumsum(self._offset >= 0)])[self._first_basket]
        return np.diff(first)

    @property
    def _baskets(self) -> Ints:
        """(windows,) contexts of each window."""
        return np.diff(self._first_basket)

    def batch(self, chosen: Ints) -> Batch:
        """Gathers some windows."""
        events = self._events
        lengths = self.lengths[chosen]
        time = int(lengths.max())
        real = np.arange(time) < lengths[:, None]
        at = np.where(real, self.begin[chosen][:, None] + np.arange(time), 0)
        gap, hour = np.zeros((2, *real.shape), np.int64)
        if events.has_times:
            gap[real] = gap_buckets(events.timestamp[at[real]], lengths)
            hour[real] = hours_of_week(events.timestamp[at[real]])
        baskets_of = self._baskets[chosen]
        basket = ragged(self._first_basket[chosen], baskets_of)
        offset = self._offset[basket]
        context = np.where(
            offset < 0, -1, offset + np.repeat(np.arange(len(chosen)), baskets_of) * time
        )
        log_gap = np.full(len(basket), np.nan, np.float32)
        if events.has_times:
            first = events.first_of_basket[basket][offset >= 0]
            micros = events.timestamp[first] - events.timestamp[first - 1]
            log_gap[offset >= 0] = np.log(micros / MICROSECONDS)
        size = np.diff(events.first_of_basket)[basket]
        # Users' first baskets have one context in common, the empty history: it comes first.
        order = np.argsort(offset >= 0, kind="stable")
        basket, size, context, log_gap = basket[order], size[order], context[order], log_gap[order]
        empty = max(0, int((context < 0).sum()) - 1)
        line = ragged(events.first_of_basket[basket], size)
        row = np.repeat(np.maximum(0, np.arange(len(basket)) - empty), size)
        weight = self._weight[basket] * np.where(context < 0, FIRST_WEIGHT, 1.0)
        return Batch(
            item=np.where(real, events.item[at], -1),
            text=np.where(real, events.text[at], -1),
            type=events.type[at],
            gap=gap,
            hour=hour,
            context=context[empty:],
            log_gap=log_gap[empty:],
            row=row,
            line_item=events.item[line],
            line_type=events.type[line],
            weight=np.repeat(weight, size).astype(np.float32),
        )

    def epoch(self, contexts: int, tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
        """All windows once, in random order, those of like length together.

        Args:
            contexts: of a batch, about,
            tokens: and events of a batch at most, about.
            rng: gives the order.
        """
        # Noise on the length mixes windows of nearly the same one anew each epoch.
        by = np.argsort(self.lengths * rng.uniform(0.9, 1.1, len(self)), kind="stable")
        batches = self._divide(by, contexts, tokens)
        for index in rng.permutation(len(batches)):
            # Windows within one very long basket have nothing to learn.
            if self._baskets[batches[index]].any():
                yield self.batch(batches[index])

    def steps(self, contexts: int, tokens: int) -> int:
        """About how many batches an epoch has."""
        return len(self._divide(np.argsort(self.lengths, kind="stable"), contexts, tokens))

    def _divide(self, by: Ints, contexts: int, tokens: int) -> list[Ints]:
        """Cuts windows, those of like length together, where a batch is full."""
        # Of a batch, a window takes the share of contexts or of tokens that is the larger.
        share = np.maximum(self.contexts[by] / contexts, self.lengths[by] / tokens)
        number = np.floor(np.cumsum(share) - share / 2).astype(np.int64)
        return np.split(by, np.flatnonzero(np.diff(number)) + 1)


def _weights(events: Events, basket_power: float, late_weight: float) -> NDArray[np.float64]:
    """(baskets,) of each line, see Windows."""
    first = events.first_of_basket
    user, number = events.user[first[:-1]], np.arange(len(first) - 1)
    last = np.zeros(len(events.user_ids), np.int64)
    last[user] = number
    late = 0.5 ** ((last[user] - number) / LATE_HALF_LIFE)
    weight: NDArray[np.float64] = np.diff(first) ** (basket_power - 1.0) * (1 + late_weight * late)
    return weight

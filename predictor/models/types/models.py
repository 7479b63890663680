"""The behavior type of the next event, and of an event with a given item: boosted trees.

Ke et al., 2017, "LightGBM"; fitted by predictor.learning.types.fitting. The probabilities are
softmax(scale * trees' scores + biases), and the one type to name is the one with the largest
probability * weight: rare types get their due in the macro-F1 that way.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from predictor.models.calibration import softmax
from predictor.models.history import Histories, Ints
from predictor.models.trees import read_trees
from predictor.models.types.features import View, history_features
from predictor.models.types.item_features import pair_features
from predictor.models.types.tables import Floats, ItemTypes

if TYPE_CHECKING:
    import lightgbm

EVENTS = 512
"""Latest events of a history that are read."""

CHUNK_EVENTS = 400_000
"""Events of the histories that are looked at together: bounds memory."""

FORMAT = 1


@dataclass(frozen=True)
class Rule:
    """From the trees' scores to probabilities, and to the one type to name."""

    scale: float
    biases: tuple[float, ...]
    """(types,)."""
    weights: tuple[float, ...]
    """(types,) positive."""

    def probabilities(self, scores: Floats) -> Floats:
        """(n, types) from scores (n, types)."""
        return softmax(scores.astype(np.float64) * self.scale + np.array(self.biases))

    def choose(self, probabilities: Floats) -> Ints:
        """(n,) the type to name for each row of probabilities (n, types)."""
        chosen: Ints = (probabilities * np.array(self.weights)).argmax(axis=1)
        return chosen


@dataclass(frozen=True)
class Trees(ABC):
    """What both models are made of."""

    NAME: ClassVar[str]

    text: str
    """The trees in LightGBM's text format."""
    table: ItemTypes
    rule: Rule
    has_times: bool

    @cached_property
    def booster(self) -> lightgbm.Booster:
        """The trees; reading them takes about as long as a few predictions."""
        return read_trees(self.text)

    @property
    def types(self) -> int:
        """Behavior types."""
        return len(self.table.prior)

    def choose(self, probabilities: Floats) -> Ints:
        """(n,) the type to name where only one can be named, from probabilities (n, types)."""
        return self.rule.choose(probabilities)

    def view(self, histories: Histories, own: Floats | None = None) -> View:
        """Histories as the features read them.

        Args:
            histories: up to CHUNK_EVENTS events, for the sake of memory.
            own: (events, types) see ItemTypes.seen.
        """
        seen = self.table.seen(histories.item, own)
        return View(
            histories, seen, self.table.prior,
            has_times=self.has_times, has_items=self.table.has_items,
        )  # fmt: skip

    def _answer(self, features: Floats) -> Floats:
        if not len(features):
            return np.zeros((0, self.types), np.float32)
        scores = self.booster.predict(features, raw_score=True, num_threads=1)
        return self.rule.probabilities(np.asarray(scores))

    def files(self) -> dict[str, bytes]:
        """The model as bytes, see `load`."""
        head = {"format": FORMAT, "has_times": self.has_times, **asdict(self.rule)}
        return {
            f"{self.NAME}.json": (json.dumps(head, indent=1) + "\n").encode(),
            f"{self.NAME}.txt": self.text.encode(),
            f"{self.NAME}.safetensors": self.table.tensors(),
        }

    @classmethod
    def load(cls, files: Mapping[str, bytes], types: int) -> Self:
        """The model from its files.

        Args:
            files: with others among them.
            types: behavior types of the version.

        Raises:
            ValueError: one is missing or damaged; says which and how.
        """
        head, text, tensors = (f"{cls.NAME}.{end}" for end in ("json", "txt", "safetensors"))
        for name in (head, text, tensors):
            if name not in files:
                raise ValueError(f"{name} is missing")
        try:
            table = ItemTypes.read(files[tensors])
            if len(table.prior) != types:
                raise ValueError(f"is about {len(table.prior)} behavior types, not {types}")
        except ValueError as error:
            raise ValueError(f"{tensors}: {error}") from None
        try:
            rule, has_times = _read_head(files[head], types)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{head}: {error!r}") from None
        try:
            model = cls(files[text].decode(), table, rule, has_times)
            model.check()
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        return model

    def check(self) -> None:
        """Compares the trees with what this code gives them and takes from them.

        Raises:
            ValueError: they do not fit.
        """
        found = self.booster.num_feature(), self.booster.num_model_per_iteration()
        want = self._features_read(), self.types
        if found != want:
            raise ValueError(f"trees of {found} (features, types); this program has {want}")

    @abstractmethod
    def _features_read(self) -> int:
        """Columns that the trees are given."""


def _read_head(data: bytes, types: int) -> tuple[Rule, bool]:
    head: Any = json.loads(data)
    if head["format"] != FORMAT:
        raise ValueError(f"format {head['format']!r}; this program reads format {FORMAT}")
    rule = Rule(float(head["scale"]), *(tuple(map(float, head[k])) for k in ("biases", "weights")))
    numbers = (rule.scale, *rule.biases, *rule.weights)
    if not all(map(math.isfinite, numbers)) or min(rule.scale, *rule.weights) <= 0:
        raise ValueError("scale, biases or weights are no numbers, or not positive")
    if not len(rule.biases) == len(rule.weights) == types:
        raise ValueError(f"there are not {types} biases and weights")
    if not isinstance(head["has_times"], bool):
        raise ValueError("has_times is neither true nor false")
    return rule, head["has_times"]


class TypeModel(Trees):
    """Probabilities of the next behavior type."""

    NAME = "next_type"

    def predict(self, histories: Histories) -> Floats:
        """(histories, types) probabilities."""
        return self._answer(self.features(histories))

    def features(self, histories: Histories, own: Floats | None = None) -> Floats:
        """(histories, features); a history without events has those of the prior.

        Args:
            own: (events, types) see ItemTypes.seen.
        """
        parts = []
        histories, own = latest(histories, own)
        for rows, events in chunks(histories.lengths):
            left = None if own is None else own[events]
            groups = history_features(self.view(some_of(histories, rows, events), left))
            parts.append(np.concatenate(list(groups.values()), axis=1))
        return np.concatenate(parts)

    def _features_read(self) -> int:
        return int(self.features(NO_HISTORY).shape[1])


class ItemTypeModel(Trees):
    """Probabilities of the behavior type of the next event, given its item."""

    NAME = "item_type"

    def predict(self, histories: Histories, row: Ints, item: Ints) -> Floats:
        """(n, types) probabilities of pairs.

        Args:
            row: (n,) the pair's history, ascending.
            item: (n,) the pair's item, as in Histories.
        """
        return self._answer(self.features(histories, row, item))

    def features(
        self,
        histories: Histories,
        row: Ints,
        item: Ints,
        own: Floats | None = None,
        own_pairs: Floats | None = None,
    ) -> Floats:
        """(n, features).

        Args:
            own: (events, types) see ItemTypes.seen.
            own_pairs: (n, types) the same of the pairs' items.
        """
        parts = []
        histories, own = latest(histories, own)
        for rows, events in chunks(histories.lengths):
            begin, end = np.searchsorted(row, [rows.start, rows.stop])
            pairs = slice(begin, end)
            view = self.view(some_of(histories, rows, events), None if own is None else own[events])
            at = row[pairs] - rows.start
            left = None if own_pairs is None else own_pairs[pairs]
            seen = self.table.seen(item[pairs], left)
            users = np.concatenate(list(history_features(view).values()), axis=1)
            pair_groups = pair_features(view, at, item[pairs], seen, self.table)
            parts.append(np.concatenate([users[at], *pair_groups.values()], axis=1))
        return np.concatenate(parts)

    def _features_read(self) -> int:
        pair = np.zeros(1, np.int64)
        return int(self.features(NO_HISTORY, pair, pair).shape[1])


_NOTHING = np.zeros(0, np.int64)
NO_HISTORY = Histories(_NOTHING, _NOTHING, _NOTHING, np.zeros(1, np.int64), np.zeros(1, np.int64))
"""One history without events."""


def latest(histories: Histories, own: Floats | None) -> tuple[Histories, Floats | None]:
    """Histories, and values of their events, cut to the last EVENTS events."""
    kept = histories.age < EVENTS
    if kept.all():
        return histories, own
    cut = Histories(
        histories.item[kept],
        histories.type[kept],
        histories.timestamp[kept],
        np.minimum(histories.lengths, EVENTS),
        histories.as_of,
    )
    return cut, None if own is None else own[kept]


def chunks(lengths: Ints) -> Iterator[tuple[slice, slice]]:
    """Rows of histories and their events, up to CHUNK_EVENTS or one history at a time."""
    ends = np.cumsum(lengths)
    begin = first = 0
    if not len(lengths):
        yield slice(0, 0), slice(0, 0)
    while begin < len(lengths):
        stop = max(begin + 1, int(np.searchsorted(ends, first + CHUNK_EVENTS, "right")))
        last = int(ends[stop - 1])
        yield slice(begin, stop), slice(first, last)
        begin, first = stop, last


def some_of(histories: Histories, rows: slice, events: slice) -> Histories:
    """Some of the histories."""
    return Histories(
        histories.item[events],
        histories.type[events],
        histories.timestamp[events],
        histories.lengths[rows],
        histories.as_of[rows],
    )

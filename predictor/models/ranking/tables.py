"""Frozen global statistics of a version: what the ranker knows of items, whoever the user.

They are fitted on training events (predictor.learning.ranking.tables) and never change in serving.
Items that are newer than the tables get zeros, so that training and serving agree on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from predictor.models.history import Ints

FILE = "tables.safetensors"

STATISTICS = (
    "events", "users", "last_28_days", "last_7_days", "trend", "first_seen_days",
    "repeat_share", "gap_days", "basket_size", "position", "second_type_share",
)  # fmt: skip
"""Columns of Tables.statistics, see learning.ranking.tables.item_statistics."""

KINDS = ("next", "previous", "near", "users")
"""Relations between items: j is in the basket after i's; before it; among the next few; had by the
same users."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Neighbours:
    """For each item the items that are closest to it in one relation."""

    item: NDArray[np.int32]
    """(items, n) closest first; -1 where there are fewer."""
    weight: Floats
    """(items, n) how often it was seen."""
    share: Floats
    """(items, n) the same over the number of chances; 0 to 1."""


@dataclass(frozen=True)
class Tables:
    """Statistics of the items that were known when the tables were fitted."""

    statistics: Floats
    """(items, len(STATISTICS)); zeros for items without events."""
    neighbours: Mapping[str, Neighbours]
    """By kind: all KINDS in their order."""
    texts: NDArray[np.float16]
    """(items, dims) principal axes of the items' text vectors, unit length; zeros without text."""
    category: NDArray[np.int32]
    """(items,) group of items with like texts, from 1; 0 without text."""
    gap_days: float
    """Between two purchases of the same item by a user, the median over all; 0 without repeats."""
    popular: NDArray[np.int32]
    """Items by falling popularity, recent events counting more; only those with events."""

    @property
    def items(self) -> int:
        """Items of the catalogue at training."""
        return len(self.statistics)

    @staticmethod
    def empty() -> Tables:
        """Tables of no items."""
        none = Neighbours(np.zeros((0, 1), np.int32), *np.zeros((2, 0, 1), np.float32))
        return Tables(
            np.zeros((0, len(STATISTICS)), np.float32),
            dict.fromkeys(KINDS, none),
            np.zeros((0, 1), np.float16),
            np.zeros(0, np.int32),
            0.0,
            np.zeros(0, np.int32),
        )

    @cached_property
    def padded(self) -> Floats:
        """(items + 1, statistics): the last row is for items without any."""
        return _padded(self.statistics)

    @cached_property
    def padded_texts(self) -> Floats:
        """(items + 1, dims)."""
        return _padded(self.texts.astype(np.float32))

    @cached_property
    def padded_category(self) -> Ints:
        """(items + 1,)."""
        return np.append(self.category, 0).astype(np.int64)

    def row(self, item: Ints) -> Ints:
        """Rows of the padded arrays: the item's own, or the last."""
        known: Ints = np.where((item >= 0) & (item < self.items), item, self.items)
        return known

    def new(self, item: Ints) -> NDArray[np.bool_]:
        """(n,) which items have no events that the tables know of."""
        unknown: NDArray[np.bool_] = self.padded[self.row(item), 0] == 0
        return unknown

    def files(self) -> dict[str, bytes]:
        """The tables as bytes, see `load`."""
        tensors: dict[str, NDArray[Any]] = {
            "statistics": self.statistics,
            "texts": self.texts,
            "category": self.category,
            "popular": self.popular,
            "gap_days": np.array([self.gap_days], np.float64),
        }
        for kind, table in self.neighbours.items():
            tensors[f"{kind}.item"] = table.item
            tensors[f"{kind}.weight"] = table.weight
            tensors[f"{kind}.share"] = table.share
        return {FILE: save_tensors(tensors)}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> Tables:
        """The tables from their files.

        Raises:
            ValueError: a file is missing or damaged; says which tensor is wrong and how.
        """
        if FILE not in files:
            raise ValueError(f"{FILE} is missing")
        try:
            tensors = load_tensors(files[FILE])
        except SafetensorError as error:
            raise ValueError(f"{FILE}: {error}") from None
        statistics = _take(tensors, "statistics", np.float32, (None, len(STATISTICS)))
        items = len(statistics)
        texts = _take(tensors, "texts", np.float16, (items, None))
        category = _take(tensors, "category", np.int32, (items,))
        popular = _take(tensors, "popular", np.int32, (None,))
        gap_days = _take(tensors, "gap_days", np.float64, (1,))
        neighbours = {kind: _neighbours(tensors, kind, items) for kind in KINDS}
        if tensors:
            raise ValueError(f"{FILE}: tensors that do not belong there: {', '.join(tensors)}")
        if len(category) and category.min() < 0:
            raise ValueError(f"{FILE}: category has negative numbers")
        if len(popular) and not (popular.min() >= 0 and popular.max() < items):
            raise ValueError(f"{FILE}: popular names items outside 0 to {items - 1}")
        return cls(statistics, neighbours, texts, category, float(gap_days[0]), popular)


def _neighbours(tensors: dict[str, NDArray[Any]], kind: str, items: int) -> Neighbours:
    item = _take(tensors, f"{kind}.item", np.int32, (items, None))
    weight = _take(tensors, f"{kind}.weight", np.float32, item.shape)
    share = _take(tensors, f"{kind}.share", np.float32, item.shape)
    if item.size and not (item.min() >= -1 and item.max() < items):
        raise ValueError(f"{FILE}: {kind}.item names items outside 0 to {items - 1}")
    return Neighbours(item, weight, share)


def _take(
    tensors: dict[str, NDArray[Any]],
    name: str,
    dtype: type,
    shape: tuple[int | None, ...],
) -> NDArray[Any]:
    """Removes a tensor, after a check of its type, shape and that its numbers are finite."""
    if name not in tensors:
        raise ValueError(f"{FILE}: tensor {name} is missing")
    tensor = tensors.pop(name)
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise ValueError(
            f"{FILE}: {name} is {tensor.dtype} {tensor.shape}, expected {np.dtype(dtype)} {shape}"
        )
    if not np.isfinite(tensor).all():
        raise ValueError(f"{FILE}: {name} has numbers that are not finite")
    return tensor


def _padded(values: Floats) -> Floats:
    padded: Floats = np.concatenate([values, np.zeros_like(values[:1], shape=(1, values.shape[1]))])
    return padded

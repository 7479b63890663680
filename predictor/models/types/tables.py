"""What a version knows of its items' behavior types: frozen at training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from predictor.models.history import Ints

Floats = NDArray[np.float32]

ITEM_PRIOR = 8.0
"""Events of the usual distribution that count besides an item's own."""


@dataclass(frozen=True)
class Seen:
    """What is usual for some items."""

    expected: Floats
    """(n, types) shrunk shares."""
    popularity: Floats
    """(n,) log1p of the item's events."""


@dataclass(frozen=True)
class ItemTypes:
    """Which types the events of each item had."""

    counts: Floats
    """(items, types) events."""
    usual: Floats
    """(items, types) the distribution that the item's text suggests."""
    prior: Floats
    """(types,) the distribution over all events: for items that the table lacks."""
    vectors: NDArray[np.float16]
    """(items, cols) the items' texts, of length one, or zero; no columns without texts."""

    @property
    def has_items(self) -> bool:
        """Whether there are any."""
        return bool(len(self.counts))

    @cached_property
    def _counts(self) -> Floats:
        return np.concatenate([self.counts, np.zeros((1, len(self.prior)), np.float32)])

    @cached_property
    def _usual(self) -> Floats:
        return np.concatenate([self.usual, self.prior[None]])

    @cached_property
    def padded_vectors(self) -> Floats:
        """(items + 1, cols) with a row of zeros at the end; see `rows`."""
        padded = np.concatenate([self.vectors, np.zeros_like(self.vectors, shape=(1, self.cols))])
        return padded.astype(np.float32)

    @property
    def cols(self) -> int:
        """Columns of the vectors."""
        return int(self.vectors.shape[1])

    def rows(self, item: Ints) -> Ints:
        """The tables' rows of items; the last one, of zeros, for those that they lack."""
        size = len(self.counts)
        return np.where((item >= 0) & (item < size), item, size)

    def seen(self, item: Ints, own: Floats | None = None) -> Seen:
        """What is usual for items.

        Args:
            item: (n,) as in Histories.
            own: (n, types) events to leave out of the table: in training, those of the same user.
        """
        rows = self.rows(item)
        counts = self._counts[rows]
        if own is not None:
            counts = np.maximum(counts - own, 0)
        total = counts.sum(axis=1)
        expected = (counts + ITEM_PRIOR * self._usual[rows]) / (total + ITEM_PRIOR)[:, None]
        return Seen(expected.astype(np.float32), np.log1p(total).astype(np.float32))

    def vectors_of(self, item: Ints) -> Floats:
        """(n, cols) vectors of items."""
        return self.padded_vectors[self.rows(item)]

    def tensors(self) -> bytes:
        """As safetensors."""
        return save_tensors(
            {
                "counts": np.ascontiguousarray(self.counts, np.float32),
                "usual": np.ascontiguousarray(self.usual, np.float32),
                "prior": np.ascontiguousarray(self.prior, np.float32),
                "vectors": np.ascontiguousarray(self.vectors, np.float16),
            }
        )

    @classmethod
    def read(cls, data: bytes) -> ItemTypes:
        """From what `tensors` gave.

        Raises:
            ValueError: it is damaged; says how.
        """
        try:
            tensors = load_tensors(data)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"not a safetensors file ({error})") from None
        if tensors.keys() != {"counts", "usual", "prior", "vectors"}:
            raise ValueError(f"has {sorted(tensors)}, not counts, prior, usual, vectors")
        for name, values in tensors.items():
            want, dims = (
                (np.float16, 2) if name == "vectors" else (np.float32, 1 + (name != "prior"))
            )
            if values.dtype != want or values.ndim != dims:
                raise ValueError(f"{name} is {values.dtype} of shape {values.shape}")
            if not np.isfinite(values).all() or (name != "vectors" and (values < 0).any()):
                raise ValueError(f"{name} has numbers that cannot be")
        counts, prior = tensors["counts"], tensors["prior"]
        same = counts.shape == tensors["usual"].shape and counts.shape[1] == len(prior)
        if not same or len(tensors["vectors"]) != len(counts):
            raise ValueError("the shapes do not fit together")
        return cls(counts, tensors["usual"], prior, tensors["vectors"])

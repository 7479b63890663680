"""Counts items' behavior types and learns what their texts say about them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foretell.vectors import Vectors
from predictor.learning.data import Events
from predictor.models.types.tables import Floats, ItemTypes

TEXT_COLS = 64
"""Principal axes of the text vectors that are kept."""

RIDGE = 2_000.0
"""Events that the regression of types on texts is shrunk by."""

SATURATION = 50.0
"""Events of an item beyond which it hardly weighs more in that regression."""

LEAST_SHARE = 0.02
"""What a text says is never less than this part of the prior."""


def item_types(train: Events, item_vectors: Vectors) -> ItemTypes:
    """The frozen tables, from the training part.

    Args:
        item_vectors: (items, cols) of the items' texts; zero where an item has none.
    """
    types = len(train.behavior_types)
    typed = train.type >= 0
    seen = np.bincount(train.type[typed], minlength=types)
    prior = _shares(seen.astype(np.float64) + 1)
    items = len(train.item_ids) if train.has_items else 0
    some = typed & (train.item >= 0)
    cells = train.item[some] * types + train.type[some]
    counts = np.bincount(cells, minlength=items * types).reshape(items, types).astype(np.float64)
    vectors = _principal(item_vectors[:items])
    usual = _usual(vectors, counts, prior)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    return ItemTypes(
        counts.astype(np.float32), usual, prior.astype(np.float32), unit.astype(np.float16)
    )


def _shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = counts / counts.sum(axis=-1, keepdims=True)
    return shares


def _principal(vectors: Vectors) -> NDArray[np.float64]:
    """(items, at most TEXT_COLS) on the principal axes, the first with a variance of one."""
    some = vectors.any(axis=1)
    if not some.any():
        return np.zeros((len(vectors), 0))
    centred = vectors[some].astype(np.float64)
    centred -= centred.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    out = np.zeros((len(vectors), min(TEXT_COLS, vectors.shape[1])))
    out[some] = centred @ axes[:, ::-1][:, : out.shape[1]]
    out /= np.sqrt(max(variances[-1], 1e-12))
    return out


def _usual(
    vectors: NDArray[np.float64], counts: NDArray[np.float64], prior: NDArray[np.float64]
) -> Floats:
    """(items, types) shares of types by a ridge regression on the vectors."""
    total = counts.sum(axis=1, keepdims=True)
    weights = total / (1 + total / SATURATION)
    differences = np.where(total > 0, counts / np.maximum(total, 1), prior) - prior
    weighted = vectors * weights
    gram = weighted.T @ vectors + RIDGE * np.eye(vectors.shape[1])
    guesses = prior + vectors @ np.linalg.solve(gram, weighted.T @ differences)
    return _shares(np.maximum(guesses, LEAST_SHARE * prior)).astype(np.float32)


def own_counts(train: Events) -> Floats:
    """(events, types) what the tables count of the event's item by the event's user.

    Left out of them in training, so that no target can be read off its item's counts.
    """
    types = len(train.behavior_types)
    keys = train.user * (len(train.item_ids) + 2) + train.item + 2
    _, pair = np.unique(keys, return_inverse=True)
    some = (train.type >= 0) & (train.item >= 0)
    size = (int(pair.max(initial=0)) + 1) * types
    counts = np.bincount(pair[some] * types + train.type[some], minlength=size)
    own: Floats = counts.reshape(-1, types).astype(np.float32)[pair]
    return own

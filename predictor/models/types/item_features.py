"""What ItemTypeModel reads of a user and an item, besides the user's own features."""

from __future__ import annotations

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

from predictor.models.history import NONE, Ints
from predictor.models.types.features import RESIDUAL_PRIOR, View, columns_of, residuals
from predictor.models.types.tables import Floats, ItemTypes, Seen

AFFINITY_EVENTS = 300
"""Latest events whose items a candidate is compared with."""

SHARPNESS = (4.0, 12.0)
"""Of the weights exp(sharpness * (cosine - 1)) in similarity-weighted types."""

USUAL_DISTANCE = 0.7
"""Of two items at random: at this distance lie the events that the user's shares count for."""

CHUNK_COMPARISONS = 400_000
"""Candidates x events that are compared at once: bounds memory."""

LEAST = np.float32(1e-6)


def pair_features(
    view: View, row: Ints, item: Ints, seen: Seen, table: ItemTypes
) -> dict[str, Floats]:
    """(n, k) features of pairs by group, always in the same order.

    Args:
        view: the histories.
        row: (n,) which history.
        item: (n,) which item.
        seen: what is usual for the items.
        table: for the items' vectors.
    """
    groups = {
        "additive": _additive(view, row, seen),
        "own": _own(view, row, item),
    }
    if table.cols:
        groups["affinity"] = _affinity(view, row, item, table)
    return groups


def _additive(view: View, row: Ints, seen: Seen) -> Floats:
    """What is usual for the item, moved by how the user differs from what is usual."""
    shifts = residuals(view)
    parts = [seen.expected + shifts[half_life][row] for half_life in (16.0, np.inf)]
    odds = np.log(seen.expected + LEAST) - np.log(view.prior + LEAST)
    parts += [odds + np.log(view.shares[half_life][row] + LEAST) for half_life in (8.0, 32.0)]
    return columns_of(*parts)


def _own(view: View, row: Ints, item: Ints) -> Floats:
    """The user's own earlier events with the very item: types, the last one's type and age."""
    histories = view.histories
    # One integer per history and item; NONE and UNKNOWN are no items and match nothing.
    base = max(histories.item.max(initial=0), item.max(initial=0)) + 3
    keys = view.row * base + histories.item
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    wanted = np.where(item >= 0, row * base + item, -base)
    begin, end = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    zero = np.zeros((1, view.types), np.float32)
    before = np.concatenate([zero, np.cumsum(view.one_hot[order], axis=0)])
    at = np.where(end > begin, View.take(order, np.where(end > begin, end - 1, -1), -1), -1)
    age = View.take(view.age, at, -1)
    last = View.take(histories.type, at, NONE)
    return columns_of(before[end] - before[begin], last, age, end - begin)


def _affinity(view: View, row: Ints, item: Ints, table: ItemTypes) -> Floats:
    """Types, and differences to what is usual, of the user's items that are like this one."""
    items = table.rows(view.histories.item)
    values = np.concatenate(
        [view.one_hot, view.one_hot - view.seen.expected, np.ones_like(view.one_hot[:, :1])], axis=1
    )
    lengths = np.minimum(view.histories.lengths, AFFINITY_EVENTS)[row]
    parts: list[Floats] = []
    begin, ends = 0, np.cumsum(lengths)
    while begin < len(row) or not parts:
        most = (ends[begin - 1] if begin else 0) + CHUNK_COMPARISONS
        stop = max(begin + 1, int(np.searchsorted(ends, most, "right")))
        some = slice(begin, min(stop, len(row)))
        parts.append(
            _compared(
                view, row[some], lengths[some], table.vectors_of(item[some]), items, table, values
            )
        )
        begin = stop
    return np.concatenate(parts)


def _compared(
    view: View,
    row: Ints,
    lengths: Ints,
    candidates: Floats,
    items: Ints,
    table: ItemTypes,
    values: Floats,
) -> Floats:
    """The features of `_affinity` for a few pairs."""
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    pair = np.repeat(np.arange(len(row)), lengths)
    at = np.arange(indptr[-1]) + np.repeat(view.ends[row] - indptr[1:], lengths)
    cosine = np.einsum("ij,ij->i", table.padded_vectors[items[at]], candidates[pair])
    nearest = np.full(len(row), -1, np.float32)
    np.maximum.at(nearest, pair, cosine)
    parts = [nearest]
    types = view.types
    for sharpness in SHARPNESS:
        weights = np.exp(sharpness * (cosine - 1), dtype=np.float32)
        matrix = sparse.csr_matrix((weights, at, indptr), shape=(len(row), len(values)))
        sums = matrix @ values
        total = sums[:, -1:]
        prior = np.exp(-sharpness * USUAL_DISTANCE)
        own = view.shares[np.inf][row]
        parts += [
            (sums[:, :types] + prior * own) / (total + prior),
            sums[:, types:-1] / (total + RESIDUAL_PRIOR * prior),
            np.log(total + LEAST),
        ]
    return columns_of(*parts)

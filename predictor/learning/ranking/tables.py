"""Fits the ranker's global tables on training events."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from foretell.vectors import Vectors
from predictor.learning.data import Events
from predictor.models.history import MICROSECONDS, Ints
from predictor.models.ranking.pairs import ITEMS, Groups
from predictor.models.ranking.tables import STATISTICS, Neighbours, Tables

DAY = 86_400 * MICROSECONDS
NEIGHBOURS = 50
"""Of each item, in each relation."""
NEAR = 5
"""Baskets behind an item's that count as near."""
USER_ITEMS = 500
"""Latest distinct items of a user that count as had together: bounds the square of long lists."""
TEXT_DIMS = 48
"""Principal axes of the text vectors that are kept."""
BLOCK = 1_000
"""Items whose relations are counted at once: bounds memory."""


class TextTable(NamedTuple):
    """What the tables say of the items' texts; the same whatever the events are."""

    texts: NDArray[np.float16]
    """(items, TEXT_DIMS), see `compact`."""
    category: NDArray[np.int32]
    """(items,), see `categories`."""


def fit_texts(text_vectors: Vectors, seed: int) -> TextTable:
    """Reduces and groups texts.

    Args:
        text_vectors: (items, cols) of the catalogue's texts; zero where an item has none.
        seed: of the grouping.
    """
    texts = compact(text_vectors, TEXT_DIMS)
    return TextTable(texts, categories(texts, seed))


def fit_tables(events: Events, texts: TextTable, now: int) -> Tables:
    """Statistics of all items over the events.

    Args:
        events: the training part.
        texts: of the catalogue.
        now: the instant, in microseconds, that recent means recent to.
    """
    some = events.subset(events.item >= 0)
    statistics, gap_days = item_statistics(some, now)
    return Tables(
        statistics=statistics,
        neighbours=fit_neighbours(some),
        texts=texts.texts,
        category=texts.category,
        gap_days=gap_days,
        popular=popular_items(some, now),
    )


def item_statistics(events: Events, now: int) -> tuple[NDArray[np.float32], float]:
    """(items, STATISTICS), and the median gap of all. Counts are log(1 + n).

    trend is the log of the last 28 days' share of events; gap_days the mean time between purchases
    by one user, shrunk to the median; position the mean share of their histories before them.
    """
    size, item = len(events.item_ids), events.item
    found = dict.fromkeys(STATISTICS, np.zeros(size))
    total = np.bincount(item, minlength=size).astype(np.float64)
    groups = Groups.of(events.user * ITEMS + item)
    had = groups.key % ITEMS
    users = np.bincount(had, minlength=size)
    found["events"], found["users"] = np.log1p(total), np.log1p(users)
    first, last = groups.first, groups.last
    repeated = events.basket[first] != events.basket[last]
    found["repeat_share"] = _mean(had, repeated, size)
    lengths = np.diff(events.first_of_basket)
    found["basket_size"] = _mean(item, np.log1p(lengths)[events.basket], size)
    user_length = np.diff(events.first_of_user)[events.user]
    place = np.arange(len(events)) - events.first_of_user[events.user]
    found["position"] = _mean(item, (place + 0.5) / user_length, size)
    top = np.argsort(-np.bincount(events.type[events.type >= 0], minlength=2), kind="stable")
    found["second_type_share"] = _mean(item, events.type == top[1], size)
    gap_days = 0.0
    if events.has_times:
        age = (now - events.timestamp) / DAY
        for name, days in (("last_28_days", 28), ("last_7_days", 7)):
            found[name] = np.log1p(np.bincount(item[age <= days], minlength=size))
        found["trend"] = found["last_28_days"] - found["events"]
        oldest = np.zeros(size)
        np.maximum.at(oldest, item, age)
        found["first_seen_days"] = oldest
        span = (events.timestamp[last] - events.timestamp[first])[repeated] / DAY
        times = groups.count[repeated] - 1
        if len(span):
            gap_days = float(np.median(span / times))
        sums = np.bincount(had[repeated], span, size) + 3 * gap_days
        found["gap_days"] = sums / (np.bincount(had[repeated], times, size) + 3)
    table = np.column_stack([found[name] for name in STATISTICS]).astype(np.float32)
    table[total == 0] = 0
    return table, gap_days


def _mean(index: Ints, values: NDArray[np.generic], size: int) -> NDArray[np.float64]:
    counts = np.bincount(index, minlength=size)
    means: NDArray[np.float64] = np.bincount(index, values, size) / np.maximum(counts, 1)
    return means


def popular_items(events: Events, now: int) -> NDArray[np.int32]:
    """Items by falling number of events; with times an event counts half after 28 days."""
    weight = None
    if events.has_times:
        weight = 0.5 ** ((now - events.timestamp) / (28 * DAY))
    count = np.bincount(events.item, weight, len(events.item_ids))
    by = np.argsort(-count, kind="stable")
    return by[: np.count_nonzero(count > 0)].astype(np.int32)


def fit_neighbours(events: Events) -> dict[str, Neighbours]:
    """The closest items in each relation, see KINDS."""
    size = len(events.item_ids)
    total = np.bincount(events.item, minlength=size)
    baskets = _incidence(events.basket, events.item, len(events.first_of_basket) - 1, size)
    user = events.user[events.first_of_basket[:-1]]
    step = np.flatnonzero(user[1:] == user[:-1])
    before, after = baskets[step], baskets[step + 1]
    near = _near(baskets, user)
    users = _latest_per_user(events)
    counts = np.asarray(users.sum(axis=0)).ravel()
    return {
        "next": _closest(before.T.tocsr(), after, total, None),
        "previous": _closest(after.T.tocsr(), before, total, None),
        "near": _closest(baskets.T.tocsr(), near, total, None),
        "users": _closest(users.T.tocsr(), users, counts, counts),
    }


def _incidence(row: Ints, item: Ints, rows: int, items: int) -> sparse.csr_matrix:
    """(rows, items) one where a row has an item."""
    ones = np.ones(len(item), np.float32)
    matrix = sparse.csr_matrix((ones, (row, item)), shape=(rows, items))
    matrix.data[:] = 1
    return matrix


def _near(baskets: sparse.csr_matrix, user: Ints) -> sparse.csr_matrix:
    """(baskets, items) items of the same user's next NEAR baskets, nearer ones counting more."""
    size = len(user)
    rows, cols, data = [], [], []
    for distance in range(1, min(NEAR, size - 1) + 1):
        at = np.flatnonzero(user[distance:] == user[:-distance])
        rows.append(at)
        cols.append(at + distance)
        data.append(np.full(len(at), 1 / distance, np.float32))
    if not rows:
        return baskets * 0
    shift = sparse.csr_matrix(
        (np.concatenate(data), (np.concatenate(rows), np.concatenate(cols))), shape=(size, size)
    )
    return (shift @ baskets).tocsr()


def _latest_per_user(events: Events) -> sparse.csr_matrix:
    """(users, items) the last USER_ITEMS distinct items of each user."""
    groups = Groups.of(events.user * ITEMS + events.item)
    user = groups.key // ITEMS
    by = np.lexsort((-groups.last, user))
    begin = np.searchsorted(user, user)
    kept = by[np.arange(len(by)) - begin < USER_ITEMS]
    return _incidence(
        user[kept], groups.key[kept] % ITEMS, len(events.user_ids), len(events.item_ids)
    )


def _closest(
    left: sparse.csr_matrix, right: sparse.csr_matrix, chances: Ints, popularity: Ints | None
) -> Neighbours:
    """The NEIGHBOURS largest counts of each row of left @ right, other than with itself.

    share is count / chances; with `popularity`, count / sqrt(chances * popularity), the cosine,
    which then chooses instead of the count.
    """
    size = left.shape[0]
    item = np.full((size, NEIGHBOURS), -1, np.int32)
    weight, share = np.zeros((2, size, NEIGHBOURS), np.float32)
    for begin in range(0, size, BLOCK):
        block = (left[begin : begin + BLOCK] @ right).tocsr()
        row = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
        col, count = block.indices.astype(np.int64), block.data
        other = row + begin != col
        row, col, count = row[other], col[other], count[other]
        own = chances[row + begin]
        if popularity is None:
            scale = np.maximum(own, 1.0)
        else:
            scale = np.sqrt((own + 2.0) * (popularity[col] + 2.0))
        row, col, part = _largest(row, col, (count / scale).astype(np.float32), NEIGHBOURS)
        place = _place(row)
        item[row + begin, place], share[row + begin, place] = col, part
        own = chances[row + begin]
        if popularity is not None:
            own = np.sqrt((own + 2.0) * (popularity[col] + 2.0))
        weight[row + begin, place] = part * np.maximum(own, 1.0)
    return Neighbours(item, weight, share)


def _largest(row: Ints, col: Ints, value: NDArray[np.float32], count: int) -> tuple[Any, Any, Any]:
    """The largest values of each row, largest first, equal ones by column; 18 bits of each value.

    One sort of one integer for row, value and column: ten times faster than a sort by three keys.
    """
    top = np.uint32(0x7FFFFFFF) - value.view(np.uint32)  # positive floats are ordered as their bits
    key = (row << 51) | ((top >> 5).astype(np.int64) << 25) | col
    key.sort()
    key = key[_place(key >> 51) < count]
    bits = np.uint32(0x7FFFFFFF) - (((key >> 25) & 0x3FFFFFF) << 5).astype(np.uint32)
    return key >> 51, key & 0x1FFFFFF, bits.view(np.float32)


def _place(row: Ints) -> Ints:
    """0 for the first of each run of equal, ascending rows, 1 for the next, ..."""
    counts = np.bincount(row)
    place: Ints = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place


def compact(vectors: Vectors, dims: int) -> NDArray[np.float16]:
    """(items, dims) principal axes of the text vectors, unit length; zeros stay zeros."""
    present = np.abs(vectors).max(axis=1, initial=0) > 0
    texts = np.zeros((len(vectors), min(dims, vectors.shape[1])), np.float32)
    if present.any():
        unique = np.unique(vectors[present], axis=0)
        mean = unique.mean(axis=0)
        _, axes = np.linalg.eigh((unique - mean).T @ (unique - mean))
        turned = (vectors[present] - mean) @ axes[:, ::-1][:, : texts.shape[1]]
        norm = np.linalg.norm(turned, axis=1, keepdims=True)
        texts[present] = turned / np.maximum(norm, 1e-6)
    return texts.astype(np.float16)


def categories(texts: NDArray[np.float16], seed: int) -> NDArray[np.int32]:
    """(items,) groups of like texts by k-means, from 1; 0 without text."""
    present = np.abs(texts).max(axis=1, initial=0) > 0
    groups = np.zeros(len(texts), np.int32)
    points = np.unique(texts[present].astype(np.float32), axis=0)
    if not len(points):
        return groups
    count = int(np.clip(len(points) // 40, 1, 256))
    centres = points[np.random.default_rng(seed).choice(len(points), count, replace=False)]
    for _ in range(10):
        nearest = _nearest(points, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, points)
        norm = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norm > 0, sums / np.maximum(norm, 1e-6), centres)
    groups[present] = _nearest(texts[present].astype(np.float32), centres) + 1
    return groups


def _nearest(points: Vectors, centres: Vectors) -> Ints:
    steps = range(0, len(points), 4096)
    parts = [(points[at : at + 4096] @ centres.T).argmax(axis=1) for at in steps]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)

"""Whether one method is better than another on the same cases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
"""Of users: the ends of a 95 % interval are then good to about a fiftieth of its width."""

CELLS = 2**24
"""Numbers in memory at once."""


def paired_bootstrap(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    groups: NDArray[np.int64],
    seed: int,
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """Mean of a - b with its 95 % interval (percentiles of a bootstrap over groups).

    Whole groups are drawn, with replacement, because a user's cases are alike: as if they were
    independent, the interval would be too narrow (Field and Welsh, 2007, "Bootstrapping clustered
    data"). A group weighs as many cases as it has.

    Args:
        a: (cases,) what one method gained on each case.
        b: (cases,) the other on the same ones.
        groups: (cases,) the user of each.
        seed: of the draws.
        draws: how many.

    Returns:
        (mean, low, high); low > 0: a is better beyond chance.

    Raises:
        ValueError: there are no cases, or the arrays differ in length.
    """
    _check(a, b, groups)
    gain = np.stack([a - b, np.ones(len(a))], axis=1)
    return _interval(gain, groups, lambda sums: sums[..., 0] / sums[..., 1], seed, draws)


def paired_macro_f1(
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    true: NDArray[np.int64],
    groups: NDArray[np.int64],
    seed: int,
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """The same for the difference of macro F1, over the classes that occur in `true`.

    Args:
        a: (cases,) class that one method named for each case.
        b: (cases,) the other.
        true: (cases,) the class that it is; negative: none of those that are counted.
        groups: see paired_bootstrap, for raised errors too.
        seed: of the draws.
        draws: how many.
    """
    _check(a, b, groups)
    classes = np.unique(true[true >= 0])
    of = true[:, None] == classes
    counts = [
        part
        for named in (a[:, None] == classes, b[:, None] == classes)
        for part in (named & of, named.astype(np.int64) + of)
    ]

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        hits_a, size_a, hits_b, size_b = np.split(sums, 4, axis=-1)
        f1_a, f1_b = 2 * hits_a / np.maximum(size_a, 1), 2 * hits_b / np.maximum(size_b, 1)
        gained: NDArray[np.float64] = (f1_a - f1_b).mean(axis=-1)
        return gained

    return _interval(np.concatenate(counts, axis=1), groups, difference, seed, draws)


def _check(*columns: NDArray[np.generic]) -> None:
    lengths = [len(column) for column in columns]
    if not lengths[0] or len(set(lengths)) > 1:
        raise ValueError(f"{', '.join(map(str, lengths))} cases cannot be paired")


def _interval(
    cases: NDArray[np.generic],
    groups: NDArray[np.int64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int,
    draws: int,
) -> tuple[float, float, float]:
    """A statistic of column sums with its interval.

    Args:
        cases: (cases, columns).
        groups: (cases,).
        statistic: from sums (..., columns) to (...).
        seed: of the draws.
        draws: how many.
    """
    names, group = np.unique(groups, return_inverse=True)
    count = len(names)
    sums = np.zeros((count, cases.shape[1]))
    np.add.at(sums, group, cases)
    rng = np.random.default_rng(seed)
    found: list[NDArray[np.float64]] = []
    step = max(1, CELLS // count)
    for begin in range(0, draws, step):
        shape = (min(step, draws - begin), count)
        # How often each group is drawn, as a matrix product wants it.
        drawn = rng.integers(count, size=shape) + count * np.arange(shape[0])[:, None]
        times = np.bincount(drawn.ravel(), minlength=shape[0] * count).reshape(shape)
        found.append(statistic(times @ sums))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(statistic(sums.sum(axis=0))), float(low), float(high)

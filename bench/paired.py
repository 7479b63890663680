"""Whether one method is better than another on the same cases."""

from __future__ import annotations

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
    if not len(a) or not len(a) == len(b) == len(groups):
        raise ValueError(f"{len(a)}, {len(b)} and {len(groups)} cases cannot be paired")
    names, group = np.unique(groups, return_inverse=True)
    count = len(names)
    size = np.bincount(group, minlength=count).astype(np.float64)
    gain = np.bincount(group, a - b, minlength=count)
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    step = max(1, CELLS // count)
    for begin in range(0, draws, step):
        shape = (min(step, draws - begin), count)
        drawn = rng.integers(count, size=shape)
        means.append(gain[drawn].sum(axis=1) / size[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(gain.sum() / size.sum()), float(low), float(high)

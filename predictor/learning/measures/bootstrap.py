"""How far measures are to be trusted: intervals, and whether one method is better than another.

Users are drawn with replacement, not cases, because a user's cases are alike: as if they were
independent, intervals would be too narrow (Field and Welsh, 2007, "Bootstrapping clustered data").
A user weighs as many cases as they have. All measures get the same draws, so that the difference
of two methods is paired: what is hard for both makes no noise in it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from predictor.models.history import NONE, Ints

Doubles = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)

DRAWS = 2_000
"""Of users: the ends of a 95 % interval are then good to about a fiftieth of its width."""

CELLS = 2**22
"""Numbers in memory at once."""


@dataclass(frozen=True)
class Measure:
    """A measure that is a function of sums over cases."""

    cases: Any
    """(cases, columns) an array, or a sparse one."""
    value: Callable[[Doubles], Doubles]
    """From sums (..., columns) to the measure (...)."""


def mean(values: NDArray[Any], counted: NDArray[np.bool_] | None = None) -> Measure:
    """The mean of values (cases,), over those that are counted."""
    weights = np.ones(len(values)) if counted is None else counted.astype(np.float64)
    return Measure(
        np.stack([np.where(weights > 0, values, 0), weights], axis=1),
        lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1),
    )


def macro_f1(predicted: Ints, true: Ints, types: int) -> Measure:
    """Mean F1 over the types that occur or are predicted, as type_metrics has it.

    Args:
        predicted: (cases,) the type that was named.
        true: (cases,) the one that came; negative: none of them.
        types: how many there are.
    """
    right = np.where(predicted == true, true, NONE)
    either = _one_hot(predicted, types) + _one_hot(true, types)

    def value(sums: Doubles) -> Doubles:
        hits, sizes = np.split(sums, 2, axis=-1)
        f1 = 2 * hits / np.maximum(sizes, 1)
        found: Doubles = f1.sum(axis=-1) / np.maximum((sizes > 0).sum(axis=-1), 1)
        return found

    return Measure(sparse.hstack([_one_hot(right, types), either]).tocsr(), value)


def _one_hot(codes: Ints, types: int) -> sparse.csr_matrix:
    """(cases, types); nothing where a code is negative."""
    row = np.flatnonzero(codes >= 0)
    return sparse.csr_matrix((np.ones(len(row)), (row, codes[row])), (len(codes), types))


class Difference(NamedTuple):
    """One method less another, on the same cases."""

    value: float
    low: float
    high: float
    """The 95 % interval: percentiles of the draws."""
    p: float
    """Of a two-sided test that there is none: the interval that just holds 0 covers 1 - p."""


@dataclass(frozen=True)
class Resampled:
    """A measure, and what it is when users are drawn."""

    value: float
    draws: Doubles
    """(draws,)."""
    users: int

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    def minus(self, other: Resampled) -> Difference:
        """The paired difference to what was resampled together with this."""
        gain = self.draws - other.draws
        tail = 1 + min(int((gain <= 0).sum()), int((gain >= 0).sum()))
        # n users cannot be surer than n coins that all fall alike.
        p = max(2 * tail / (len(gain) + 1), 2.0 ** (1 - self.users))
        low, high = np.quantile(gain, [0.025, 0.975])
        return Difference(self.value - other.value, float(low), float(high), min(1.0, p))


def resample(
    measures: Mapping[Name, Measure], users: Ints, seed: int, draws: int = DRAWS
) -> dict[Name, Resampled]:
    """Measures of the same cases, all with the same draws of users.

    Args:
        measures: by name.
        users: (cases,) whose each case is.
        seed: of the draws.
        draws: how many.

    Raises:
        ValueError: there are no cases, or a measure has another number of them.
    """
    lengths = {len(users)} | {measure.cases.shape[0] for measure in measures.values()}
    if lengths == {0} or len(lengths) > 1:
        raise ValueError(f"{sorted(lengths)} cases cannot be paired")
    names, user = np.unique(users, return_inverse=True)
    count = len(names)
    # (users, cases): a product with it sums over each user's cases.
    own = sparse.csr_matrix((np.ones(len(user)), (user, np.arange(len(user)))))
    sums = {name: _dense(own @ measure.cases) for name, measure in measures.items()}
    found: dict[Name, list[Doubles]] = {name: [] for name in measures}
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // count)
    for begin in range(0, draws, step):
        shape = (min(step, draws - begin), count)
        # How often each user is drawn, as a matrix product wants it.
        drawn = rng.integers(count, size=shape) + count * np.arange(shape[0])[:, None]
        times = np.bincount(drawn.ravel(), minlength=shape[0] * count).reshape(shape)
        times = times.astype(np.float64)
        for name, measure in measures.items():
            found[name].append(measure.value(times @ sums[name]))
    return {
        name: Resampled(
            float(measure.value(sums[name].sum(axis=0))), np.concatenate(found[name]), count
        )
        for name, measure in measures.items()
    }


def _dense(sums: Any) -> Doubles:
    dense: Doubles = sums.toarray() if sparse.issparse(sums) else sums
    return dense


def holm(p: Mapping[Name, float]) -> dict[Name, float]:
    """p values of several tests such that with 0.05 all of them together err that rarely.

    After Holm, 1979 ("A simple sequentially rejective multiple test procedure").
    """
    adjusted: dict[Name, float] = {}
    highest = 0.0
    for at, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - at) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}

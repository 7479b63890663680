"""How far measures are to be trusted: intervals, and whether one method is better than another.

Users are drawn with replacement, not cases, because a user's cases are alike: as if they were
independent, intervals would be too narrow (Field and Welsh, 2007, "Bootstrapping clustered data").
A user weighs as many cases as they have. All measures get the same draws, so that the difference
of two methods is paired: what is hard for both makes no noise in it.

A draw is a weight for each user: how often they were drawn. Nothing is copied, since all measures
here follow from sums over users' cases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]

from predictor.learning.measures.metrics import Floats
from predictor.learning.measures.type_metrics import calibration_gaps
from predictor.models.history import NONE, Ints

Doubles = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)

DRAWS = 2_000
"""Of users: the ends of a 95 % interval are then good to about a fiftieth of its width."""

CELLS = 2**22
"""Numbers in memory at once."""

WORK = 4 * 10**9
"""Numbers that the draws of wide measures handle, all together, at most: about 20 s on one core."""

FEWEST_DRAWS = 200
"""Of these measures, whatever they cost: 5 lie beyond either end of the interval."""

WIDE = 0.1
"""Share of numbers that are not zero below which sums are kept sparse."""


@dataclass(frozen=True)
class Measure:
    """A measure that is a function of sums over cases."""

    cases: Any
    """(cases, columns) an array, or a sparse one."""
    value: Callable[[Doubles], Doubles]
    """From sums (..., columns) to the measure (...)."""
    grows_with_noise: bool = False
    """Whether draws are larger on average than the measure, being noisier; they are moved back."""


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


def macro_roc_auc(probabilities: Floats, true: Ints) -> Measure:
    """Mean area under the ROC curve, each type against the rest, over the types that come in some
    of the cases and not in others, as type_metrics has it; half where there is no such type.

    The area is the chance that a case in which the type came has the larger probability (Mann and
    Whitney, 1947). It follows from how many cases of either class lie at each level of the
    probability: one sort, whatever is drawn.

    Args:
        probabilities: (cases, types).
        true: (cases,) the type that came; negative: none of them.
    """
    cases = len(true)
    column, widths, begin = [], [], 0
    for code in range(probabilities.shape[1]):
        came = true == code
        level = _levels(probabilities[:, code], came)
        width = int(level.max(initial=-1)) + 1
        column.append(begin + level + width * came)
        widths.append(width)
        begin += 2 * width
    row = np.tile(np.arange(cases), len(widths))
    ones = np.ones(len(row))
    counts = sparse.csr_matrix((ones, (row, np.concatenate(column))), (cases, begin))
    return Measure(counts, lambda sums: _areas(sums, widths))


def _levels(scores: Floats, positive: NDArray[np.bool_]) -> Ints:
    """(cases,) ascending numbers of the scores, the same for what no case of the other class lies
    between."""
    _, level = np.unique(scores, return_inverse=True)
    has = [np.bincount(level[positive == one], minlength=level.max() + 1) > 0 for one in (0, 1)]
    kind = has[0] + 2 * has[1]
    begins = (np.diff(kind, prepend=0) != 0) | (kind == 3)
    found: Ints = (np.cumsum(begins) - 1)[level]
    return found


def _areas(sums: Doubles, widths: Sequence[int]) -> Doubles:
    """(...) of sums (..., columns): by type, negatives at each level, then positives."""
    total = np.zeros(sums.shape[:-1])
    types = np.zeros(sums.shape[:-1])
    begin = 0
    for width in widths:
        negative, positive = (sums[..., at : at + width] for at in (begin, begin + width))
        begin += 2 * width
        below = np.cumsum(negative, axis=-1)
        pairs = below[..., -1] * positive.sum(axis=-1)
        # Of those at its own level, a positive is above one half.
        above = np.einsum("...g,...g->...", positive, below - negative / 2)
        total += np.where(pairs > 0, above / np.maximum(pairs, 1), 0)
        types += pairs > 0
    areas: Doubles = np.where(types > 0, total / np.maximum(types, 1), 0.5)
    return areas


def calibration_error(probabilities: Floats, true: Ints) -> Measure:
    """The expected calibration error, as type_metrics has it; the groups stay those of all cases.

    A mean of absolute values grows with noise: of few cases it is not 0 of any method.

    Args:
        probabilities: (cases, types).
        true: (cases,) the type that came; negative, and left out: none of them.
    """
    known = np.flatnonzero(true >= 0)
    gap, group = calibration_gaps(probabilities[known], true[known])
    groups = int(group.max(initial=-1)) + 1
    sums = sparse.csr_matrix((gap, (known, group)), (len(true), groups))
    count = sparse.csr_matrix((np.ones(len(known)), (known, np.zeros_like(known))), (len(true), 1))
    return Measure(
        sparse.hstack([sums, count]).tocsr(),
        lambda sums: np.abs(sums[..., :-1]).sum(axis=-1) / np.maximum(sums[..., -1], 1),
        grows_with_noise=True,
    )


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
    """(draws,); of wide measures there are fewer, the first ones."""
    users: int

    @property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of the draws."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    def minus(self, other: Resampled) -> Difference:
        """The paired difference to what was resampled together with this: by the draws of both."""
        both = min(len(self.draws), len(other.draws))
        gain = self.draws[:both] - other.draws[:both]
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
    sums = {name: _compact(own @ measure.cases) for name, measure in measures.items()}
    wide = {name: of for name, of in sums.items() if sparse.issparse(of)}
    work = sum(of.nnz + of.shape[0] for of in wide.values())
    most = dict.fromkeys(sums, draws)
    most |= {name: min(draws, max(FEWEST_DRAWS, WORK // work)) for name in wide}
    found: dict[Name, list[Doubles]] = {name: [] for name in measures}
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // max(count, *(of.shape[0] for of in wide.values()), 1))
    for begin in range(0, draws, step):
        shape = (min(step, draws - begin), count)
        # How often each user is drawn, as a matrix product wants it.
        drawn = rng.integers(count, size=shape) + count * np.arange(shape[0])[:, None]
        times = np.bincount(drawn.ravel(), minlength=shape[0] * count).reshape(shape)
        times = times.astype(np.float64)
        for name, measure in measures.items():
            some = times[: max(0, most[name] - begin)]
            if len(some):
                of = sums[name]
                found[name].append(measure.value((of @ some.T).T if name in wide else some @ of))
    return {
        name: _resampled(measure, sums[name], np.concatenate(found[name]), count)
        for name, measure in measures.items()
    }


def _compact(sums: Any) -> Any:
    """(users, columns) as an array; or (columns, users) sparse, where that is far smaller."""
    if not sparse.issparse(sums):
        return sums
    few = sums.nnz < WIDE * sums.shape[0] * sums.shape[1]
    return sums.T.tocsr() if few else sums.toarray()


def _resampled(measure: Measure, sums: Any, draws: Doubles, users: int) -> Resampled:
    all_ = np.asarray(sums.sum(axis=1)).ravel() if sparse.issparse(sums) else sums.sum(axis=0)
    value = float(measure.value(all_))
    if measure.grows_with_noise:
        draws = np.maximum(draws - draws.mean() + value, 0)
    return Resampled(value, draws, users)


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

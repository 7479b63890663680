"""The forecast: each series' exponentially weighted mean rate, times a seasonal profile.

Exponential smoothing (Brown, 1959), written as the ratio of weighted events to weighted exposure,
which is the discounted Poisson-gamma filter (Harvey and Fernandes, 1989, "Time series models for
count or qualitative observations"): periods without events count like any other, so that slow
series need no rule of their own (as Croston's), and items that are no longer sold fade away (as in
Teunter, Syntetos and Babai, 2011). The seasonal profile of a series is shrunk towards that of all,
since few series have the events to show one of their own. How fast to forget is one number for all
series, chosen on held-back periods: a number for each would follow noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.stats import nbinom  # type: ignore[import-untyped]

from predictor.learning.forecasting.periods import Floats, Ints, Mask

FORGETTING = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
"""Shares of the weight that a period loses with each one after it, of which one is chosen."""

PROFILE_SEASONS = 12
"""Latest seasons that a profile is made of."""
PROFILE_EVENTS = 50.0
"""Weight of the profile of all series in that of one, in events a period of the season."""

SPREAD_FORECASTS = 20_000
"""Of which a spread is estimated, at most, for each step: two numbers need no more."""

NEW_CUTS = 8
"""Latest instants at which series without events are looked at."""
NEW_ITEMS = 20.0
"""Weight of all series in the rate of a group's new ones, in new ones."""


@dataclass(frozen=True)
class Smoothing:
    """A forecasting method."""

    forgetting: float
    season: int | None
    """Periods of a season; None: without a profile."""

    def forecast(self, counts: Floats, days: Floats, groups: Ints) -> Floats:
        """Expected events of the periods that follow.

        Args:
            counts: (series, periods) events.
            days: (periods + horizon,) length of each period, the coming ones included.
            groups: (series,) whose new members are alike.

        Returns:
            (series, horizon).
        """
        periods = counts.shape[1]
        exposure = days * self._profile(counts, len(days))  # (series or 1, periods + horizon)
        past = np.broadcast_to(exposure[:, :periods], counts.shape)
        weights = (1 - self.forgetting) ** np.arange(periods)[::-1]
        # What comes after a series' first event is what tells its rate: with the period of that
        # event it would be too high, with those before it too low.
        known = np.zeros(counts.shape, np.bool_)
        known[:, 1:] = np.cumsum(counts[:, :-1], axis=1) > 0
        seen = (past * known) @ weights
        rate = np.divide(
            (counts * known) @ weights, seen, out=np.zeros(len(counts)), where=seen > 0
        )
        begun = (seen == 0) & (counts[:, -1] > 0)  # in the last period
        rate[begun] = (counts[begun] @ weights) / np.maximum(past[begun] @ weights, 1e-12)
        expected: Floats = rate[:, None] * exposure[:, periods:]
        new = counts.sum(axis=1) == 0
        expected[new] = _expected_new(counts, days, groups, new)
        return expected

    def _profile(self, counts: Floats, length: int) -> Floats:
        """(series, length) or (1, length): mean 1 over a season."""
        if self.season is None:
            return np.ones((1, length))
        periods = counts.shape[1]
        seasons = min(PROFILE_SEASONS, periods // self.season)
        latest = counts[:, periods - seasons * self.season :]
        own = latest.reshape(len(counts), seasons, self.season).sum(axis=1)
        total = own.sum(axis=0)
        common = total / total.mean() if total.any() else np.ones(self.season)
        mixed = own + PROFILE_EVENTS * common
        profile: Floats = mixed / mixed.mean(axis=1, keepdims=True)
        return profile[:, (np.arange(length) - periods) % self.season]


def _expected_new(counts: Floats, days: Floats, groups: Ints, new: Mask) -> Floats:
    """(new, horizon) events of series without any yet: what those without any brought before.

    Per group, at each of the latest NEW_CUTS: all that had none before it, and what they brought
    within the horizon; shrunk to what all groups brought. 0 where there were none.
    """
    periods = counts.shape[1]
    horizon = len(days) - periods
    size = int(groups.max(initial=-1)) + 1
    events, exposure = np.zeros(size), np.zeros(size)
    for begin in range(max(1, periods - horizon - NEW_CUTS + 1), periods - horizon + 1):
        then = counts[:, :begin].sum(axis=1) == 0
        brought = counts[then, begin : begin + horizon].sum(axis=1)
        events += np.bincount(groups[then], brought, size)
        exposure += np.bincount(groups[then], minlength=size) * days[begin : begin + horizon].sum()
    overall = events.sum() / max(exposure.sum(), 1e-12)
    prior = NEW_ITEMS * days[periods:].sum()
    rate = (events + prior * overall) / (exposure + prior)
    expected: Floats = rate[groups[new]][:, None] * days[periods:]
    return expected


@dataclass(frozen=True)
class Spread:
    """How far counts lie from what was expected: a variance of `noise * mean + change * mean**2`.

    The first part is that of counts (1 for a Poisson distribution), the second is what the rate
    itself does: with both a count has a negative binomial distribution.
    """

    noise: tuple[float, ...]
    """(horizon,)."""
    change: tuple[float, ...]
    """(horizon,)."""

    @classmethod
    def of(cls, expected: Floats, counts: Floats) -> Spread:
        """The most likely spread of past forecasts (cuts, series, horizon)."""
        parts = []
        for step in range(expected.shape[2]):
            mean, count = expected[:, :, step].ravel(), counts[:, :, step].ravel()
            some = np.flatnonzero(mean > 0)
            some = some[:: max(1, len(some) // SPREAD_FORECASTS)]
            parts.append(_most_likely(mean[some], count[some]))
        noise, change = np.array(parts).T
        return cls(tuple(noise.tolist()), tuple(change.tolist()))

    def interval(self, expected: Floats, coverage: float) -> tuple[Floats, Floats]:
        """Ends (..., horizon) between which a count lies with this probability, or more."""
        low, high = np.zeros_like(expected), np.zeros_like(expected)
        for step, (noise, change) in enumerate(zip(self.noise, self.change, strict=True)):
            mean = expected[..., step]
            # Three digits of a mean are enough, and leave few different ones.
            digits = 10 ** (np.floor(np.log10(np.maximum(mean, 1e-12))) - 2)
            means, place = np.unique(np.round(mean / digits) * digits, return_inverse=True)
            size, share = _binomial(means, noise, change)
            for ends, quantile in ((low, 0.5 - coverage / 2), (high, 0.5 + coverage / 2)):
                counts = np.maximum(nbinom.ppf(quantile, size, share), 0)
                ends[..., step] = np.where(means > 0, counts, 0)[place].reshape(mean.shape)
        return low, high


def _binomial(mean: Floats, noise: float, change: float) -> tuple[Floats, Floats]:
    """scipy's two numbers of a negative binomial distribution."""
    mean = np.maximum(mean, 1e-12)
    beyond = np.maximum(noise - 1 + change * mean, 1e-6)  # of the variance, beyond Poisson's
    return mean / beyond, 1 / (1 + beyond)


def _most_likely(mean: Floats, count: Floats) -> tuple[float, float]:
    """(noise, change) under which the counts are most likely."""
    if not len(mean):
        return 1.0, 0.0

    def loss(logs: Floats) -> float:
        beyond, change = np.exp(np.clip(logs, -12, 8))
        return -float(nbinom.logpmf(count, *_binomial(mean, 1 + beyond, change)).sum())

    beyond, change = np.exp(np.clip(minimize(loss, np.log([0.5, 0.05]), method="Nelder-Mead",
                                             options={"maxiter": 120}).x, -12, 8))  # fmt: skip
    return 1 + float(beyond), float(change)

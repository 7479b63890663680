"""A model without recurrence: a history is summed up in numbers of fixed size, which layers read.

That is how text vectors are usually put to work: means of the events' vectors and shares of their
behavior types, both of which fade with the events' age, are the inputs of a linear model, a small
network or boosted trees. Items are found by their texts alone (Pazzani and Billsus, 2007,
"Content-based recommendation systems"): the query is the mean of the latest vectors. The last axis
of the space holds what an item has for being popular, which settles ties, and all there is to say
where a history has no vector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse  # type: ignore[import-untyped]
from torch import Tensor, nn

from foretell.vectors import Vectors
from predictor.models.history import DAY_HOURS, GAPS, HOURS, HistoryBatch, Ints
from predictor.models.sequence.encoders import NetworkConfig
from predictor.models.sequence.network import Outputs, SequenceNetwork
from predictor.models.trees import read_trees

if TYPE_CHECKING:
    import lightgbm

BAG = "bag"
"""The model type of a BagNetwork; a name may follow that tells what fitted it: `bag:logistic`."""

_TYPE = re.compile(rf"{BAG}(:[a-z0-9_]{{1,49}})?")

LATEST = 1
"""Latest vectors whose mean is the query: the best of 1 to 10 on beauty products."""

TEXT_HALF_LIVES = (4.0, 20.0)
"""Of an event, in events, in the means of vectors."""

TYPE_HALF_LIVES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, np.inf)
"""The same in the shares of types."""

GAP_HALF_LIFE = 16.0

FEW_TYPES = 8
"""Up to so many behavior types, the events of each have a mean vector of their own."""

PRIOR_EVENTS = 1.0
"""Events that the shares of training count for in a user's."""

LEAST_SHARE = 1e-6
"""Of a type, before its logarithm."""


def is_bag(config: NetworkConfig) -> bool:
    """Whether a network of this shape is a BagNetwork."""
    return _TYPE.fullmatch(config.model_type) is not None


def text_features_of(config: NetworkConfig) -> int:
    """How many numbers, the first ones, a Bag makes of the vectors of a history."""
    means = 1 + len(TEXT_HALF_LIVES)
    means += config.behavior_types if config.behavior_types <= FEW_TYPES else 0
    return means * config.dims


def features_of(config: NetworkConfig) -> int:
    """How many numbers a Bag makes of a history."""
    return _clock_at(config) + (1 + DAY_HOURS + HOURS // DAY_HOURS) * config.clock


def _clock_at(config: NetworkConfig) -> int:
    """Where the numbers of the clock begin, which are the last ones."""
    return text_features_of(config) + (2 * len(TYPE_HALF_LIVES) + 1) * config.behavior_types + 5


def log_shares_at(config: NetworkConfig, half_life: float) -> slice:
    """Which of the numbers are the logarithms of the shares of types with this half-life."""
    types = config.behavior_types
    last = _clock_at(config) - 5 - types
    begin = last - (len(TYPE_HALF_LIVES) - TYPE_HALF_LIVES.index(half_life)) * types
    return slice(begin, begin + types)


class Bag:
    """Histories summed up."""

    def __init__(
        self, batch: HistoryBatch, shares: NDArray[np.float32], *, clock: bool = False
    ) -> None:
        """Takes the usual shares (types,) of the behavior types, and whether to read the clock."""
        self._batch, self._shares, self._has_clock = batch, shares, clock
        lengths = batch.lengths
        self._row = np.repeat(np.arange(len(batch)), lengths)
        self._ends = np.cumsum(lengths)
        self._indptr = np.concatenate([[0], self._ends])
        self._tokens = np.arange(len(self._row))
        self._age = np.repeat(self._ends, lengths) - 1 - self._tokens

    def features(self) -> NDArray[np.float32]:
        """(histories, features_of)."""
        lengths = self._batch.lengths
        means = [self.latest, *(self._mean(self._fading(life)) for life in TEXT_HALF_LIVES)]
        if len(self._shares) <= FEW_TYPES:
            means += [self._mean(self._batch.types == code) for code in range(len(self._shares))]
        shares = [self._type_shares(half_life) for half_life in TYPE_HALF_LIVES]
        logs = [np.log(np.maximum(share, LEAST_SHARE)) for share in shares]
        last = np.where(lengths > 0, self._ends - 1, -1)  # the appended element
        last_type = np.append(self._batch.types, len(self._shares))[last]
        one_hot = last_type[:, None] == np.arange(len(self._shares))
        columns = [*means, *shares, *logs, one_hot, self._gaps(last), np.log1p(lengths)[:, None]]
        columns += [self._clock(last)] if self._has_clock else []
        return np.concatenate(columns, axis=1, dtype=np.float32)

    @cached_property
    def latest(self) -> Vectors:
        """(histories, dims) the mean of the LATEST vectors; zero where there is none."""
        seen = np.cumsum(self._batch.known)
        all_seen = np.append(seen, 0)[np.where(self._batch.lengths > 0, self._ends - 1, -1)]
        return self._mean(all_seen[self._row] - seen < LATEST)

    def _fading(self, half_life: float) -> NDArray[np.float64]:
        """(tokens,) 1 for the last event, half of that `half_life` events before."""
        weights: NDArray[np.float64] = np.exp2(-self._age / half_life)
        return weights

    def _mean(self, weights: NDArray[np.generic]) -> Vectors:
        """(histories, dims) weighted means of the vectors that are known."""
        some = weights * self._batch.known.astype(np.float32)
        shape = (len(self._batch), len(some))
        matrix = sparse.csr_matrix((some.astype(np.float32), self._tokens, self._indptr), shape)
        total = np.bincount(self._row, some, minlength=len(self._batch))
        mean = matrix @ self._batch.vectors / np.maximum(total, 1e-12)[:, None]
        return np.asarray(mean, dtype=np.float32)

    def _type_shares(self, half_life: float) -> NDArray[np.float64]:
        """(histories, types), drawn to the usual shares; events of unknown types do not count."""
        types = len(self._shares)
        known = self._batch.types < types
        cells = (self._row * types + self._batch.types)[known]
        size = len(self._batch) * types
        sums = np.bincount(cells, self._fading(half_life)[known], minlength=size)
        sums = sums.reshape(-1, types) + PRIOR_EVENTS * self._shares
        shares: NDArray[np.float64] = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1e-12)
        return shares

    def _gaps(self, last: Ints) -> NDArray[np.float64]:
        """(histories, 4) the last gap as a number and as none or within a basket; a fading mean."""
        weights = self._fading(GAP_HALF_LIFE)
        rows = len(self._batch)
        sums = np.bincount(self._row, weights * self._batch.gaps, minlength=rows)
        mean = sums / np.maximum(np.bincount(self._row, weights, minlength=rows), 1e-12)
        gap = np.append(self._batch.gaps, 0)[last]
        return np.stack([gap / GAPS, gap == 0, gap == 1, mean / GAPS], axis=1)

    def _clock(self, last: Ints) -> NDArray[np.float64]:
        """(histories, 32) of the last event: hour of the day as a number, and as one of 24; day of
        the week as one of 7. Zero where there is none."""
        hours = np.append(self._batch.hours, 0)[last][:, None]
        hour, day = hours % DAY_HOURS, hours // DAY_HOURS
        of_day, of_week = hour == np.arange(DAY_HOURS), day == np.arange(HOURS // DAY_HOURS)
        clock = np.concatenate([hour / DAY_HOURS, of_day, of_week], axis=1)
        return np.where(last[:, None] < 0, 0.0, clock)


class BagNetwork(nn.Module):
    """Affine layers with rectifiers between them, over a Bag; boosted trees beside, where given.

    `layers` of the config says how many hidden ones there are, of the width `hidden`; with none
    the model is linear. Scores of trees are added to what the layers say.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        types = config.behavior_types
        sizes = [features_of(config), *[config.hidden] * config.layers, types]
        self.affine = cast(
            Sequence[nn.Linear], nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        )
        self.start = nn.Parameter(torch.zeros(types))
        self.log_shares = nn.Parameter(torch.zeros(types))
        self.log_gap = nn.Parameter(torch.zeros(1))
        self.trees = ""
        """In LightGBM's text format."""
        self._booster: lightgbm.Booster | None = None

    def grow(self, trees: str) -> None:
        """Takes trees, checked by `check_trees`.

        Raises:
            ValueError: they do not read these features, or not tell these types apart.
        """
        booster = read_trees(trees)
        found = booster.num_feature(), booster.num_model_per_iteration()
        want = features_of(self.config), self.config.behavior_types
        if found != want:
            raise ValueError(f"trees of {found} (features, types); this program has {want}")
        self.trees, self._booster = trees, booster

    def bag(self, batch: HistoryBatch) -> Bag:
        """What is read of histories."""
        shares = self.log_shares.detach().softmax(0).numpy()
        return Bag(batch, shares, clock=self.config.clock)

    def forward(self, features: Tensor) -> Tensor:
        """(rows, behavior_types) what the layers say of (rows, features_of)."""
        *hidden, last = self.affine
        for layer in hidden:
            features = layer(features).relu()
        logits: Tensor = last(features)
        return logits

    @torch.inference_mode()
    def predict(self, batch: HistoryBatch) -> Outputs:
        """See SequenceModel. After an empty history comes what `start` says."""
        bag = self.bag(batch)
        features = bag.features()
        logits = self(torch.from_numpy(features)).numpy()
        if self._booster is not None and len(batch):
            scores = self._booster.predict(features, raw_score=True, num_threads=1)
            logits = logits + np.asarray(scores, np.float32)
        logits = np.where(batch.lengths[:, None] > 0, logits, self.start.numpy())
        queries = bag.latest.copy()
        queries[:, -1] = 1.0
        return Outputs(logits, queries, np.full(len(batch), float(self.log_gap), np.float32))

    def freeze(self) -> None:
        """Nothing to make faster, see SequenceNetwork."""


Network = SequenceNetwork | BagNetwork
"""What reads the histories of a version."""


def make_network(config: NetworkConfig) -> Network:
    """An untrained network of the config's model type.

    Raises:
        ValueError: there is none, or its sizes do not fit one another.
    """
    return BagNetwork(config) if is_bag(config) else SequenceNetwork(config)

"""What turns scores into probabilities: a few numbers, fitted on validation data."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

CANDIDATES = 200
"""Best scores of a history by which the level of its scores is judged: about what a caller may
want to choose from."""

Finite = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Rising = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Falling = Annotated[float, Field(ge=-1e6, le=0, allow_inf_nan=False)]


class ItemCalibration(BaseModel):
    """The probability that an item is in the user's next basket (or is that of the next event).

    Its log odds are intercept + score * (s - Z) + log_partition * Z + log_rank * log(r), where s is
    the item's score, Z the logarithm of the sum of exp over the CANDIDATES best scores of the
    history, and r the item's rank among them. (0, 1, 0, 0) is about a softmax over the candidates;
    the others make room for baskets of several items, and for next items that are no candidate.
    Within one history a higher score never gets a lower probability.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    intercept: Finite = 0.0
    score: Rising = 1.0
    log_partition: Finite = 0.0
    log_rank: Falling = 0.0

    def probabilities(
        self, scores: NDArray[np.float32], candidates: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Of scores (..., n); they need not be sorted, and -inf stands for no item: 0.

        Args:
            scores: of one history or of several.
            candidates: (..., m) the scores of the histories' best items by which Z and r are
                found, where `scores` are of others, as in Rank; None: the scores themselves.
        """
        judged = scores if candidates is None else candidates
        if not judged.shape[-1] or not scores.shape[-1]:
            return np.zeros_like(scores)
        best = judged.astype(np.float64)
        if best.shape[-1] > CANDIDATES:
            best = np.partition(best, -CANDIDATES, axis=-1)[..., -CANDIDATES:]
        level = log_partition(best)
        some = np.isfinite(scores)
        odds = (
            self.intercept
            + self.score * (np.where(some, scores, level) - level)
            + self.log_partition * level
        )
        if self.log_rank:
            odds += self.log_rank * np.log(_ranks(scores, best))
        # Beyond 500 either way float64 says 0 or 1 anyway.
        likely = 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
        return np.where(some, likely, 0).astype(np.float32)


def log_partition(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 1) log of the sum of exp over the last axis; 0 where no score is finite."""
    highest = scores.max(axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    summed = np.exp(scores - highest).sum(axis=-1, keepdims=True)
    level: NDArray[np.float64] = highest + np.log(np.where(summed > 0, summed, 1))
    return level


def _ranks(scores: NDArray[np.float32], best: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank from 1 of each score (..., n) among others (..., m): one more than are higher."""
    both = np.concatenate([scores.astype(np.float64), best], axis=-1)
    # Stable, and the scores come first: of equal ones, none counts as higher.
    by = np.argsort(-both, axis=-1, kind="stable")
    higher = np.cumsum(by >= scores.shape[-1], axis=-1)
    ranks = np.empty(both.shape)
    np.put_along_axis(ranks, by, 1.0 + higher, axis=-1)
    return ranks[..., : scores.shape[-1]]


def softmax(scores: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Row-wise softmax of scores / temperature, safe for large scores."""
    if not scores.shape[-1]:
        return scores
    scaled = scores.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    out: NDArray[np.float32] = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(
        np.float32
    )
    return out


class TypeCalibration(BaseModel):
    """Type probabilities are softmax((logits + biases) / temperature).

    Vector scaling with one scale (Guo et al., 2017). For a model that gives probabilities, the
    logits are their logarithms.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    biases: tuple[Finite, ...]
    """One for each type."""

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """(rows, types), rows sum to 1."""
        return softmax(logits + np.array(self.biases, np.float32), self.temperature)

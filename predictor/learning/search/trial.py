"""One trial: settings are fitted on every fold's training part and measured on what it left out.

The score of a fold is that of its best epoch, chosen on the very targets that it is measured on, as
`train` chooses on its validation part: a little too good, alike for all trials.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from foretell.errors import InvalidArgumentError
from predictor.learning.search.folds import Fold
from predictor.learning.sequence.fitting import Epoch
from predictor.learning.sequence.recipe import FitConfig, resolve
from predictor.learning.sequence.training import fit_sequence
from predictor.learning.sources import Dataset


@dataclass(frozen=True)
class Metric:
    """What fits are scored by."""

    name: str
    """As in metrics.json."""
    sign: int
    """1 where more is better, -1 where less is; a score is sign * value."""


NDCG = Metric("ndcg_at_10", 1)
LOG_LOSS = Metric("type_log_loss", -1)


class NotFinite(Exception):
    """The fit diverged: its score or a loss is no number."""


@dataclass
class Result:
    """What was measured so far, a number for each fold that is done."""

    metric: Metric | None = None
    scores: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    """The best of each."""
    seconds: float = 0.0


Watch = Callable[[int, float], None]
"""Called after each epoch with its number among those of all folds (from 0) and what the trial's
score is by then; may raise, which ends the trial."""


def epochs_of(config: FitConfig, folds: Sequence[Fold]) -> list[int]:
    """At most as many, in each fold.

    Raises:
        InvalidArgumentError: the settings do not fit together.
    """
    return [resolve(config, fold.part.train).epochs for fold in folds]


def measure(
    dataset: Dataset,
    folds: Sequence[Fold],
    config: FitConfig,
    result: Result,
    watch: Watch,
    *,
    exclude_history: bool,
) -> None:
    """Fits on one fold after the other, and fills the result.

    Args:
        dataset: what the folds divide.
        folds: at least one.
        config: the settings.
        result: an empty one; it holds what is done where `watch` raises.
        watch: see Watch.
        exclude_history: whether items of a user's own history are no answers.

    Raises:
        InvalidArgumentError: the settings do not fit together, or a fold has nothing to measure.
        NotFinite: it diverged.
    """
    begin = time.monotonic()
    before = 0
    for fold, most in zip(folds, epochs_of(config, folds), strict=True):
        best = -math.inf

        def stop(epoch: Epoch, fold: Fold = fold, before: int = before) -> bool:
            nonlocal best
            result.metric = _metric(epoch, fold, result.metric)
            losses = (epoch.item_loss, epoch.type_loss, epoch.gap_loss)
            if not all(map(math.isfinite, (epoch.score, *losses))):
                raise NotFinite
            best = max(best, epoch.score)
            result.seconds = time.monotonic() - begin
            done = [*result.scores, best]
            watch(before + epoch.epoch - 1, sum(done) / len(done))
            return False

        fitted = fit_sequence(
            dataset, fold.part, config, exclude_history=exclude_history, progress=False, stop=stop
        )
        chosen = max(fitted.curve, key=lambda epoch: epoch.score)
        result.scores.append(chosen.score)
        result.epochs.append(chosen.epoch)
        result.seconds = time.monotonic() - begin
        before += most


def _metric(epoch: Epoch, fold: Fold, expected: Metric | None) -> Metric:
    """What the epoch was scored by, see `fit_sequence`; all folds must be measured by the same."""
    if NDCG.name in epoch.validation:
        found = NDCG
    elif LOG_LOSS.name in epoch.validation:
        found = LOG_LOSS
    else:
        raise InvalidArgumentError(
            f"fold {fold.name} has neither items nor behavior types to measure",
            reason="NOTHING_TO_MEASURE", field="events",
        )  # fmt: skip
    if expected not in (None, found):
        raise InvalidArgumentError(
            f"fold {fold.name} has no {'items' if found is LOG_LOSS else 'types'} to measure, the "
            "others have: fewer folds are needed",
            reason="NOTHING_TO_MEASURE", field="folds",
        )  # fmt: skip
    return found

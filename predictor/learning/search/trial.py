"""One trial: settings are fitted on every fold's training part and measured on what it left out.

The score of a sequence model is that of its best epoch, chosen on the very targets that it is
measured on, as `train` chooses on its validation part: a little too good, alike for all trials. So
it is with what a classic model chooses and is calibrated by.

Sequence models are scored by NDCG@10 where there are items, else by the types' log loss. Classic
models always by the latter: they learn types, and the items beside these, found by texts, are the
same whatever most of their settings are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from foretell.errors import InvalidArgumentError
from predictor.learning.classic.recipe import CLASSIC, resolve_classic
from predictor.learning.measures.calibration import fit_type_calibration
from predictor.learning.measures.evaluation import outputs
from predictor.learning.measures.type_metrics import losses
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
    """The best of each, or rounds of trees; none where the model has no such."""
    seconds: float = 0.0


Watch = Callable[[int, float], None]
"""Called after each step with its number among those of all folds (from 0) and what the trial's
score is by then; may raise, which ends the trial."""


def steps_of(dataset: Dataset, folds: Sequence[Fold], config: FitConfig) -> list[int]:
    """Of each fold: its epochs, at most; of a classic model one, which is fitted as a whole.

    Raises:
        InvalidArgumentError: the settings do not fit together.
    """
    if config.model_type not in CLASSIC:
        return [resolve(config, fold.part.train).epochs for fold in folds]
    for fold in folds:
        resolve_classic(config, dataset, fold.part.train)
    return [1] * len(folds)


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
    for fold, most in zip(folds, steps_of(dataset, folds, config), strict=True):

        def tell(step: int, score: float, before: int = before) -> None:
            result.seconds = time.monotonic() - begin
            done = [*result.scores, score]
            watch(before + step, sum(done) / len(done))

        if config.model_type in CLASSIC:
            _classic(dataset, fold, config, result, tell)
        else:
            _sequence(dataset, fold, config, result, tell, exclude_history=exclude_history)
        result.seconds = time.monotonic() - begin
        before += most


def _sequence(
    dataset: Dataset, fold: Fold, config: FitConfig, result: Result, tell: Watch, *,
    exclude_history: bool,
) -> None:  # fmt: skip
    """Fits and measures on one fold."""
    best = -math.inf

    def stop(epoch: Epoch) -> bool:
        nonlocal best
        result.metric = _metric(epoch, fold, result.metric)
        losses = (epoch.item_loss, epoch.type_loss, epoch.gap_loss)
        if not all(map(math.isfinite, (epoch.score, *losses))):
            raise NotFinite
        best = max(best, epoch.score)
        tell(epoch.epoch - 1, best)
        return False

    fitted = fit_sequence(
        dataset, fold.part, config, exclude_history=exclude_history, progress=False, stop=stop
    )
    chosen = max(fitted.curve, key=lambda epoch: epoch.score)
    result.scores.append(chosen.score)
    result.epochs.append(chosen.epoch)


def _classic(dataset: Dataset, fold: Fold, config: FitConfig, result: Result, tell: Watch) -> None:
    """The same, of the types as the version would answer them."""
    # It needs other libraries than sequence models do.
    from predictor.learning.classic.fitting import fit_classic

    targets = fold.part.validation
    lines = targets.type >= 0
    if not lines.any():
        raise InvalidArgumentError(
            f"fold {fold.name} has no behavior types to measure that its training part knows",
            reason="NOTHING_TO_MEASURE", field="events",
        )  # fmt: skip
    fitted = fit_classic(dataset, fold.part, config)
    found = outputs(fitted.network, targets, fitted.space, fitted.recipe.history_length)
    logits, true = found.type_logits[targets.row[lines]], targets.type[lines]
    _, surprises = losses(fit_type_calibration(logits, true).probabilities(logits), true)
    score = -float(surprises.mean())
    if not math.isfinite(score):
        raise NotFinite
    result.metric = LOG_LOSS
    tell(0, score)
    result.scores.append(score)
    chosen = fitted.recipe.chosen
    result.epochs += [int(chosen[name]) for name in ("epochs", "rounds") if name in chosen]


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

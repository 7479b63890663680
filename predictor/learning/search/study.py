"""The trials of a search, kept in a directory: Optuna's study in SQLite.

What is suggested next goes by the seed and by the trials that are finished, and by nothing else:
the sampler begins anew for each, with a seed of its own. Settings that were tried are not tried
again: a fit is the same each time. So a search that was killed, by whatever,
is continued by the same command as if nothing had happened; the trial that was running is run from
its beginning, with the same settings. This holds on the same machine with the same versions and
threads: elsewhere scores differ in their last digits, and so may what TPE makes of them. Optuna
promises no equal suggestions between its versions.

TPE is Bergstra et al. (2011), "Algorithms for hyper-parameter optimization". A trial is pruned
where its score so far is below the median of the others' at the same step (Golovin et al., 2017,
"Google Vizier", section 3.2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from foretell.errors import FailedPreconditionError, InvalidArgumentError
from predictor.learning.search.space import Setting, Space, applies

SamplerKind = Literal["tpe", "random"]
SAMPLERS: tuple[SamplerKind, ...] = get_args(SamplerKind)

FILE = "study.db"

UNPRUNED = 5
"""Trials that are run to their end before others are compared with them."""

DRAWS = 500
"""Of settings, until some are new: few choices repeat themselves. The last among a hundred is
found by 99 searches in 100."""

TRIES = 3
"""Of a trial that ends the process, as too little memory does, until it counts as pruned."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Makes a directory this process's for the block.

    Raises:
        FailedPreconditionError: another search runs in it, or it cannot be made.
        InvalidArgumentError: it holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FailedPreconditionError(
            f"{folder} cannot be written: {error.strerror}", reason="OUT_READ_ONLY", field="out"
        ) from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPreconditionError(
                f"another search is running in {folder}", reason="SEARCH_RUNS", field="out"
            ) from None
        if not (folder / FILE).exists() and any(folder.iterdir()):
            raise InvalidArgumentError(
                f"{folder} holds something else than a search", reason="NO_SEARCH", field="out"
            )
        yield
    finally:
        os.close(held)


class Study:
    """The trials in a directory that this process owns."""

    def __init__(
        self, folder: Path, space: Space, start: Mapping[str, Setting], *, sampler: SamplerKind,
        seed: int, warm_up: int,
    ) -> None:  # fmt: skip
        """Opens it, or makes it.

        Args:
            folder: see `owned`.
            space: what trials choose from.
            start: what the first trial has.
            sampler: how the others choose.
            seed: of all choices.
            warm_up: steps of a trial in which it is not pruned.

        Raises:
            InvalidArgumentError: the file there is no study of Optuna's, or of another version.
        """
        self._space, self._start, self._kind, self._seed = space, dict(start), sampler, seed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(UNPRUNED, warm_up)
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{folder / FILE}", study_name="search", direction="maximize",
                load_if_exists=True, pruner=pruner,
            )  # fmt: skip
        except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"{folder / FILE} cannot be read: {str(error).splitlines()[0]}",
                reason="NO_SEARCH", field="out",
            ) from None  # fmt: skip
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Of a process that was killed: no other has the directory.
            self._study.tell(trial.number, state=TrialState.FAIL)

    def claim(self, setup: dict[str, Any]) -> None:
        """Notes what is searched, or checks that it is what was searched here before.

        Raises:
            InvalidArgumentError: it is not.
        """
        known = self._study.user_attrs.setdefault("setup", setup)
        other = [name for name in setup if known.get(name) != setup[name]]
        if other:
            raise InvalidArgumentError(
                f"a search with another {' and '.join(other)} is in that directory: give the "
                "options that it was begun with, or another --out",
                reason="OTHER_SEARCH", field="out",
            )  # fmt: skip
        self._study.set_user_attr("setup", setup)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that were run to their end or pruned, in their order."""
        return self._study.get_trials(deepcopy=False, states=FINISHED)

    def ask(self) -> Trial | None:
        """The next trial, whose settings none of the finished ones had; None: no such was drawn."""
        finished = self.finished
        known = [trial.params for trial in finished]
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not finished and not waiting:
            self._study.enqueue_trial(self._start)
        self._study.sampler = _sampler(self._kind, self._seed, len(finished))
        trial = self._chosen(self._study.ask())
        if trial.params not in known:
            return trial
        # The sampler insists on what it has seen: chance goes on.
        self._study.tell(trial.number, state=TrialState.FAIL)
        drawn = optuna.create_study(sampler=_sampler("random", self._seed, len(finished)))
        for _ in range(DRAWS):
            params = self._chosen(drawn.ask()).params
            if params not in known:
                self._study.enqueue_trial(params)
                return self._chosen(self._study.ask())
        return None

    def _chosen(self, trial: Trial) -> Trial:
        """With settings, as far as they have an effect."""
        for name, distribution in self._space.items():
            if applies(name, trial.params):
                _suggest(trial, name, distribution)
        return trial

    def ended_the_process(self, trial: Trial) -> bool:
        """Whether these settings have ended it so often that they will again."""
        failed = self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        same = [one for one in failed if one.params == trial.params]
        return sum("interrupted" not in one.user_attrs for one in same) >= TRIES

    def complete(self, trial: Trial, score: float) -> None:
        """The trial was measured."""
        self._study.tell(trial, score)

    def prune(self, trial: Trial, why: str) -> None:
        """The trial was given up, and counts."""
        trial.set_user_attr("why", why)
        self._study.tell(trial, state=TrialState.PRUNED)

    def drop(self, trial: Trial) -> None:
        """The trial was interrupted: it does not count, and is run again."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # it came too late
            trial.set_user_attr("interrupted", True)
            self._study.tell(trial, state=TrialState.FAIL)

    def importances(self) -> dict[str, float]:
        """Shares of the variance of scores that settings explain, the largest first.

        By fANOVA (Hutter et al., 2014) on a forest; empty where trials are too few or all alike.
        """
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len({trial.value for trial in complete}) < 4:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    """Lets the trial choose one of its settings."""
    match distribution:
        case CategoricalDistribution():
            trial.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        case FloatDistribution():
            trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _sampler(kind: SamplerKind, seed: int, done: int) -> BaseSampler:
    """One for the trial that follows `done` others."""
    own = int(np.random.SeedSequence(seed, spawn_key=(done,)).generate_state(1)[0])
    return RandomSampler(own) if kind == "random" else TPESampler(seed=own)

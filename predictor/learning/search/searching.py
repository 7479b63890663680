"""The search: trials one after the other, and after each of them the files for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import distribution_to_json
from optuna.trial import Trial
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from foretell.errors import FailedPreconditionError, InvalidArgumentError
from predictor.learning import training
from predictor.learning.classic.recipe import CLASSIC, resolve_classic
from predictor.learning.data import repeat_share
from predictor.learning.measures.evaluation import REPEATS
from predictor.learning.search import pictures, results
from predictor.learning.search.folds import Fold, FoldKind, default_folds, make_folds
from predictor.learning.search.space import Setting, Space, models_of, space_of, start_of
from predictor.learning.search.study import SamplerKind, Study, owned
from predictor.learning.search.trial import NotFinite, Result, measure, steps_of
from predictor.learning.sequence import config_file
from predictor.learning.sequence.recipe import FitConfig, resolve
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split

BEST = "best.toml"
REPORT = "search.json"


@dataclass(frozen=True)
class Plan:
    """What to search, and how long."""

    trials: int = 20
    """Finished ones, those of earlier runs in the same directory among them."""
    sampler: SamplerKind = "tpe"
    folds: int = 3
    folds_by: FoldKind | None = None
    """None: `default_folds`."""
    models: Sequence[str] = ()
    """Models to choose from, see `models_of`; none: the one that the configuration says, or the
    data."""
    tune: Sequence[str] | None = None
    """Fields to choose; None: all but INPUTS that have an effect and that the configuration leaves
    open."""
    budget_s: float | None = None
    """Seconds after which no trial is begun; None: no limit."""


@dataclass(frozen=True)
class Job:
    """What all trials share."""

    dataset: Dataset
    folds: Sequence[Fold]
    fixed: FitConfig
    exclude_history: bool
    space: Space
    start: dict[str, Setting]
    """Of the space: what the first trial has."""
    warm_up: int
    """Steps of a trial in which it is not pruned."""

    @property
    def unit(self) -> str:
        """Of the steps."""
        return "folds" if self.fixed.model_type in CLASSIC else "epochs"


def search(
    dataset: Dataset,
    out: Path,
    *,
    plan: Plan,
    protocol: Protocol | None = None,
    fixed: FitConfig | None = None,
    command: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Searches the settings with which training and validation parts are learned best.

    Args:
        dataset: events with vectors.
        out: the directory to write, or to continue: the study, `best.toml`, `search.json`, plots.
        plan: what to search.
        protocol: how `train` divides the events; its test part is not looked at.
        fixed: settings that are not searched; the first trial has them, and else the defaults.
        command: to be named in best.toml.
        progress: whether to show a bar and a line for each trial on the standard error.

    Returns:
        what search.json holds.

    Raises:
        InvalidArgumentError: the data or the options give nothing to search, or `out` holds a
            search of something else.
        FailedPreconditionError: `out` cannot be written, or another search runs there.
        KeyboardInterrupt: the search was interrupted; its message says what is kept.
    """
    protocol = protocol or Protocol()
    fixed = replace(fixed or FitConfig(), seed=protocol.seed)
    final = training.divide(dataset, protocol)
    kind = plan.folds_by or default_folds(dataset.events)
    folds = make_folds(final, protocol, kind, plan.folds)
    job = _job(dataset, folds, final, fixed, plan)
    setup = {
        "data": dataset.lineage,
        "encoder": dataset.encoder.model_dump(),
        "protocol": asdict(protocol),
        "folds_by": kind,
        "folds": [fold.name for fold in folds],
        "sampler": plan.sampler,
        "fixed": {name: value for name, value in asdict(fixed).items() if value is not None},
        "space": {name: json.loads(distribution_to_json(of)) for name, of in job.space.items()},
    }
    with owned(out):
        try:
            return _run(job, out, plan, setup, command, progress=progress)
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, OSError) as error:
            raise FailedPreconditionError(
                f"{out} cannot be written: {error}", reason="OUT_READ_ONLY", field="out"
            ) from None


def _job(
    dataset: Dataset, folds: Sequence[Fold], final: Split, fixed: FitConfig, plan: Plan
) -> Job:
    models = models_of(fixed, plan.models)
    given = [replace(fixed, model_type=model) for model in models]
    if models and models[0] in CLASSIC:
        fixed, warm_up = given[0], 1
        classic = [resolve_classic(one, dataset, final.train) for one in given]
        space = space_of(dataset, classic, fixed, models, plan.tune)
        start = start_of(space, classic[0], fixed)
    else:
        recipe = resolve(replace(fixed, model_type=None) if plan.models else fixed, final.train)
        if models:
            # The first trial has the default encoder where it is among them.
            model = recipe.model_type if recipe.model_type in models else models[0]
            fixed = replace(fixed, model_type=model)
            recipe = resolve(fixed, final.train)
        space = space_of(dataset, [recipe], fixed, models, plan.tune)
        start, warm_up = start_of(space, recipe, fixed), max(1, recipe.epochs // 3)
    exclude = final.train.has_items and repeat_share(final.train) < REPEATS
    # What cannot be fitted at all is told before anything is written.
    for one in given or [fixed]:
        steps_of(dataset, folds, one)
    return Job(dataset, folds, fixed, exclude, space, start, warm_up)


def _run(
    job: Job, out: Path, plan: Plan, setup: dict[str, Any], command: str, *, progress: bool
) -> dict[str, Any]:
    study = Study(
        out, job.space, job.start, sampler=plan.sampler, seed=job.fixed.seed, warm_up=job.warm_up
    )
    setup = json.loads(json.dumps(setup))  # as it is read again
    study.claim(setup)
    try:
        _run_trials(study, job, out, plan, setup, command, progress=progress)
        found = results.found(study.finished, job.folds)
        report = _write(study, job, out, setup, command)
        if found.best is not None:
            _draw(out / "plots", study, found, setup["folds"], job.space)
            return report
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(study.finished)} of {plan.trials} trials are kept in {out}: the same command "
            "continues"
        ) from None
    why = next((row.why for row in found.rows if row.why), "there was no time for any")
    raise InvalidArgumentError(f"no trial was finished: {why}", reason="NO_TRIAL", field="out")


def _run_trials(
    study: Study, job: Job, out: Path, plan: Plan, setup: dict[str, Any], command: str, *,
    progress: bool,
) -> None:  # fmt: skip
    begin = time.monotonic()
    while (done := len(study.finished)) < plan.trials:
        if plan.budget_s is not None and time.monotonic() - begin >= plan.budget_s:
            break
        label = f"trial {done + 1}/{plan.trials}"
        if not _try(study, job, label, progress=progress):
            if progress:
                sys.stderr.write(f"{label}  all settings were tried\n")
            break
        _write(study, job, out, setup, command)
        if progress:
            sys.stderr.write(f"{label}  {_line(results.found(study.finished, job.folds))}\n")


def _draw(
    folder: Path, study: Study, found: results.Found, folds: Sequence[str], space: Space
) -> None:
    folder.mkdir(exist_ok=True)
    for name, png in pictures.draw(found, folds, study.importances(), space).items():
        _replace(folder / name, png)


def _try(study: Study, job: Job, label: str, *, progress: bool) -> bool:
    """Runs one trial to its end; one that is interrupted does not count. False: there is none."""
    trial = study.ask()
    if trial is None:
        return False
    result = Result()
    try:
        if study.ended_the_process(trial):
            study.prune(trial, "it ended the process again and again: too little memory?")
            return True
        try:
            steps = sum(steps_of(job.dataset, job.folds, replace(job.fixed, **trial.params)))
        except InvalidArgumentError as error:  # dims that the given towers cannot share, say
            study.prune(trial, error.message)
            return True
        with tqdm(total=steps, desc=label, unit=job.unit, disable=not progress, leave=False) as bar:
            why = _measure(trial, job, result, bar)
        _note(trial, result)
        if why is None:
            study.complete(trial, sum(result.scores) / len(result.scores))
        else:
            study.prune(trial, why)
    except BaseException:
        study.drop(trial)
        raise
    return True


def _measure(trial: Trial, job: Job, result: Result, bar: tqdm[Any]) -> str | None:
    """Fills the result; returns why it was given up, or None."""

    def watch(step: int, score: float) -> None:
        bar.update(step + 1 - bar.n)
        trial.report(score, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        measure(
            job.dataset, job.folds, replace(job.fixed, **trial.params), result, watch,
            exclude_history=job.exclude_history,
        )  # fmt: skip
    except optuna.TrialPruned:
        return "its score was below the median of the others"
    except NotFinite:
        return "it diverged"
    except torch.OutOfMemoryError:
        return "too little memory"
    except InvalidArgumentError as error:
        if error.reason != "TOO_FEW_WORDS":  # what all trials meet ends the search
            raise
        return error.message
    return None


def _note(trial: Trial, result: Result) -> None:
    for name in ("scores", "epochs", "seconds"):
        trial.set_user_attr(name, getattr(result, name))
    if result.metric is not None:
        trial.set_user_attr("metric", result.metric.name)


def _line(found: results.Found) -> str:
    """The last trial, beside the best."""
    last, best = found.rows[-1], found.best
    value = "-" if last.value is None else f"{last.value:.4f}"
    if last.spread is not None:
        value += f" +- {last.spread:.4f}"
    said = [f"{found.metric.name} {value}"]
    if last.why is not None:
        said.append(f"pruned: {last.why}")
    elif best is not None:
        said.append("the best" if best is last else f"best {best.value:.4f} (trial {best.number})")
    return "  ".join([*said, f"{last.seconds:.1f} s"])


def _write(
    study: Study, job: Job, out: Path, setup: dict[str, Any], command: str
) -> dict[str, Any]:
    """Writes what was found so far."""
    found = results.found(study.finished, job.folds)
    best = found.best
    report = {**setup, **results.report(found), "path": str(out)}
    if best is not None:
        report["config"] = str(out / BEST)
        config = replace(job.fixed, **best.settings)
        _replace(out / BEST, config_file.text(config, _comment(found, setup, command)).encode())
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    _replace(out / REPORT, (text + "\n").encode())
    return report


def _comment(found: results.Found, setup: dict[str, Any], command: str) -> str:
    best = found.best
    assert best is not None
    assert best.value is not None
    spread = "" if best.spread is None else f" +- {best.spread:.4f}"
    return "\n".join(
        [
            f"{found.metric.name} {best.value:.4f}{spread}: mean and standard deviation over "
            f"{len(best.folds)} folds by {setup['folds_by']}",
            f"trial {best.number} of {len(found.rows)}, for `python -m predictor train --config`",
            *found.notes,
            *([f"found by: {command}"] if command else []),
        ]
    )


def _replace(path: Path, data: bytes) -> None:
    """Writes a file that is there whole, before and after."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)

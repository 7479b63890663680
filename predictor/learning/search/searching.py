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
from predictor.learning.data import repeat_share
from predictor.learning.measures.evaluation import REPEATS
from predictor.learning.search import pictures, results
from predictor.learning.search.folds import Fold, FoldKind, default_folds, make_folds
from predictor.learning.search.space import Space, space_of, start_of
from predictor.learning.search.study import SamplerKind, Study, owned
from predictor.learning.search.trial import NotFinite, Result, epochs_of, measure
from predictor.learning.sequence import config_file
from predictor.learning.sequence.recipe import FitConfig, Recipe, resolve
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split
from predictor.models.sequence.encoders import model_types

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
    """Encoders to choose from; none: the one that the configuration says, or the data."""
    tune: Sequence[str] | None = None
    """Fields to choose; None: all that have an effect and that the configuration leaves open."""
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
    start: Recipe


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
    if fixed.model_type not in (None, *model_types()):
        raise InvalidArgumentError(
            f"{fixed.model_type} is no sequence model: those are searched", field="model"
        )
    start = resolve(fixed, final.train)
    if plan.models:
        # The first trial has the default encoder where it is among them.
        model = start.model_type if start.model_type in plan.models else plan.models[0]
        fixed = replace(fixed, model_type=model)
        start = resolve(fixed, final.train)
    space = space_of(dataset, start, fixed, plan.models, plan.tune)
    exclude = final.train.has_items and repeat_share(final.train) < REPEATS
    epochs_of(fixed, folds)  # what cannot be fitted at all is told before anything is written
    return Job(dataset, folds, fixed, exclude, space, start)


def _run(
    job: Job, out: Path, plan: Plan, setup: dict[str, Any], command: str, *, progress: bool
) -> dict[str, Any]:
    study = Study(
        out, job.space, start_of(job.space, job.start), sampler=plan.sampler,
        seed=job.fixed.seed, warm_up=max(1, job.start.epochs // 3),
    )  # fmt: skip
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
        _try(study, job, label, progress=progress)
        _write(study, job, out, setup, command)
        if progress:
            sys.stderr.write(f"{label}  {_line(results.found(study.finished, job.folds))}\n")


def _draw(
    folder: Path, study: Study, found: results.Found, folds: Sequence[str], space: Space
) -> None:
    folder.mkdir(exist_ok=True)
    for name, png in pictures.draw(found, folds, study.importances(), space).items():
        _replace(folder / name, png)


def _try(study: Study, job: Job, label: str, *, progress: bool) -> None:
    """Runs one trial to its end; one that is interrupted does not count."""
    trial = study.ask()
    result = Result()
    try:
        if study.ended_the_process(trial):
            study.prune(trial, "it ended the process again and again: too little memory?")
            return
        try:
            epochs = sum(epochs_of(replace(job.fixed, **trial.params), job.folds))
        except InvalidArgumentError as error:  # dims that the given towers cannot share, say
            study.prune(trial, error.message)
            return
        with tqdm(
            total=epochs, desc=label, unit="epochs", disable=not progress, leave=False
        ) as bar:
            why = _measure(trial, job, result, bar)
        _note(trial, result)
        if why is None:
            study.complete(trial, sum(result.scores) / len(result.scores))
        else:
            study.prune(trial, why)
    except BaseException:
        study.drop(trial)
        raise


def _measure(trial: Trial, job: Job, result: Result, bar: tqdm[Any]) -> str | None:
    """Fills the result; returns why it was given up, or None."""

    def watch(epoch: int, score: float) -> None:
        bar.update(epoch + 1 - bar.n)
        trial.report(score, epoch)
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

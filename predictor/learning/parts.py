"""The optional parts of a version: each is fitted, and kept where validation says that it helps."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from foretell.vectors import Vectors
from predictor.learning.data import Targets
from predictor.learning.measures import calibration
from predictor.learning.measures.answers import Answers
from predictor.learning.measures.evaluation import measure_types
from predictor.learning.measures.metrics import (
    ItemScorer,
    item_hits,
    item_metrics,
    ranked_candidates,
)
from predictor.learning.ranking.examples import ModelOutputs
from predictor.learning.ranking.fitting import FittedRanker, fit_ranker
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.learning.types.fitting import fit_type_models
from predictor.models.calibration import CANDIDATES
from predictor.models.types.models import ItemTypeModel, TypeModel
from predictor.models.version import Version

Report = dict[str, Any]


def with_parts(
    answers: Answers, dataset: Dataset, part: Split, seed: int, *, progress: bool
) -> tuple[Version, Report]:
    """The version with what helps it, and by how much.

    Args:
        answers: the version's, without parts, for part.validation.
        dataset: part is its division.
        seed: of all draws.
        progress: whether to tell on the standard error what was kept.

    Returns:
        the version; and by part whether it is on, with the measures on validation that decided it.
        What a part says of validation is cross-fitted where it has learned from it.
    """
    version, types = _types(answers, dataset, part, seed)
    version, ranker = _ranker(replace(answers, version=version), dataset, part, seed)
    report = {**types, **ranker}
    if progress:
        for name, about in report.items():
            sys.stderr.write(f"{name}: {_line(about)}\n")
    return version, report


def with_recommender(
    answers: Answers, part: Split, dataset: Dataset, name: str, seed: int, *, progress: bool
) -> tuple[Version, Report]:
    """The version with a classic recommender for its items, and type models where they help.

    What little validation chooses of a recommender (a weight a method, neighbours, alpha) is
    measured and calibrated on it too.

    Args:
        answers: the version's, without parts, for part.validation.
        dataset: part is its division.
        name: one of recommenders.RECOMMENDERS.
        seed: of all draws.
        progress: whether to tell on the standard error what validation says.
    """
    # Of the extra `toolbox`, which the other models do without.
    from predictor.learning.ranking.recommenders import fit_recommender

    fitted = fit_recommender(name, part.train, answers, seed)
    version, report = _types(answers, dataset, part, seed)
    report["recommender"] = {
        "on": True,
        "validation": _of_items(fitted.validation),
        "without": _of_items(fitted.search),
        "weights": dict(fitted.recommender.weights),
        "alone": {name: _of_items(metrics) for name, metrics in fitted.alone.items()},
    }
    if progress:
        sys.stderr.write(f"{name}: {_line(report['recommender'])}\n")
    version = replace(version, ranker=fitted.recommender)
    scorer = replace(answers, version=version).item_scorer
    return _calibrated(version, scorer, part.validation, part), report


def without_parts(answers: Answers, part: Split) -> Version:
    """The version with the sequence model alone: what it says of items is calibrated.

    Args:
        answers: the version's for part.validation.
    """
    version = answers.version
    if not version.config.has_items:
        return version
    return _calibrated(version, answers.search_scorer, part.validation, part)


def fit_second_stage(
    answers: Answers, text_vectors: Vectors, part: Split, seed: int, *, popularity: bool = True
) -> FittedRanker | None:
    """A ranker for the version's sequence model, see fit_ranker.

    Args:
        answers: the version's for part.validation.
        text_vectors: (items, cols) of the items' texts.
        popularity: whether it reads how popular an item is.
    """
    return fit_ranker(
        part.train,
        part.validation,
        text_vectors,
        kind=part.kind,
        horizon=part.horizon,
        repeats=not answers.exclude_history,
        seed=seed,
        model=ModelOutputs(answers.found.queries, answers.space.items),
        popularity=popularity,
    )


def _types(answers: Answers, dataset: Dataset, part: Split, seed: int) -> tuple[Version, Report]:
    """Type models, by log loss: theirs against the network's, and knowing the item against not."""
    version = answers.version
    fitted = fit_type_models(part, dataset.item_vectors, seed)
    if fitted.next_type is None:
        return version, {}
    network = measure_types(answers.type_scorer, answers.targets)
    found = {name: _measures(measured) for name, measured in fitted.report.items()}
    own = found[TypeModel.NAME]
    report: Report = {
        "type_model": {
            "on": own["log_loss"] < network["log_loss"],
            "validation": own,
            "without": _measures(network),
        }
    }
    if report["type_model"]["on"]:
        version = replace(version, type_model=fitted.next_type)
    if fitted.item_type is not None:
        with_item = found[ItemTypeModel.NAME]
        report["item_type_model"] = {
            "on": with_item["log_loss"] < own["log_loss"],
            "validation": with_item,
            "without": own,
        }
        if report["item_type_model"]["on"]:
            version = replace(version, item_type_model=fitted.item_type)
    return version, report


def _ranker(answers: Answers, dataset: Dataset, part: Split, seed: int) -> tuple[Version, Report]:
    """The ranker, by NDCG: its order against that of the search."""
    version = answers.version
    if not version.config.has_items:
        return version, {}
    fitted = fit_second_stage(answers, dataset.item_vectors, part, seed)
    if fitted is None:
        return without_parts(answers, part), {}
    search = fitted.search or item_metrics(
        answers.search_scorer, part.validation, np.ones(len(dataset.item_texts), np.bool_),
        exclude_history=answers.exclude_history,
    )  # fmt: skip
    on = fitted.validation["ndcg_at_10"] > search["ndcg_at_10"]
    report: Report = {"ranker": {"on": on, "validation": fitted.validation, "without": search}}
    if on:
        version = replace(version, ranker=fitted.ranker)
        pairs = fitted.pairs
        scorer = ranked_candidates(pairs.row, pairs.item, fitted.scores, len(version.item_ids))
        return _calibrated(version, scorer, fitted.targets, part), report
    return without_parts(answers, part), report


def _calibrated(version: Version, scorer: ItemScorer, targets: Targets, part: Split) -> Version:
    """With probabilities of items that hold for scores of targets it has not learned from."""
    exclude = version.config.repeats == "excluded"
    hits = item_hits(scorer, targets, exclude_history=exclude, returned=CANDIDATES)
    decline = calibration.decline(part.train, part.validation, exclude_history=exclude)
    found = calibration.fit_item_calibration(hits, decline)
    return replace(version, config=version.config.model_copy(update={"item_calibration": found}))


def _measures(metrics: Report) -> dict[str, float]:
    return {name: metrics[name] for name in ("accuracy", "f1", "log_loss", "ece")}


def _of_items(metrics: Report) -> dict[str, float]:
    return {name: metrics[name] for name in ("hits_at_10", "ndcg_at_10")}


def _line(about: Report) -> str:
    shown = "  ".join(
        f"{name} {value:.4f} (without {about['without'][name]:.4f})"
        for name, value in about["validation"].items()
        if name in about["without"]
    )
    return f"{'on' if about['on'] else 'off'}  validation: {shown}"

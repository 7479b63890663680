"""From a data set to a version directory."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foretell.errors import InvalidArgumentError
from predictor.learning.classic.recipe import CLASSIC, FINE_TUNED, FittedBag, resolve_classic
from predictor.learning.data import Events, Targets, history_of, repeat_share
from predictor.learning.measures import calibration, evaluation
from predictor.learning.measures.answers import answer
from predictor.learning.measures.comparison import compare
from predictor.learning.measures.evaluation import REPEATS, Space
from predictor.learning.parts import Report, with_parts, with_recommender, without_parts
from predictor.learning.reports.data_report import data_report
from predictor.learning.reports.model_card import model_card
from predictor.learning.sequence.fitting import FitConfig
from predictor.learning.sequence.parallel import together
from predictor.learning.sequence.training import FittedSequence, fit_sequence
from predictor.learning.sources import CACHE_DIR, Dataset
from predictor.learning.splits import Protocol, Split, split
from predictor.models import model_dir
from predictor.models.calibration import CANDIDATES, ItemCalibration
from predictor.models.history import HistoryBatch
from predictor.models.ranking.recommender import RECOMMENDERS
from predictor.models.sequence.encoders import model_types
from predictor.models.version import Golden, Version, VersionConfig

GOLDEN_HISTORIES = 8

LIBRARIES = ("foretell-services", "numpy", "safetensors", "torch", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Trained:
    """What a training gives back."""

    version: str
    path: Path
    report: dict[str, Any]
    """metrics.json: protocol, items, types, and for texts-only events own_text, next_type."""


def train(
    dataset: Dataset,
    out: Path,
    *,
    protocol: Protocol | None = None,
    config: FitConfig | None = None,
    parts: bool = True,
    item_baselines: bool = True,
    progress: bool = False,
    cache_dir: Path = CACHE_DIR,
) -> Trained:
    """Trains on a data set, evaluates beside the baselines, and writes a version directory.

    Processes that torchrun starts fit the sequence model together; the first one does the rest,
    and the others come back without a report.

    Args:
        dataset: events with vectors, see `sources`.
        out: the directory to write; its name becomes the version's.
        protocol: how to divide the events.
        config: how to fit; its seed is the protocol's.
        parts: whether to fit the ranker and the type models; False leaves the sequence model alone,
            as classic models always are.
        item_baselines: whether to measure baselines for items beside the version.
        progress: whether to show bars and the training curve on the standard error.
        cache_dir: where an embedder that is started keeps vectors, see sources.

    Raises:
        InvalidArgumentError: the data cannot train a model or `config` does not fit together, or
            `out` exists or its name is no version name.
    """
    # Of the extra `train`, which serving does without; here, so that it is missed at once.
    from predictor.learning.reports import drawing, own_text

    begin = time.monotonic()
    protocol = protocol or Protocol()
    config = replace(config or FitConfig(), seed=protocol.seed)
    name = model_dir.check_version_name(out.name)
    model_dir.check_absent(out)
    models = (*model_types(), *CLASSIC)
    if config.model_type is not None and config.model_type not in models:
        raise InvalidArgumentError(
            f"model {config.model_type!r} is none of {', '.join(models)}", field="model"
        )
    part = divide(dataset, protocol)
    exclude = part.train.has_items and repeat_share(part.train) < REPEATS
    given, encoder, tuned = dataset, {}, {}
    if config.model_type == FINE_TUNED:
        from predictor.learning.classic.finetuning import fine_tune

        recipe = resolve_classic(config, dataset, part.train)
        made = fine_tune(dataset, part.train, recipe, out, cache_dir=cache_dir, progress=progress)
        dataset, encoder, tuned = made.dataset, made.files, {"own_text_types": made.report}
    with together() as place:
        first = place.rank == 0
        fitted = _fit(dataset, part, config, exclude_history=exclude, progress=progress and first)
    if not first:
        return Trained(name, out, {})
    version = _assemble(name, dataset, part, fitted, exclude_history=exclude)
    # The vectors that the files give, as serving has them: trees are sharp to the last bit.
    space, warm = evaluation.read_space(version, dataset)
    answers = answer(version, part.validation, space)
    about: Report = {}
    if config.model_type is not None and config.model_type in RECOMMENDERS:
        version, about = with_recommender(
            answers, part, dataset, config.model_type, protocol.seed, progress=progress
        )
    elif parts and config.model_type not in CLASSIC:
        version, about = with_parts(answers, dataset, part, protocol.seed, progress=progress)
    else:
        version = without_parts(answers, part)
    answers = answer(version, part.test, space)
    found = compare(answers, dataset, part, warm, item_methods=item_baselines)
    report: dict[str, Any] = {
        "protocol": describe(part, protocol, exclude_history=exclude),
        "parts": about,
        **found.report,
        **tuned,
    }
    own = None
    if not dataset.events.has_items:
        own = own_text.own_text(given, protocol.test_share, protocol.seed)
    if own is not None and "types" in report:
        report["own_text"] = own
        report["next_type"] = own_text.next_type(version, space, part, report["types"])
    lineage = _lineage(dataset, fitted, begin)
    reports = {
        "metrics.json": report,
        "history.json": [asdict(epoch) for epoch in fitted.curve],
        "lineage.json": lineage,
    }
    version = replace(version, reports=reports)
    card = model_card(version.config.model_dump(), report, lineage)
    plots = drawing.draw(found, dataset, fitted.curve)
    model_dir.write(
        out, version, card, plots, data_report=data_report(given, protocol), encoder=encoder
    )
    return Trained(name, out, report)


Fitted = FittedSequence | FittedBag


def _fit(
    dataset: Dataset, part: Split, config: FitConfig, *, exclude_history: bool, progress: bool
) -> Fitted:
    if config.model_type not in CLASSIC:
        return fit_sequence(
            dataset, part, config, exclude_history=exclude_history, progress=progress
        )
    from predictor.learning.classic.fitting import fit_classic

    return fit_classic(dataset, part, config, progress=progress)


def _assemble(
    name: str, dataset: Dataset, part: Split, fitted: Fitted, *, exclude_history: bool
) -> Version:
    """The version with its calibrations, which are fitted on the validation part."""
    network, space, recipe = fitted.network.cpu(), fitted.space, fitted.recipe
    found = evaluation.outputs(network, part.validation, space, recipe.history_length)
    lines = part.validation.type >= 0
    types = calibration.fit_type_calibration(
        found.type_logits[part.validation.row[lines]], part.validation.type[lines]
    )
    has_items = part.train.has_items
    config = VersionConfig(
        version=name,
        encoder=dataset.encoder,
        network=network.config,
        behavior_types=part.train.behavior_types,
        history_length=recipe.history_length,
        repeats="excluded" if exclude_history else "allowed",
        has_items=has_items,
        has_texts=dataset.events.has_texts,
        has_times=dataset.events.has_times,
        horizon=part.horizon,
        type_calibration=types,
        item_calibration=ItemCalibration(),  # fitted once it is known what orders the items
        candidates=CANDIDATES,
    )
    warm = np.flatnonzero(fitted.warm)
    golden = _golden(part.validation, space, recipe.history_length)
    answers = network.predict(golden)
    return Version(
        config,
        network,
        fitted.projection,
        dataset.events.item_ids if has_items else (),
        warm if has_items else warm[:0],
        fitted.residuals[warm if has_items else warm[:0]],
        Golden(golden, types.probabilities(answers.type_logits), answers.queries),
    )


def divide(dataset: Dataset, protocol: Protocol) -> Split:
    """Splits, with behavior types known from training alone.

    Raises:
        InvalidArgumentError: there are too few events, users or types to train on.
    """
    events = dataset.events
    types = np.unique(events.type)
    if len(types) < 2 and not events.has_items:
        raise InvalidArgumentError(
            f"all {len(events)} events have the behavior type {events.behavior_types[types[0]]!r}, "
            "and none has an item: there is nothing to tell apart",
            reason="ONE_BEHAVIOR_TYPE",
            field="behavior_type",
        )
    users = np.unique(events.user)
    if len(users) < 2:
        raise InvalidArgumentError(
            f"all {len(events)} events are of the user {events.user_ids[users[0]]!r}: "
            "what users have in common needs at least two",
            reason="ONE_USER",
            field="user_id",
        )
    part = split(events, protocol, dataset.targets)
    known = np.bincount(part.train.type, minlength=len(events.behavior_types)) > 0
    names = [name for name, seen in zip(events.behavior_types, known, strict=True) if seen]
    return part.with_types(names)


def describe(part: Split, protocol: Protocol, *, exclude_history: bool) -> dict[str, Any]:
    """The protocol in metrics.json: what must be the same for figures to be compared."""
    return {
        **asdict(protocol),
        "split": part.kind,
        "first_event": _moment(part.train, part.train.timestamp.min()),
        "last_event": _moment(part.train, part.train.timestamp.max()),
        "last_validation_event": _moment(
            part.train, part.validation.events.timestamp[part.validation.end].max()
        ),
        "users": len(np.unique(part.train.user)),
        "train_events": len(part.train),
        "validation_contexts": len(part.validation),
        "test_contexts": len(part.test),
        "catalogue": len(part.train.item_ids),
        "repeat_share": repeat_share(part.train),
        "history_filtered": exclude_history,
        "ranking": "full catalogue, ties count against the target",
    }


def _moment(events: Events, microseconds: np.int64) -> str | None:
    """A time of the events in ISO 8601; None where they have no times."""
    if not events.has_times:
        return None
    return datetime.fromtimestamp(int(microseconds) / 1e6, UTC).isoformat(timespec="seconds")


def _golden(targets: Targets, space: Space, history_length: int) -> HistoryBatch:
    """A few histories, an empty one among them, by which serving checks that it answers alike."""
    rows = slice(0, min(GOLDEN_HISTORIES, len(targets)))
    some = history_of(targets, rows, history_length, space.items, space.texts)
    return replace(some, lengths=np.append(some.lengths, 0))


def _lineage(dataset: Dataset, fitted: Fitted, begin: float) -> dict[str, Any]:
    """What the version was made from and what it took."""
    return {
        "data": dataset.lineage,
        "fit": asdict(fitted.recipe),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

"""Several versions, and the baselines, on the very same targets.

What `comparison` does for one version that was trained just now. Here all methods are brought to
one vocabulary of behavior types, one catalogue and one rule for repeats, so that they answer in the
same contexts and can be resampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor.learning.measures.answers import Answers, answer
from predictor.learning.measures.baselines import item_baselines, popularity
from predictor.learning.measures.bootstrap import (
    Measure,
    calibration_error,
    macro_f1,
    macro_roc_auc,
    mean,
)
from predictor.learning.measures.evaluation import line_probabilities, read_space
from predictor.learning.measures.metrics import (
    Floats,
    ItemHits,
    K,
    calibration_ratio,
    item_hits,
    users,
)
from predictor.learning.measures.type_baselines import type_baselines
from predictor.learning.measures.type_metrics import losses, type_metrics
from predictor.learning.sources import Dataset
from predictor.learning.splits import Split
from predictor.models.calibration import CANDIDATES
from predictor.models.history import NONE, Ints
from predictor.models.version import Version

BASELINE = "baseline:"
"""Before the names of baselines, so that none is taken for a version: these have no colon."""


@dataclass(frozen=True)
class ItemLists:
    """Next items: what the lists of each method hit, in the same contexts."""

    warm: NDArray[np.bool_]
    """(items,) whether training saw the item."""
    popularity: Ints
    """(items,) events in training."""
    hits: dict[str, ItemHits] = field(default_factory=dict)
    """By method."""
    probabilities: dict[str, Floats] = field(default_factory=dict)
    """(contexts, K) of the items in hits.top, where a method gives any."""

    @property
    def methods(self) -> list[str]:
        """Versions, then baselines."""
        return list(self.hits)

    @property
    def users(self) -> Ints:
        """(contexts,) whose they are."""
        return next(iter(self.hits.values())).user

    def add(self, method: str, hits: ItemHits, probabilities: Floats | None = None) -> None:
        """Keeps the K best of each list."""
        top = {name: getattr(hits, name)[:, :K].copy() for name in ("top", "top_score", "top_hit")}
        self.hits[method] = replace(hits, **top)
        if probabilities is not None:
            self.probabilities[method] = probabilities[:, :K].copy()

    def metrics(self, method: str) -> dict[str, Any]:
        """The measures that item_metrics names, and the calibration_ratio."""
        hits = self.hits[method]
        found: dict[str, Any] = hits.metrics(self.warm)
        if method in self.probabilities:
            found["calibration_ratio"] = calibration_ratio(self.probabilities[method], hits)
        return found

    def measures(self, method: str) -> dict[str, Measure]:
        """Those of them that can be resampled."""
        hits = self.hits[method]
        return {
            "hits_at_10": mean(hits.share_of_best),
            "recall_at_10": mean(hits.recall),
            "ndcg_at_10": mean(hits.ndcg),
        }


@dataclass(frozen=True)
class TypeAnswers:
    """What a method says of the lines of the target baskets."""

    probabilities: Floats
    """(lines, types)."""
    predicted: Ints
    """(lines,) the type that it names."""


@dataclass(frozen=True)
class TypeLines:
    """Next behavior types: what each method says of the same lines."""

    names: Sequence[str]
    """Of the types that any of the versions knows; to one that does not know it, it is
    impossible."""
    true: Ints
    """(lines,) negative where no version knows the type."""
    users: Ints
    """(lines,) whose they are."""
    answers: dict[str, TypeAnswers] = field(default_factory=dict)
    """By method."""

    @property
    def methods(self) -> list[str]:
        """Versions, then baselines."""
        return list(self.answers)

    def metrics(self, method: str) -> dict[str, Any]:
        """See type_metrics."""
        own = self.answers[method]
        return type_metrics(own.probabilities, self.true, self.names, own.predicted)

    def measures(self, method: str) -> dict[str, Measure]:
        """Those of them that can be resampled."""
        own = self.answers[method]
        known = self.true >= 0
        squares, surprises = losses(own.probabilities, np.maximum(self.true, 0))
        found = {
            "accuracy": mean(own.predicted == self.true),
            "f1": macro_f1(own.predicted, self.true, len(self.names)),
            "mse": mean(squares, known),
            "log_loss": mean(surprises, known),
            "ece": calibration_error(own.probabilities, self.true),
        }
        if len(np.unique(self.true)) > 1:  # else nothing is to be told from anything
            found["roc_auc"] = macro_roc_auc(own.probabilities, self.true)
        return found


Task = ItemLists | TypeLines


def side_by_side(
    versions: Mapping[str, Version],
    datasets: Mapping[str, Dataset],
    part: Split,
    *,
    exclude_history: bool,
    progress: Callable[[str], None] = lambda method: None,
) -> dict[str, Task]:
    """Measures all versions, then the baselines, on part.test.

    Args:
        versions: by name.
        datasets: by the same names, the same events and items with vectors of the encoder that the
            version was trained on; the baselines read the first one's.
        part: their division.
        exclude_history: whether items of the history are left out, whatever a version was made for.
        progress: told each method before it is measured.

    Returns:
        `items`, `types` and, where a version has a model of that, `known_item_types`: each as far
        as the targets have any of it.
    """
    types = dict.fromkeys(name for v in versions.values() for name in v.config.behavior_types)
    own = part.with_types(tuple(types))
    test = own.test
    typed = test.type != NONE
    lines = np.flatnonzero(typed)
    with_item = np.flatnonzero(typed & (test.item != NONE))
    of_users = users(test)[test.row]
    counts = popularity(part.train)
    items = ItemLists(counts > 0, counts)
    next_types, known = (
        TypeLines(tuple(types), test.type[at], of_users[at]) for at in (lines, with_item)
    )
    has_items = bool((test.item >= 0).any())
    for name, version in versions.items():
        progress(name)
        answers = _answers(version, datasets[name], part, exclude_history=exclude_history)
        config = version.config
        if has_items and config.has_items:
            hits = item_hits(
                answers.item_scorer, test, exclude_history=exclude_history, returned=CANDIDATES
            )
            items.add(name, hits, config.item_calibration.probabilities(hits.top_score))
        if len(lines):
            row = test.row[lines]
            said = answers.type_probabilities[row], answers.chosen_types[row]
            next_types.answers[name] = _in_all(*said, config.behavior_types, types)
        if version.item_type_model is not None and len(with_item):
            probabilities, chosen, _ = answers.line_types()
            known.answers[name] = _in_all(probabilities, chosen, config.behavior_types, types)
    if items.hits:
        vectors = next(iter(datasets.values())).item_vectors
        for name, scorer in item_baselines(own.train, vectors).items():
            progress(BASELINE + name)
            hits = item_hits(scorer, test, exclude_history=exclude_history)
            items.add(BASELINE + name, hits)
    if next_types.answers:
        for name, type_scorer in type_baselines(own.train).items():
            progress(BASELINE + name)
            likely, _ = line_probabilities(type_scorer, test)
            next_types.answers[BASELINE + name] = TypeAnswers(likely, likely.argmax(axis=1))
    tasks: dict[str, Task] = {}
    if items.hits and len(items.users):
        tasks["items"] = items
    for title, task in (("types", next_types), ("known_item_types", known)):
        if task.answers and (task.true >= 0).any():
            tasks[title] = task
    return tasks


def _answers(version: Version, dataset: Dataset, part: Split, *, exclude_history: bool) -> Answers:
    """The version's for the test, by one rule for repeats, in its own vocabulary of types."""
    repeats = "excluded" if exclude_history else "allowed"
    config = version.config.model_copy(update={"repeats": repeats})
    space, _ = read_space(version, dataset)
    test = part.with_types(config.behavior_types).test
    return answer(replace(version, config=config), test, space)


def _in_all(
    probabilities: Floats, chosen: Ints, own: Sequence[str], types: Mapping[str, None]
) -> TypeAnswers:
    """Answers over a version's own types as answers over those of all."""
    place = {name: at for at, name in enumerate(types)}
    places = np.array([place[name] for name in own], np.int64)
    wide = np.zeros((len(probabilities), len(types)), np.float32)
    wide[:, places] = probabilities
    return TypeAnswers(wide, places[chosen])

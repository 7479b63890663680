"""The second stage: gradient-boosted trees order a few hundred candidates.

Ke et al., 2017, "LightGBM"; the trees are fitted by predictor.learning.ranking.fitting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from predictor.models.history import Histories
from predictor.models.ranking.candidates import Recipe, candidates
from predictor.models.ranking.features import FeatureGroups, GetVectors, feature_names, features
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.tables import Tables
from predictor.models.trees import read_trees

if TYPE_CHECKING:
    import lightgbm

FILE = "ranker.json"
TREES = "ranker.txt"

READ_OF_NEW = ("model_score", "model_cosine_best")
"""Features that an item has from its text alone: all that is read of a new one."""

NEW_LIFT = 0.2
"""Added to the scores of new items; 0 trusts them as old ones alike.

Chosen on validation users of Amazon Beauty, with a tenth of the items held out: the other users
find about as much as with new items at their places in Search, and more new ones are found.
"""

LARGEST_WEIGHT = 1e6
"""Of a feature in that line; see fit_new_items for what keeps it smaller."""


@dataclass(frozen=True)
class NewItems:
    """What a new item scores: a line through the trees' scores of the others.

    Trees that learn from what happened learn that an item without events does not happen. So a new
    one is not scored by them, but by what they would give to an old item that is as far above or
    below the history's others in model score and in likeness to its latest items.
    """

    model_score: float
    likeness: float
    """Weights of READ_OF_NEW."""

    def place(
        self,
        pairs: Pairs,
        scores: NDArray[np.float32],
        read: NDArray[np.float32],
        new: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """(pairs,) scores, those of new items on the scale of the others.

        Where a history has new ones alone, no more than their order is meant.

        Args:
            pairs: the candidates.
            scores: (pairs,) of the trees.
            read: (pairs, READ_OF_NEW); an item that has none keeps its score.
            new: (pairs,) whether nobody had the item yet.
        """
        line = read.astype(np.float64) @ (self.model_score, self.likeness)
        placed = new & np.isfinite(line)
        if not placed.any():
            return scores
        old = ~new & np.isfinite(line)
        count = np.maximum(pairs.per_row(old, np.add), 1)
        level = pairs.per_row(np.where(old, scores - line, 0), np.add) / count
        return np.where(placed, line + level + NEW_LIFT, scores).astype(np.float32)


@dataclass(frozen=True)
class Ranker:
    """Candidates of a history and their order."""

    tables: Tables
    recipe: Recipe
    groups: FeatureGroups
    trees: str
    """LightGBM's text format."""
    new_items: NewItems = NewItems(0.0, 0.0)
    """Read where there is a model."""

    @cached_property
    def booster(self) -> lightgbm.Booster:
        """The trees, read."""
        return read_trees(self.trees)

    @property
    def items(self) -> int:
        """Items of the catalogue at training."""
        return self.tables.items

    @property
    def searched(self) -> int:
        """Items that Search is asked for."""
        return self.recipe.searched

    def finds(self, k: int) -> bool:
        """Whether k items are found without more from Search."""
        # The user's own items may be few: they do not count.
        return self.recipe.popular + self.recipe.searched >= 2 * k

    def candidates(
        self,
        histories: Histories,
        searched: Pairs,
        *,
        repeats: bool | None = None,
        denied: Pairs | None = None,
    ) -> Pairs:
        """The pairs to score.

        Args:
            histories: at most HISTORY_EVENTS events each.
            searched: the model's Search hits, at most `recipe.searched` a history.
            repeats: whether items of the history may be answered; None: as in training.
            denied: pairs that may not.
        """
        own = self.groups.repeats if repeats is None else repeats
        return candidates(self.tables, self.recipe, histories, searched, repeats=own, denied=denied)

    def score(
        self,
        histories: Histories,
        pairs: Pairs,
        model_scores: NDArray[np.float32],
        vectors: GetVectors,
    ) -> NDArray[np.float32]:
        """(pairs,) the higher the better; only those of one history compare.

        Args:
            histories: as for candidates.
            pairs: what `candidates` gave.
            model_scores: (pairs,) query . item vector; NaN where there is none.
            vectors: gives (n, dims) item vectors in the model's space for indices of items.
        """
        table = features(self.tables, histories, pairs, model_scores, vectors, self.groups)
        scores = self.score_features(table)
        if not self.groups.model:
            return scores
        read = table[:, self._columns_of_new]
        return self.new_items.place(pairs, scores, read, self.tables.new(pairs.item))

    @cached_property
    def _columns_of_new(self) -> list[int]:
        return columns_of_new(self.groups)

    def score_features(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """(pairs,) from the features of pairs."""
        if not len(table):
            return np.zeros(0, np.float32)
        found = self.booster.predict(table, raw_score=True, num_threads=1)
        return np.asarray(found, np.float32)

    def files(self) -> dict[str, bytes]:
        """The ranker as bytes, see `load`."""
        head = {
            "recipe": asdict(self.recipe),
            "groups": asdict(self.groups),
            "new_items": asdict(self.new_items),
            "features": feature_names(self.groups),
        }
        return {
            FILE: json.dumps(head, indent=1).encode(),
            TREES: self.trees.encode(),
            **self.tables.files(),
        }

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> Ranker:
        """The ranker from its files.

        Raises:
            ValueError: one is missing or damaged; says which and how.
        """
        for name in (FILE, TREES):
            if name not in files:
                raise ValueError(f"{name} is missing")
        try:
            head = json.loads(files[FILE])
            recipe, groups = Recipe(**head["recipe"]), FeatureGroups(**head["groups"])
            new_items = NewItems(**head["new_items"])
            names = tuple(head["features"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{FILE}: {error}") from None
        _check(asdict(recipe), int)
        _check(asdict(groups), bool)
        for name, weight in asdict(new_items).items():
            if type(weight) is not float or not abs(weight) <= LARGEST_WEIGHT:
                raise ValueError(f"{FILE}: {name} is {weight!r}, which is not possible")
        try:
            ranker = cls(Tables.load(files), recipe, groups, files[TREES].decode(), new_items)
            read = ranker.booster.feature_name()
        except ValueError as error:
            raise ValueError(f"{TREES}: {error}") from None
        if not names == feature_names(groups) == tuple(read):
            raise ValueError(f"{FILE}: the features are not the ones that this code computes")
        return ranker


def columns_of_new(groups: FeatureGroups) -> list[int]:
    """Columns of READ_OF_NEW in a table of features."""
    names = feature_names(groups)
    return [names.index(name) for name in READ_OF_NEW]


def _check(values: Mapping[str, Any], kind: type[int]) -> None:
    for name, value in values.items():
        if type(value) is not kind or value < 0:
            raise ValueError(f"{FILE}: {name} is {value!r}, which is not possible")

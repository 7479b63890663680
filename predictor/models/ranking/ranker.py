"""The second stage: gradient-boosted trees order a few hundred candidates.

Ke et al., 2017, "LightGBM"; the trees are fitted by predictor.learning.ranking.fitting.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import lightgbm
import numpy as np
from numpy.typing import NDArray

from predictor.models.history import Histories
from predictor.models.ranking.candidates import Recipe, candidates
from predictor.models.ranking.features import FeatureGroups, GetVectors, feature_names, features
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.tables import Tables

FILE = "ranker.json"
TREES = "ranker.txt"

STEP = 1e-5
"""Between scores of items that are put side by side."""


@dataclass(frozen=True)
class Ranker:
    """Candidates of a history and their order."""

    tables: Tables
    recipe: Recipe
    groups: FeatureGroups
    trees: str
    """LightGBM's text format."""

    @cached_property
    def booster(self) -> lightgbm.Booster:
        """The trees, read."""
        return lightgbm.Booster(model_str=self.trees)

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
        return place_new(pairs, scores, model_scores, self.tables.new(pairs.item))

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
            names = tuple(head["features"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{FILE}: {error}") from None
        _check(asdict(recipe), int)
        _check(asdict(groups), bool)
        try:
            ranker = cls(Tables.load(files), recipe, groups, files[TREES].decode())
            read = ranker.booster.feature_name()
        except (lightgbm.basic.LightGBMError, UnicodeDecodeError) as error:
            raise ValueError(f"{TREES}: {error}") from None
        if not names == feature_names(groups) == tuple(read):
            raise ValueError(f"{FILE}: the features are not the ones that this code computes")
        return ranker


def place_new(
    pairs: Pairs,
    scores: NDArray[np.float32],
    model_scores: NDArray[np.float32],
    new: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Scores in which items that nobody had yet keep the places that the model gives them.

    Trees that learn from what happened learn that an item without events does not happen. The
    model places such an item by its text, among all candidates; the others keep the trees' order
    around it.

    Args:
        pairs: the candidates.
        scores: (pairs,) of the trees.
        model_scores: (pairs,) of the sequence model; NaN is the lowest.
        new: (pairs,) whether the item is new.

    Returns:
        (pairs,): of the others, the scores as they were; a new item's lies just below the one of
        the place before.
    """
    if not new.any():
        return scores
    model_scores = np.nan_to_num(model_scores, nan=-np.inf)
    place = pairs.rank(model_scores)
    among_new = pairs.rank(np.where(new, -place.astype(np.float64), -np.inf))
    among_old = pairs.rank(np.where(new, -np.inf, scores))
    # A new item lies behind as many old ones as the model scores higher.
    behind = place - among_new
    by = np.lexsort((among_new, np.where(new, behind - 0.5, among_old), pairs.row))
    last_old = np.maximum.accumulate(np.where(new[by], -1, np.arange(len(by))))
    found = scores.copy()
    below = np.empty_like(scores)
    below[by] = scores[by][np.maximum(last_old, 0)]
    highest = pairs.per_row(np.where(new, -np.inf, scores), np.maximum)
    step = STEP * (1 + among_new)
    first = np.where(np.isfinite(highest), highest + STEP / (1 + among_new), model_scores)
    found[new] = np.where(behind == 0, first, below - step)[new]
    return found


def _check(values: Mapping[str, Any], kind: type[int]) -> None:
    for name, value in values.items():
        if type(value) is not kind or value < 0:
            raise ValueError(f"{FILE}: {name} is {value!r}, which is not possible")

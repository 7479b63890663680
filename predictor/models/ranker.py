"""The second stage: gradient-boosted trees order a few hundred candidates.

Ke et al., 2017, "LightGBM"; the trees are fitted by predictor.learning.ranking.
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

from predictor.models.candidates import Recipe, candidates
from predictor.models.features import FeatureGroups, GetVectors, feature_names, features
from predictor.models.history import Histories
from predictor.models.pairs import Pairs
from predictor.models.tables import Tables

FILE = "ranker.json"
TREES = "ranker.txt"


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
        return self.score_features(table)

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


def _check(values: Mapping[str, Any], kind: type[int]) -> None:
    for name, value in values.items():
        if type(value) is not kind or value < 0:
            raise ValueError(f"{FILE}: {name} is {value!r}, which is not possible")

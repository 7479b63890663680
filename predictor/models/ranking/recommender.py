"""Classic recommenders, one or a blend of several, in the place of the ranker. numpy and scipy.

- `item_knn`: items that the same users had; summed cosine with the items of the history (Sarwar et
  al., 2001), each user weighted by the inverse root of how many items they had (Deshpande and
  Karypis, 2004).
- `user_knn`: what similar users had; their counts, weighted with the cosine (Resnick et al., 1994).
- `matrix_factorisation`: implicit feedback, weighted alternating least squares (Hu, Koren and
  Volinsky, 2008). The user's factors are solved for from the history, so that users who came after
  training, and events that did, count like any others.
- `content`: what the version's Search gives: nearest texts.
- `personal`: how often the history has the item, an event counting less with its age.
- `popular`: log of the events in training.

A blend's score is the weighted sum of its methods', each scaled to 0 to 1 within a history; only
`content` is as the search gives it. They are fitted by predictor.learning.ranking.recommenders.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from scipy import sparse  # type: ignore[import-untyped]

from predictor.models.history import Histories, Ints, starts
from predictor.models.ranking.features import GetVectors
from predictor.models.ranking.pairs import ITEMS, Pairs

Floats = NDArray[np.float32]

HEAD = "recommender.json"
TENSORS = "recommender.safetensors"

METHODS = ("item_knn", "user_knn", "matrix_factorisation", "content", "personal", "popular")

RECOMMENDERS: Mapping[str, tuple[str, ...]] = {
    "item_knn": ("item_knn",),
    "user_knn": ("user_knn",),
    "matrix_factorisation": ("matrix_factorisation",),
    "hybrid": METHODS,
}
"""By name: the methods that are read."""

CANDIDATES = 200
"""Best items of a history that are answered from, where nothing else is asked for."""

SEARCHED = 200
"""The same of those that Search gives, where it counts."""

HALF_LIVES = {
    "item_knn": 2.0,
    "user_knn": np.inf,
    "matrix_factorisation": np.inf,
    "personal": 20.0,  # as in the baseline decayed_frequency
}
"""In baskets, of an item of the history in the methods that read it."""

AT_ONCE = 8_000_000
"""Scores of one method, or likenesses of users, that are looked at together: bounds memory."""

LARGEST = 1e6
"""Of weights, factors and settings, which float32 can still add up; 1 / LARGEST the least."""

LARGEST_VALUE = 40.0
"""Of Recommender.had: e to it is more events than anybody counts."""

TIES = np.float32(1e-6)
"""What popularity adds to a score between 0 and 1: no more than order among equal ones."""


@dataclass(frozen=True)
class Factors:
    """Of a matrix factorisation."""

    items: Floats
    """(items, factors)."""
    alpha: float
    """A weight w of the history is believed as much as alpha * w events."""
    regularisation: float

    def users(self, weights: sparse.csr_matrix) -> Floats:
        """(rows, factors) that fit histories (rows, items) best: one least squares step."""
        gram = self._gram
        found = np.zeros((weights.shape[0], self.items.shape[1]), np.float32)
        for row in np.flatnonzero(np.diff(weights.indptr)).tolist():
            part = slice(weights.indptr[row], weights.indptr[row + 1])
            items = self.items[weights.indices[part]]
            trust = np.float32(self.alpha) * weights.data[part]
            with contextlib.suppress(np.linalg.LinAlgError):  # of a stranger's factors
                found[row] = np.linalg.solve(gram + (items.T * (trust - 1)) @ items, trust @ items)
        return found

    @cached_property
    def _gram(self) -> Floats:
        ridge = np.float32(self.regularisation) * np.eye(self.items.shape[1], dtype=np.float32)
        return self.items.T @ self.items + ridge


@dataclass(frozen=True)
class Recommender:
    """Scores of all items of the catalogue at training, from histories."""

    weights: Mapping[str, float]
    """Of the METHODS that are read; positive."""
    had: sparse.csr_matrix
    """(users, items) float32 log(1 + events) in training, of some of its users."""
    factors: Factors | None
    """None where no method reads them."""
    repeats: bool
    """Whether items of the history are answered where nothing is said about it."""
    neighbours: int = 100
    """Similar users in user_knn."""

    # What serving and evaluation see of a second stage: these, `candidates`, `score` and `files`.

    @property
    def items(self) -> int:
        """Items of the catalogue at training."""
        count: int = self.had.shape[1]
        return count

    @property
    def searched(self) -> int:
        """Items that Search is asked for."""
        return SEARCHED if "content" in self.weights else 0

    def finds(self, k: int) -> bool:
        """Whether k items are found without more from Search."""
        return 2 * k <= min(CANDIDATES, self.items)

    def candidates(
        self,
        histories: Histories,
        searched: Pairs,
        *,
        repeats: bool | None = None,
        denied: Pairs | None = None,
    ) -> Pairs:
        """The best items by all methods but `content`, and those that were searched.

        Args:
            histories: whole ones.
            searched: the Search hits.
            repeats: whether items of the history may be answered; None: as in training.
            denied: pairs that may not.
        """
        own = Pairs.of(histories.row, histories.item)
        left_out = Pairs(own.row[:0], own.item[:0]) if denied is None else denied
        if not (self.repeats if repeats is None else repeats):
            left_out = left_out | own
        found = [searched]
        for rows, blended in self.blended(histories):
            some = Pairs.of(*_within(left_out, rows, self.items))
            blended[some.row, some.item] = -np.inf
            count = min(CANDIDATES, self.items)
            # From the front: where most scores are equal and low, the other end takes far longer.
            best = np.argpartition(-blended, count - 1, axis=1)[:, :count]
            row = np.repeat(np.arange(len(best)), count)
            finite = np.isfinite(blended[row, best.ravel()])
            found.append(Pairs.of(row[finite] + rows.start, best.ravel()[finite]))
        every = np.concatenate([pairs.key for pairs in found])
        return Pairs.of(every // ITEMS, every % ITEMS) - left_out

    def score(
        self, histories: Histories, pairs: Pairs, model_scores: Floats, vectors: GetVectors
    ) -> Floats:
        """(pairs,) the higher the better; those of one history compare.

        An item that is newer than the catalogue at training has the score of its text, where that
        is read, and else the lowest.

        Args:
            histories: as for candidates.
            pairs: any.
            model_scores: (pairs,) of Search.
            vectors: not read.
        """
        scores = np.zeros(len(pairs), np.float32)
        for rows, blended in self.blended(histories):
            part = slice(*np.searchsorted(pairs.row, [rows.start, rows.stop]))
            row, item = pairs.row[part] - rows.start, pairs.item[part]
            known = item < self.items
            scores[part][known] = blended[row[known], item[known]]
        if "content" in self.weights:
            scores += np.float32(self.weights["content"]) * np.nan_to_num(model_scores)
        return scores

    def blended(self, histories: Histories) -> Iterator[tuple[slice, Floats]]:
        """Rows of histories, and their scores (rows, items) by all methods but `content`."""
        for rows, scores in self.method_scores(histories):
            blended = np.tile(TIES * self._popular, (rows.stop - rows.start, 1))
            for name, values in scores.items():
                blended += np.float32(self.weights[name]) * values
            yield rows, blended

    def method_scores(self, histories: Histories) -> Iterator[tuple[slice, dict[str, Floats]]]:
        """Rows of histories, and what each method but `content` gives them: (rows, items) 0 to 1.

        Where a method knows nothing of a history, all its scores are zero.
        """
        step = max(1, AT_ONCE // max(self.had.shape))
        had = self._read(histories)
        for begin in range(0, len(histories), step):
            rows = slice(begin, min(begin + step, len(histories)))
            own = {name: weights[rows] for name, weights in had.items()}
            scores = {}
            if "item_knn" in own:
                scores["item_knn"] = _to_one(self._item_knn(own["item_knn"]))
            if "user_knn" in own:
                scores["user_knn"] = _to_one(self._user_knn(own["user_knn"].log1p()))
            if "matrix_factorisation" in own and self.factors is not None:
                users = self.factors.users(own["matrix_factorisation"].log1p())
                scores["matrix_factorisation"] = _to_one(users @ self.factors.items.T)
            if "personal" in own:
                scores["personal"] = _to_one(own["personal"].toarray())
            if "popular" in self.weights:
                scores["popular"] = np.tile(self._popular, (rows.stop - begin, 1))
            yield rows, scores

    def _item_knn(self, own: sparse.csr_matrix) -> Floats:
        # By way of the users: the table of all pairs of items may not fit into memory.
        dense: Floats = (own @ self._by_user @ self._by_item).toarray()
        return dense

    def _user_knn(self, own: sparse.csr_matrix) -> Floats:
        similar = (unit_rows(own) @ self._unit_users.T).toarray()
        k = min(self.neighbours, similar.shape[1])
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        weights = np.take_along_axis(similar, nearest, axis=1)
        bounds = np.arange(len(similar) + 1) * k
        some = sparse.csr_matrix((weights.ravel(), nearest.ravel(), bounds), similar.shape)
        dense: Floats = (some @ self.had).toarray()
        return dense

    @cached_property
    def _popular(self) -> Floats:
        """(items,) log of events, up to 1."""
        counts = np.bincount(self.had.indices, np.expm1(self.had.data), self.items)
        logs: Floats = np.log1p(counts).astype(np.float32)
        return logs / max(float(logs.max(initial=0.0)), 1e-6)

    @cached_property
    def _by_item(self) -> sparse.csr_matrix:
        """(users, items) of unit length for each item, had or not."""
        had = self.had.copy()
        had.data = np.ones_like(had.data)
        per_item = np.asarray(had.sum(axis=0)).ravel()
        scale = (1 / np.sqrt(np.maximum(1, per_item))).astype(np.float32)
        return (had @ sparse.diags(scale)).tocsr()

    @cached_property
    def _by_user(self) -> sparse.csr_matrix:
        """(items, users) of the same, each user by the inverse root of how many items they had."""
        scale = (1 / np.sqrt(np.maximum(1, np.diff(self.had.indptr)))).astype(np.float32)
        return (sparse.diags(scale) @ self._by_item).T.tocsr()

    @cached_property
    def _unit_users(self) -> sparse.csr_matrix:
        return unit_rows(self.had)

    def _read(self, histories: Histories) -> dict[str, sparse.csr_matrix]:
        """For each method that reads histories (rows, items) how often one has each item, an event
        counting half after the method's half-life; events of one instant are a basket."""
        first = starts(histories.lengths)[histories.lengths > 0]
        new = np.diff(histories.timestamp, prepend=-1) != 0
        new[first] = True
        basket = np.cumsum(new)
        ends = np.cumsum(histories.lengths) - 1
        age = basket[ends[histories.row]] - basket if len(basket) else basket
        some = (histories.item >= 0) & (histories.item < self.items)
        at = (histories.row[some], histories.item[some])
        shape = (len(histories), self.items)
        by_half_life = {}
        for half_life in {HALF_LIVES[name] for name in self.weights.keys() & HALF_LIVES.keys()}:
            values = np.exp2(-age[some] / half_life).astype(np.float32)
            by_half_life[half_life] = sparse.csr_matrix((values, at), shape, dtype=np.float32)
        return {
            name: by_half_life[half_life]
            for name, half_life in HALF_LIVES.items()
            if name in self.weights
        }

    def files(self) -> dict[str, bytes]:
        """The recommender as bytes, see `load`."""
        head: dict[str, Any] = {
            "weights": dict(self.weights),
            "repeats": self.repeats,
            "neighbours": self.neighbours,
        }
        tensors: dict[str, NDArray[Any]] = {
            "first": self.had.indptr.astype(np.int64),
            "item": self.had.indices.astype(np.int32),
            "value": self.had.data.astype(np.float32),
            "items": np.array([self.items]),
        }
        if self.factors is not None:
            head |= {"alpha": self.factors.alpha, "regularisation": self.factors.regularisation}
            tensors["factors"] = self.factors.items
        return {HEAD: json.dumps(head, indent=1).encode(), TENSORS: save_tensors(tensors)}

    @classmethod
    def load(cls, files: Mapping[str, bytes]) -> Recommender:
        """The recommender from its files.

        Raises:
            ValueError: one is missing or damaged; says which and how.
        """
        for name in (HEAD, TENSORS):
            if name not in files:
                raise ValueError(f"{name} is missing")
        try:
            tensors = load_tensors(files[TENSORS])
            had = _matrix(tensors)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{TENSORS}: {error}") from None
        try:
            head = json.loads(files[HEAD])
            weights = {str(name): float(weight) for name, weight in head["weights"].items()}
            if not weights or not weights.keys() <= set(METHODS):
                raise ValueError(f"weights are not of {', '.join(METHODS)}")
            for name, weight in weights.items():
                _check_number(name, weight)
            if not isinstance(head["repeats"], bool):
                raise ValueError("repeats is neither true nor false")
            if type(head["neighbours"]) is not int or head["neighbours"] < 1:
                raise ValueError("neighbours is no positive number")
            factors = None
            if "matrix_factorisation" in weights:
                factors = _factors(tensors, head, had.shape[1])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{HEAD}: {error}") from None
        return cls(weights, had, factors, head["repeats"], head["neighbours"])


def _matrix(tensors: Mapping[str, NDArray[Any]]) -> sparse.csr_matrix:
    kinds = {"first": np.int64, "item": np.int32, "value": np.float32, "items": np.int64}
    first, item, value, items = (tensors[name] for name in kinds)
    for name, kind in kinds.items():
        if tensors[name].ndim != 1 or tensors[name].dtype != kind:
            raise ValueError(f"{name} is {tensors[name].dtype} {tensors[name].shape}")
    if len(items) != 1 or not 0 < items[0] < ITEMS or len(item) != len(value) or len(first) < 2:
        raise ValueError("sizes do not fit together")
    if first[0] != 0 or first[-1] != len(item) or (np.diff(first) < 0).any():
        raise ValueError("first does not ascend from 0 to the number of values")
    if (first < 0).any() or (first > len(item)).any():
        raise ValueError("first is out of range")
    if not len(item):
        raise ValueError("nobody had anything")
    within = item.min() >= 0 and item.max() < items[0]
    if not (within and value.min() > 0 and value.max() <= LARGEST_VALUE):
        raise ValueError("an item or value is out of range")
    rising = np.diff(item) > 0
    rising[first[(first > 0) & (first < len(item))] - 1] = True  # from one user to the next
    if not rising.all():
        raise ValueError("the items of a user do not ascend")
    return sparse.csr_matrix((value, item, first), (len(first) - 1, int(items[0])))


def _factors(tensors: Mapping[str, NDArray[Any]], head: Mapping[str, Any], items: int) -> Factors:
    found = tensors["factors"]
    if found.ndim != 2 or len(found) != items or found.dtype != np.float32 or not found.shape[1]:
        raise ValueError(f"factors are {found.dtype} {found.shape}, not of {items} items")
    if not np.abs(found).max(initial=0.0) <= LARGEST:
        raise ValueError("factors are out of range")
    settings = {name: float(head[name]) for name in ("alpha", "regularisation")}
    for name, value in settings.items():
        _check_number(name, value)
    return Factors(found, **settings)


def _check_number(name: str, value: float) -> None:
    if not 1 / LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} is {value:g}, which is out of range")


def _within(pairs: Pairs, rows: slice, items: int) -> tuple[Ints, Ints]:
    """Of some rows, counted from the first, and items below a number."""
    part = slice(*np.searchsorted(pairs.row, [rows.start, rows.stop]))
    row, item = pairs.row[part] - rows.start, pairs.item[part]
    return row[item < items], item[item < items]


def _to_one(scores: Floats) -> Floats:
    """Rows scaled to a largest score of 1, and before that lifted to 0 where some are negative."""
    least = scores.min(axis=1, keepdims=True, initial=0.0)
    most = scores.max(axis=1, keepdims=True, initial=0.0)
    scaled: Floats = (scores - least) / np.maximum(most - least, np.float32(1e-12))
    return scaled


def unit_rows(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The rows with length one; those of zeros stay."""
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return (sparse.diags((1 / np.maximum(norms, 1e-12)).astype(np.float32)) @ matrix).tocsr()

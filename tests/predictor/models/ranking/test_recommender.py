"""The classic recommenders against plain libraries and loops, and as a second stage."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from implicit.als import AlternatingLeastSquares
from numpy.typing import NDArray
from safetensors.numpy import load, save
from scipy import sparse  # type: ignore[import-untyped]
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from predictor.models.history import Histories
from predictor.models.ranking import recommender as module
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.recommender import HEAD, METHODS, TENSORS, Factors, Recommender

ITEMS = 40
USERS = 30


def training(seed: int = 0) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.4, (USERS, ITEMS)) * rng.integers(1, 4, (USERS, ITEMS))
    counts[:, 0] = 1  # nobody is empty
    return sparse.csr_matrix(np.log1p(counts), dtype=np.float32)


def histories(rows: list[list[int]], times: list[list[int]] | None = None) -> Histories:
    lengths = np.array([len(row) for row in rows])
    item = np.array([item for row in rows for item in row], np.int64)
    ordered = np.concatenate([np.arange(length) for length in lengths]).astype(np.int64)
    given = ordered if times is None else np.array([time for row in times for time in row])
    return Histories(item, np.zeros_like(item), given, lengths, np.full(len(rows), 99))


HISTORIES = histories([[1, 2, 2, 5], [], [7], [39, 3, 3, 3, 8, 1], [50, 4]])
"""The item 50 is newer than training."""


def recommender(*methods: str, factors: Factors | None = None) -> Recommender:
    return Recommender(dict.fromkeys(methods, 1.0), training(), factors, repeats=True)


def factors() -> Factors:
    found = np.random.default_rng(5).normal(size=(ITEMS, 6)).astype(np.float32)
    return Factors(found, 10.0, 0.1)


def dense(one: Recommender, some: Histories = HISTORIES) -> NDArray[np.float32]:
    return np.concatenate([scores for _, scores in one.blended(some)])


def counts_of(some: Histories) -> NDArray[np.float32]:
    counts = np.zeros((len(some), ITEMS), np.float32)
    for row, item in zip(some.row, some.item, strict=True):
        if item < ITEMS:
            counts[row, item] += 1
    return counts


def test_user_knn_is_what_a_library_finds() -> None:
    had, own = training(), np.log1p(counts_of(HISTORIES))
    found = dense(replace(recommender("user_knn"), neighbours=7))
    library = NearestNeighbors(n_neighbors=7, metric="cosine").fit(had)
    for row in (0, 2, 3, 4):
        distance, near = library.kneighbors(own[row : row + 1])
        wanted = (1 - distance) @ had[near[0]].toarray()
        assert found[row] == pytest.approx(wanted[0] / wanted.max(), abs=2e-5)


def test_matrix_factorisation_reads_a_history_as_the_library_does() -> None:
    with threadpool_limits(1, "blas"):
        library = AlternatingLeastSquares(
            8, regularization=0.05, alpha=10.0, iterations=5, random_state=1, num_threads=1
        )
        library.fit(training(), show_progress=False)
    ours = Factors(library.item_factors, 10.0, 0.05)
    found = dense(recommender("matrix_factorisation", factors=ours))
    for row in (0, 2, 3):
        own = sparse.csr_matrix(np.log1p(counts_of(HISTORIES)[row : row + 1]))
        user = library.recalculate_user(row, own)
        wanted = np.asarray(user) @ library.item_factors.T
        assert wanted.min() < 0
        scaled = (wanted - wanted.min()) / (wanted.max() - wanted.min())
        assert found[row] == pytest.approx(scaled, abs=1e-3)


def test_item_knn_is_a_sum_over_the_users_of_both_items() -> None:
    some = histories([[1, 2, 5]], [[10, 10, 30]])  # 1 and 2 are a basket before
    had = training().toarray() > 0
    per_item, per_user = had.sum(0), had.sum(1)
    weights = {1: 0.5**0.5, 2: 0.5**0.5, 5: 1.0}
    wanted = np.zeros(ITEMS)
    for item, weight in weights.items():
        for other in range(ITEMS):
            both = (had[:, item] & had[:, other]) / np.sqrt(per_user)
            wanted[other] += weight * both.sum() / np.sqrt(per_item[item] * per_item[other])
    assert dense(recommender("item_knn"), some)[0] == pytest.approx(wanted / wanted.max(), abs=2e-5)


def test_without_history_what_is_popular_comes_first() -> None:
    popular = np.expm1(training().toarray()).sum(0)
    for methods in (["item_knn"], ["user_knn"], ["matrix_factorisation"], ["content"], METHODS):
        found = dense(recommender(*methods, factors=factors()))[1]
        assert np.isfinite(found).all()
        assert np.argsort(-found, kind="stable")[0] == popular.argmax()


def test_personal_counts_less_what_is_long_ago() -> None:
    found = dense(recommender("personal"), histories([[1, 1, 2]], [[10, 20, 30]]))[0]
    older, old = 0.5 ** (2 / 20), 0.5 ** (1 / 20)
    assert found[1] == pytest.approx(1, abs=1e-5)
    assert found[2] == pytest.approx(1 / (older + old), abs=1e-5)
    assert found[3:].max() < 1e-5


def test_a_blend_is_the_weighted_sum() -> None:
    parts = ("item_knn", "user_knn", "popular")
    weights = dict(zip(parts, (2.0, 0.5, 1.5), strict=True))
    blended = replace(recommender(*parts), weights=weights)
    wanted = sum(weight * dense(recommender(name)) for name, weight in weights.items())
    assert dense(blended) == pytest.approx(np.asarray(wanted), abs=1e-4)


def test_rows_looked_at_apart_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one = recommender(*METHODS, factors=factors())
    whole = dense(one)
    pairs = one.candidates(HISTORIES, NO_PAIRS)
    monkeypatch.setattr(module, "AT_ONCE", 2 * ITEMS)
    assert np.array_equal(dense(one), whole)
    assert np.array_equal(one.candidates(HISTORIES, NO_PAIRS).key, pairs.key)


NO_PAIRS = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))


def test_candidates_are_the_best_with_what_search_gives_less_what_is_denied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 5)
    one = recommender("item_knn")
    scores = dense(one)
    searched = Pairs.of(np.array([0, 3, 3]), np.array([55, 20, 21]))
    denied = Pairs.of(np.array([0, 3]), np.array([int(scores[0].argmax()), 21]))
    found = one.candidates(HISTORIES, searched, repeats=True, denied=denied)
    for row in range(len(HISTORIES)):
        allowed = scores[row].copy()
        allowed[denied.item[denied.row == row]] = -np.inf
        wanted = set(np.argsort(-allowed)[:5].tolist())
        wanted |= set(searched.item[searched.row == row].tolist())
        wanted -= set(denied.item[denied.row == row].tolist())
        assert set(found.item[found.row == row].tolist()) == wanted
    once = one.candidates(HISTORIES, searched, repeats=False)
    own = Pairs.of(HISTORIES.row, HISTORIES.item)
    assert not once.within(own).any()
    assert np.bincount(once.row, minlength=5).tolist() == [6, 5, 5, 7, 5]


def test_scores_of_pairs_are_those_of_all_items_and_new_ones_count_by_their_text() -> None:
    one = recommender(*METHODS, factors=factors())
    pairs = Pairs.of(np.array([0, 0, 3, 3, 4]), np.array([2, 50, 0, 39, 51]))
    model = np.array([0.5, 0.75, np.nan, 0.25, -1.0], np.float32)
    found = one.score(HISTORIES, pairs, model, lambda item: np.zeros((len(item), 1), np.float32))
    of_items = dense(one)
    wanted = [of_items[0, 2] + 0.5, 0.75, of_items[3, 0], of_items[3, 39] + 0.25, -1.0]
    assert found == pytest.approx(wanted, abs=1e-5)


def test_search_is_asked_only_where_it_counts() -> None:
    assert recommender("item_knn").searched == 0
    assert recommender("item_knn", "content").searched > 0
    assert recommender("item_knn").finds(10)
    assert not recommender("item_knn").finds(ITEMS)


def test_it_comes_back_from_its_files() -> None:
    one = replace(
        recommender(factors=factors()), weights={"matrix_factorisation": 0.25, "item_knn": 2.0}
    )
    again = Recommender.load(one.files())
    assert again.weights == one.weights
    assert np.array_equal(dense(again), dense(one))
    assert again.files() == one.files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {}}, "weights are not"),
        ({"weights": {"magic": 1.0}}, "weights are not"),
        ({"weights": {"item_knn": -1.0}}, "out of range"),
        ({"weights": {"item_knn": 1e300}}, "out of range"),
        ({"weights": {"item_knn": float("nan")}}, "out of range"),
        ({"regularisation": 1e-300}, "regularisation"),
        ({"weights": 3}, "items"),
        ({"repeats": 1}, "repeats"),
        ({"neighbours": 0}, "neighbours"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_a_head_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    files = recommender("matrix_factorisation", factors=factors()).files()
    files[HEAD] = json.dumps(json.loads(files[HEAD]) | change).encode()
    with pytest.raises(ValueError, match=f"{HEAD}.*{message}"):
        Recommender.load(files)


FILLED = training().nnz


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("item", np.array([ITEMS], np.int32)),
        ("first", np.zeros(1, np.int64)),
        ("first", np.array([0, 5, 3], np.int64)),
        ("first", np.array([0, 2**63 - 1, -5, FILLED], np.int64)),
        ("item", np.zeros(FILLED, np.int32)),
        ("value", np.full(FILLED, 100.0, np.float32)),
        ("value", np.zeros(3, np.float64)),
        ("items", np.array([0])),
        ("factors", np.zeros((3, 4), np.float32)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, value: NDArray[np.generic]) -> None:
    files = recommender("matrix_factorisation", factors=factors()).files()
    files[TENSORS] = save({**load(files[TENSORS]), name: value})
    with pytest.raises(ValueError, match=TENSORS if name != "factors" else "factors"):
        Recommender.load(files)

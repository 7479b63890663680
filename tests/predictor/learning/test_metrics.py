"""Metrics against small cases worked out by hand, and scikit-learn where it has the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score, roc_auc_score

from foretell.importing import EventColumns
from predictor.learning.data import Targets, to_events
from predictor.learning.metrics import Floats, ItemScorer, item_metrics
from predictor.learning.type_metrics import roc_auc, type_metrics
from predictor.models.history import UNKNOWN

ITEMS = 20


def targets(baskets: list[list[int]], histories: list[list[int]] | None = None) -> Targets:
    """One context per basket, with a history of these items."""
    histories = histories or [[0] for _ in baskets]
    lengths = [len(history) for history in histories]
    user = np.repeat(np.arange(len(histories)), lengths)
    item = np.concatenate([np.array(history, np.int64) for history in histories])
    columns = EventColumns(
        [f"u{n}" for n in range(len(histories))], ["buy"], [f"i{n}" for n in range(ITEMS)], [],
        user, np.zeros_like(user), item, np.full_like(user, -1), None,
    )  # fmt: skip
    events = to_events(columns, [f"i{n}" for n in range(ITEMS)])
    sizes = [len(basket) for basket in baskets]
    lines = np.array([i for basket in baskets for i in basket], np.int64)
    return Targets(
        events,
        events.first_of_user[:-1],
        events.first_of_user[1:],
        np.repeat(np.arange(len(baskets)), sizes),
        lines,
        np.full(len(lines), -1),
        np.zeros(len(baskets), np.int64),
    )


def fixed(scores: list[list[float]]) -> ItemScorer:
    matrix = np.array(scores, np.float32)
    return lambda _, rows: matrix[rows]


WARM: NDArray[np.bool_] = np.ones(ITEMS, np.bool_)
FALLING = [float(ITEMS - n) for n in range(ITEMS)]
"""Item n has rank n + 1."""


def test_hits_recall_and_ndcg_of_a_basket() -> None:
    metrics = item_metrics(fixed([FALLING]), targets([[0, 2, 15, 2]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(2 / 3)  # a line that comes twice counts once
    assert metrics["recall_at_10"] == pytest.approx(2 / 3)
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert metrics["ndcg_at_10"] == pytest.approx((1 + 1 / 2) / ideal)
    assert metrics["coverage_at_10"] == pytest.approx(0.5)
    assert metrics["contexts"] == 1


def test_hits_divide_by_ten_where_a_basket_is_larger() -> None:
    metrics = item_metrics(
        fixed([FALLING]), targets([list(range(ITEMS))]), WARM, exclude_history=False
    )
    assert metrics["hits_at_10"] == pytest.approx(1.0)
    assert metrics["recall_at_10"] == pytest.approx(0.5)
    assert metrics["ndcg_at_10"] == pytest.approx(1.0)


def test_constant_scores_hit_nothing() -> None:
    metrics = item_metrics(fixed([[1.0] * ITEMS]), targets([[0, 1]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 0


def test_a_tie_counts_against_the_target() -> None:
    scores = [*FALLING[:9], *[5.0] * (ITEMS - 9)]  # nine above, eleven tied for rank ten
    metrics = item_metrics(fixed([scores]), targets([[9], [8]][:1]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 0
    metrics = item_metrics(fixed([scores]), targets([[8]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == 1


def test_an_unknown_item_is_a_miss_and_counts_in_the_size() -> None:
    metrics = item_metrics(fixed([FALLING]), targets([[0, UNKNOWN]]), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(0.5)
    assert metrics["cold_targets"] == 1


def test_warm_and_cold_targets_are_told_apart() -> None:
    warm = WARM.copy()
    warm[[1, 15]] = False
    metrics = item_metrics(fixed([FALLING]), targets([[0, 1, 15, 16]]), warm, exclude_history=False)
    assert metrics["warm_recall_at_10"] == pytest.approx(0.5)
    assert metrics["cold_recall_at_10"] == pytest.approx(0.5)
    assert (metrics["warm_targets"], metrics["cold_targets"]) == (2, 2)


def test_excluded_history_is_neither_ranked_nor_a_target() -> None:
    asked = targets([[0, 10], [1]], [[0, 3], [1]])
    scorer = fixed([FALLING, FALLING])
    allowed = item_metrics(scorer, asked, WARM, exclude_history=False)
    assert allowed["contexts"] == 2
    metrics = item_metrics(scorer, asked, WARM, exclude_history=True)
    # Of the first basket item 10 is left, which two excluded items lift to rank nine.
    assert metrics["contexts"] == 1
    assert metrics["hits_at_10"] == 1


def test_more_contexts_than_a_batch() -> None:
    count = 600
    scorer: ItemScorer = lambda _, rows: np.tile(  # noqa: E731
        np.array(FALLING, np.float32), (rows.stop - rows.start, 1)
    )
    baskets = [[0] if n % 3 == 0 else [19] for n in range(count)]
    metrics = item_metrics(scorer, targets(baskets), WARM, exclude_history=False)
    assert metrics["hits_at_10"] == pytest.approx(1 / 3)
    assert metrics["contexts"] == count


@pytest.fixture
def predicted() -> tuple[Floats, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 300).astype(np.float32)
    cumulated = probabilities.cumsum(axis=1)
    true = (rng.random((300, 1)) > cumulated).sum(axis=1).clip(max=2)
    return probabilities, true.astype(np.int64)


def test_type_metrics_agree_with_scikit_learn(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted
    metrics = type_metrics(probabilities, true, ["a", "b", "c"])
    guess = probabilities.argmax(axis=1)
    assert metrics["accuracy"] == pytest.approx((guess == true).mean())
    assert metrics["precision"] == pytest.approx(precision_score(true, guess, average="macro"))
    assert metrics["recall"] == pytest.approx(recall_score(true, guess, average="macro"))
    assert metrics["f1"] == pytest.approx(f1_score(true, guess, average="macro"))
    assert metrics["log_loss"] == pytest.approx(log_loss(true, probabilities), rel=1e-5)
    areas = [roc_auc_score(true == code, probabilities[:, code]) for code in range(3)]
    assert metrics["roc_auc"] == pytest.approx(np.mean(areas))
    one_hot = np.eye(3)[true]
    assert metrics["mse"] == pytest.approx(((probabilities - one_hot) ** 2).sum(1).mean())
    assert np.sum(metrics["confusion_matrix"]) == 300
    assert metrics["confusion_matrix"][1][2] == ((true == 1) & (guess == 2)).sum()


def test_calibration_error_sees_overconfidence(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted  # the truth was drawn from them
    honest = type_metrics(probabilities, true, ["a", "b", "c"])["ece"]
    sharp = probabilities**4 / (probabilities**4).sum(axis=1, keepdims=True)
    assert type_metrics(sharp, true, ["a", "b", "c"])["ece"] > 2 * honest


def test_a_type_that_training_never_saw_is_wrong_but_has_no_probability(
    predicted: tuple[Floats, NDArray[np.int64]],
) -> None:
    probabilities, true = predicted
    known = type_metrics(probabilities, true, ["a", "b", "c"])
    doubled = np.concatenate([true, np.full(300, UNKNOWN)])
    metrics = type_metrics(np.tile(probabilities, (2, 1)), doubled, ["a", "b", "c"])
    assert metrics["accuracy"] == pytest.approx(known["accuracy"] / 2)
    assert metrics["log_loss"] == pytest.approx(known["log_loss"])
    assert metrics["unknown_types"] == 300


def test_roc_auc_of_ties_is_a_half_and_of_one_class_none() -> None:
    positive = np.array([True, False, True])
    assert roc_auc(np.ones(3, np.float32), positive) == pytest.approx(0.5)
    assert roc_auc(np.ones(3, np.float32), np.ones(3, np.bool_)) is None

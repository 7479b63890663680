"""Pictures: the curves are right, and whatever was measured gives a picture."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from predictor.learning.measures.metrics import Floats, ItemHits
from predictor.learning.reports import plots
from predictor.learning.reports.item_map import ItemMap
from predictor.learning.reports.plots import ItemResults, TypeResults, pictures
from predictor.learning.sequence.fitting import Epoch
from predictor.models.history import NONE

ALWAYS = {"confusion_matrix.png", "roc.png", "precision_recall.png", "type_calibration.png"}


def size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def scored() -> tuple[Floats, NDArray[np.bool_]]:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, 300).astype(np.float32)  # with ties
    return scores, rng.random(300) < scores / 25


def test_roc_points_agree_with_scikit_learn() -> None:
    scores, positive = scored()
    false_rate, true_rate = plots.roc_points(scores, positive)
    expected = roc_curve(positive, scores, drop_intermediate=False)
    assert false_rate == pytest.approx(expected[0])
    assert true_rate == pytest.approx(expected[1])


def test_precision_and_recall_agree_with_scikit_learn() -> None:
    scores, positive = scored()
    recall, precision, average = plots.precision_recall_points(scores, positive)
    expected_precision, expected_recall, _ = precision_recall_curve(positive, scores)
    assert recall == pytest.approx(expected_recall[::-1])
    assert precision[1:] == pytest.approx(expected_precision[::-1][1:])
    assert average == pytest.approx(average_precision_score(positive, scores))


def types(count: int, lines: int = 200) -> TypeResults:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(count), lines).astype(np.float32)
    true = rng.integers(0, count, lines)
    true[:3] = -2
    names = [f"type_{n}" for n in range(count)]
    return TypeResults(names, probabilities, true, probabilities.argmax(axis=1))


@pytest.mark.parametrize("count", [1, 40])
def test_any_number_of_types_gives_pictures(count: int) -> None:
    found = pictures(types=types(count))
    assert set(found) == ALWAYS
    assert all(min(size(png)) > 200 for png in found.values())


def test_a_single_line_gives_pictures() -> None:
    one = types(3, 5)
    few = TypeResults(one.names, one.probabilities[4:], one.true[4:], one.predicted[4:])
    assert set(pictures(types=few)) == ALWAYS


@pytest.mark.parametrize(("item_loss", "measures"), [(0.0, 0), (2.5, 5)])
def test_training_curve(item_loss: float, measures: int) -> None:
    validation = {f"measure_{n}_at_10": 0.5 for n in range(measures)}
    curve = [Epoch(n, item_loss, 1 / n, 0.0, validation, 0.5, 1.0) for n in (1, 2)]
    width, height = size(pictures(curve)["training.png"])
    # Panels in rows of three.
    panels = measures + 1
    assert width / height == pytest.approx(4 * min(3, panels) / (3.2 * -(-panels // 3)), rel=0.01)


def hits(contexts: int, returned: int) -> ItemHits:
    rng = np.random.default_rng(0)
    top_hit = rng.random((contexts, returned)) < 0.2
    top = np.tile(np.arange(returned), (contexts, 1))
    top[:, -1] = NONE
    return ItemHits(
        context=np.arange(contexts), user=np.arange(contexts),
        history_length=rng.integers(0, 50, contexts), size=np.full(contexts, 3),
        hits=rng.integers(0, 4, contexts), ndcg=rng.random(contexts),
        target_row=np.arange(contexts), target_item=rng.integers(-2, 30, contexts),
        target_hit=rng.random(contexts) < 0.3, top=top,
        top_score=rng.random((contexts, returned)).astype(np.float32), top_hit=top_hit,
    )  # fmt: skip


@pytest.mark.parametrize("contexts", [1, 100])
def test_items(contexts: int) -> None:
    found = hits(contexts, 12)
    measured = {"model": found, "popular": found, "item_knn": found}
    results = ItemResults(measured, np.arange(40) // 2)
    strata = {"recall_by_popularity.png", "recall_by_history.png"}
    assert set(pictures(items=results)) == strata
    probabilities = np.random.default_rng(1).random((contexts, 12)).astype(np.float32)
    results = ItemResults(measured, np.arange(40) // 2, probabilities)
    assert set(pictures(items=results)) == strata | {"item_calibration.png"}
    never = ItemResults(measured, np.arange(40), np.zeros((contexts, 12), np.float32))
    assert "item_calibration.png" in pictures(items=never)


def test_nothing_measured_gives_no_pictures() -> None:
    assert pictures() == {}
    assert pictures(items=ItemResults({"model": hits(0, 12)}, np.arange(40))) == {}


def test_a_map_with_more_groups_than_colours() -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"group {n}" for n in range(9))
    space = ItemMap(
        rng.random((50, 2)).astype(np.float32), rng.integers(0, 9, 50), names, "coloured"
    )
    assert size(pictures(space=space)["item_map.png"])[0] > 500

"""What is said of trials is said of their folds."""

from __future__ import annotations

import pytest

from predictor.learning.search.results import Found, Row, report, table
from predictor.learning.search.trial import LOG_LOSS, NDCG, Metric


def row(number: int, *folds: float, why: str | None = None) -> Row:
    mean = sum(folds) / len(folds) if folds else None
    return Row(number, {"dims": 32, "dropout": 0.25}, folds, mean, why, (1,) * len(folds), 1.25)


def notes(*rows: Row, metric: Metric = NDCG, fewest: int = 1000) -> str:
    return "\n".join(Found(metric, rows, fewest).notes)


def test_a_difference_alike_on_all_folds_is_none_of_noise() -> None:
    said = notes(row(1, 0.10, 0.20, 0.30), row(2, 0.11, 0.211, 0.309))
    assert "the best (trial 2) beats the settings without a search (trial 1)" in said
    assert "they differ by 0.0100 +- 0.0025 (95%, paired over 3 folds)" in said


def test_a_difference_of_one_fold_is_noise() -> None:
    said = notes(row(1, 0.10, 0.20, 0.30), row(2, 0.10, 0.20, 0.36), row(3, 0.10, 0.20, 0.33))
    assert "(trial 2) is within noise of the settings without a search" in said
    assert "(trial 2) is within noise of the second (trial 3)" in said


def test_where_less_is_better_the_least_is_the_best() -> None:
    found = Found(LOG_LOSS, [row(1, 0.5, 0.7), row(2, 0.4, 0.6), row(3, 0.1, why="pruned")], 1000)
    assert [one.number for one in found.ranking] == [2, 1]
    assert "(trial 2) beats" in found.notes[0]
    result = {**report(found), "folds": ["a", "b"], "folds_by": "time"}
    assert result["best"]["trial"] == 2
    result["space"] = {"dims": {}, "dropout": {}}
    lines = table(result).splitlines()
    assert lines[0].endswith("over 2 folds by time; 3 trials, 1 of them pruned")
    assert lines[1].split() == ["trial", "2", "1"]
    assert lines[2].split() == ["mean", "0.5", "0.6"]
    assert lines[5].split() == ["dims", "32", "32"]


def test_a_table_leaves_blank_what_has_no_effect() -> None:
    rows = [
        Row(1, {"model_type": "word2vec_logistic", "dims": 8}, (0.5,), 0.5, None, (), 1.0),
        Row(2, {"model_type": "logistic", "features": None, "dims": 32}, (0.4,), 0.4, None, (), 1),
    ]
    result = {**report(Found(LOG_LOSS, rows, 1000)), "folds": ["a"], "folds_by": "time"}
    result["space"] = {"model_type": {}, "features": {}, "dims": {}}
    lines = table(result).splitlines()
    assert lines[5].split() == ["model_type", "logistic", "word2vec_logistic"]
    assert lines[6].split() == ["features", "-"]
    assert [len(line) for line in lines[1:8]] == [len(lines[1])] * 7


@pytest.mark.parametrize(
    ("rows", "fewest", "said"),
    [
        ([row(1, 0.3, 0.3), row(2, 0.1, 0.1)], 1000, "no trial is better than"),
        ([row(1, 0.1), row(2, 0.3)], 1000, "one fold cannot tell"),
        ([row(1, 0.1, 0.1), row(2, 0.3, 0.3)], 1000, "the best of 2 trials is a little lucky"),
        ([row(1, 0.1, 0.1)], 7, "measured on 7 predictions alone"),
    ],
)
def test_what_makes_a_best_doubtful_is_said(rows: list[Row], fewest: int, said: str) -> None:
    assert said in notes(*rows, fewest=fewest)


def test_nothing_is_said_of_nothing() -> None:
    assert notes(row(1, why="it diverged")) == ""

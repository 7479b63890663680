from typing import Any

import pytest

from bench import train


def epoch(seconds: float, recall: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "validation": {"recall_at_10": recall, "ndcg_at_10": recall / 2},
        "peak_memory_mb": 100 * seconds,
    }


@pytest.mark.parametrize(
    ("recalls", "seconds"),
    [([0.1, 0.2, 0.3], 1), ([0.01, 0.09, 0.08], 3), ([0.01, 0.02, 0.085], 7), ([0.0] * 3, None)],
)
def test_seconds_to_the_target_are_those_of_all_epochs_so_far(
    recalls: list[float], seconds: float | None
) -> None:
    assert train.seconds_to(0.085, [1, 2, 4], recalls) == seconds


def test_figures_of_a_peer_that_was_stopped() -> None:
    assert train.peer_figures([epoch(3, 0.02), epoch(1, 0.05), epoch(2, 0.04)]) == {
        "rectools_epoch_s": 2,
        "rectools_epochs": 3,
        "rectools_to_target_s": None,
        "rectools_recall_when_stopped": 0.05,
        "rectools_peak_memory_mb": 300,
    }


def test_figures_of_a_peer_that_reached_the_target() -> None:
    figures = train.peer_figures([epoch(3, 0.02), epoch(1, 0.09), epoch(2, 0.1)])
    assert figures["rectools_to_target_s"] == 4
    assert figures["rectools_recall_when_stopped"] is None


@pytest.mark.parametrize(
    ("above", "below", "found"), [(180.0, 9.0, 20.0), (None, 9.0, None), (180.0, None, None)]
)
def test_a_ratio_needs_both(above: float | None, below: float | None, found: float | None) -> None:
    assert train.ratio(above, below) == found

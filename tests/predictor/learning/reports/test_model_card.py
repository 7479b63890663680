"""Model cards: from whole reports, from almost nothing, and from odd values."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from predictor.learning.reports.model_card import model_card

CONFIG: dict[str, Any] = {
    "version": "shop-1",
    "encoder": {"name": "minilm", "pooling": "mean", "cols": 384},
    "network": {"model_type": "transformer", "dims": 64},
    "behavior_types": ["view", "buy"],
    "history_length": 50,
    "repeats": "excluded",
    "has_items": True,
}
REPORT: dict[str, Any] = {
    "protocol": {"split": "time", "test_share": 0.2, "train_events": 12_345, "catalogue": 678},
    "parts": {
        "ranker": {"on": True, "validation": {"ndcg_at_10": 0.2}, "without": {"ndcg_at_10": 0.1}},
        "type_model": {"on": False},
    },
    "items": {
        "model": {
            "hits_at_10": 0.2, "ndcg_at_10": 0.15, "calibration_ratio": 0.97, "contexts": 400,
            "hits_at_10_standard_error": 0.02, "cold_targets": 30, "cold_recall_at_10": 0.1,
        },
        "item_knn": {"hits_at_10": 0.1, "ndcg_at_10": 0.16, "contexts": 400},
        "popular": {"hits_at_10": 0.05, "ndcg_at_10": 0.01, "contexts": 400},
    },
    "types": {
        "model": {"accuracy": 0.7, "ece": 0.011, "roc_auc": None, "lines": 400, "unknown_types": 3},
        "majority": {"accuracy": 0.5, "ece": 0.02, "roc_auc": None, "lines": 400},
    },
    "known_item_types": {"model": {"accuracy": 0.75, "lines": 400}},
}  # fmt: skip
LINEAGE: dict[str, Any] = {
    "data": {"events": "events.csv", "events_sha256": "ab12"},
    "finished": "2026-01-02T03:04:05+00:00",
    "seconds": 61.3,
    "peak_memory_bytes": 3 * 2**30,
    "device": "cpu",
    "threads": 1,
    "libraries": {"torch": "2.6", "numpy": "2.0"},
}


@pytest.mark.parametrize("kind", ["transformer", "bag:logistic", ""])
def test_it_says_what_kind_of_model_it_is(kind: str) -> None:
    card = model_card(CONFIG | {"network": {"model_type": kind}}, REPORT, {})
    name = kind.removeprefix("bag:")
    assert (f"A `{name}` version of foretell" if name else "A version of foretell") in card


def test_a_card_says_what_was_measured_beside_the_baselines() -> None:
    card = model_card(CONFIG, REPORT, LINEAGE)
    assert card.startswith("# Model card: shop-1\n")
    headings = re.findall(r"^## (.*)$", card, re.MULTILINE)
    assert headings == [
        "Intended use", "Data", "Parts", "Next items", "Next behavior type",
        "Behavior type of a known item", "Training", "Known limits",
    ]  # fmt: skip
    assert "| **model** | **0.2000** | **0.1500** | **0.1000** | **0.9700** |" in card
    assert "| item knn | 0.1000 | 0.1600 | - | - |" in card
    assert "- events sha256: `ab12`" in card
    assert "- train events: 12,345" in card
    assert "- ranker: on (validation NDCG@10 0.2000 with it, 0.1000 without)\n" in card
    assert "- type model: off\n" in card
    assert "- seconds, evaluation included: 61.3" in card
    assert "- peak memory: 3,072 MiB" in card
    assert "are left out unless a request says otherwise" in card


def test_limits_follow_from_what_was_measured() -> None:
    card = model_card(CONFIG, REPORT, LINEAGE)
    assert "Only 400 lists were measured; one standard error of hits@10 is 0.0200." in card
    assert "The baseline item knn is at least as good in NDCG@10: 0.1600 against 0.1500." in card
    assert "accuracy: " not in card  # there the version wins
    assert "of 30 such targets a share of 0.1000" in card
    assert "3 of the tested events have a behavior type that training never saw." in card
    better = REPORT | {"items": {"model": {"ndcg_at_10": 0.2, "contexts": 5_000}}}
    limits = model_card(CONFIG, better, LINEAGE).split("## Known limits")[1]
    assert "baseline" not in limits
    assert "Only" not in limits


def test_columns_that_nobody_measured_are_left_out() -> None:
    card = model_card(CONFIG, REPORT, LINEAGE)
    assert "coverage" not in card
    assert "AUC" not in card


def test_almost_nothing_gives_a_card() -> None:
    card = model_card({}, {}, {})
    assert card.startswith("# Model card: unnamed\n")
    assert "None" not in card
    assert "next items" not in card


NAMES = st.text(min_size=1, max_size=20)
NUMBERS = st.none() | st.integers(0, 10**9) | st.floats(0, 1e6, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    value=NUMBERS,
    types=st.lists(NAMES, max_size=4),
    file=NAMES,
)
def test_no_value_breaks_the_page(
    names: list[str], value: float | None, types: list[str], file: str
) -> None:
    report = {
        "items": {name: {"hits_at_10": value, "ndcg_at_10": 0.1, "contexts": 3} for name in names}
    }
    card = model_card(CONFIG | {"behavior_types": types}, report, {"data": {"events": file}})
    # Headings are ours alone, and every row of the table has as many cells as its head.
    assert len(re.findall(r"^#", card, re.MULTILINE)) == 6
    rows = [line for line in card.split("\n") if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert len(cells) == 1
    assert len(rows) == 2 + len(names)


@pytest.mark.parametrize("repeats", ["allowed", "excluded"])
def test_repeats_are_told(repeats: str) -> None:
    card = model_card(CONFIG | {"repeats": repeats}, {}, {})
    assert ("may be answered again" in card) == (repeats == "allowed")

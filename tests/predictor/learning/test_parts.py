"""Which parts a version keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from predictor.learning import parts


@pytest.mark.parametrize("search", [0.1, 0.2, 0.3])
def test_a_ranker_is_kept_where_its_order_beats_that_of_the_search(
    monkeypatch: pytest.MonkeyPatch, search: float
) -> None:
    measured = SimpleNamespace(
        ranker=SimpleNamespace(item_ids=()), validation={"ndcg_at_10": 0.2},
        search={"ndcg_at_10": search}, targets=None, scores=None,
        pairs=SimpleNamespace(row=None, item=None),
    )  # fmt: skip
    calls: list[Any] = []
    monkeypatch.setattr(parts, "fit_ranker", lambda *_, **__: measured)
    monkeypatch.setattr(parts, "replace", lambda version, ranker: ranker)

    def calibrated(*found: Any) -> Any:
        calls.append(found)
        return found[0]

    monkeypatch.setattr(parts, "_calibrated", calibrated)
    version = SimpleNamespace(config=SimpleNamespace(has_items=True), item_ids=())
    answers: Any = SimpleNamespace(
        version=version, exclude_history=False, search_scorer="search",
        found=SimpleNamespace(queries=None), space=SimpleNamespace(items=None),
    )  # fmt: skip
    anything: Any = SimpleNamespace(
        train=None, validation=None, kind="time", horizon=0, item_vectors=None
    )
    kept, report = parts._ranker(answers, anything, anything, 0)
    on = search < 0.2
    assert kept is (measured.ranker if on else version)
    assert (calls[0][1] == "search") is not on
    assert report["ranker"] == {"on": on, "validation": measured.validation,
                                "without": measured.search}  # fmt: skip

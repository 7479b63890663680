from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from bench import stored
from bench.stored import Stored
from foretell.importing import EventColumns
from predictor.learning import parts
from predictor.learning.data import to_events
from predictor.learning.measures.answers import Answers
from predictor.learning.measures.evaluation import Space
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.splits import Protocol, split
from predictor.models.ranking.pairs import Pairs
from predictor.models.sequence.network import Outputs

ITEMS = 40


class FakeRanker:
    """Adds some items of its own to what was found, and remembers what it scored."""

    searched = 10

    def __init__(self) -> None:
        self.scored: list[Pairs] = []

    def candidates(self, histories: Any, searched: Pairs) -> Pairs:
        assert len(searched) == 10
        return searched | Pairs.of(np.zeros(3, np.int64), np.array([0, 1, 2]))

    def score(
        self, histories: Any, pairs: Pairs, scores: Any, vectors: Callable[[Any], Any]
    ) -> Any:
        assert len(histories.lengths) == 1
        # The scores are those of the model, and the vectors those of the items.
        assert np.allclose(vectors(pairs.item) @ np.ones(2, np.float32), scores)
        self.scored.append(pairs)
        return scores


def answered(chosen: list[int], true: list[int]) -> Stored:
    """Two users without items, whose last events are of the `true` types; `chosen` is named."""
    count = len(true)
    columns = EventColumns(
        ["a", "b"], ["x", "y"], [], ["t"],
        user=np.arange(2 * count) % 2, behavior_type=np.append(np.zeros(count), true).astype(int),
        item=np.full(2 * count, -1), text=np.zeros(2 * count, int),
        timestamp=np.arange(2 * count),
    )  # fmt: skip
    part = split(to_events(columns), Protocol("every", test_from=count, validation_from=count // 2))
    order = np.lexsort((np.arange(count), np.arange(count) % 2))  # by user, then time
    answers = SimpleNamespace(chosen_types=np.array(chosen)[order])
    return Stored(part, cast(Any, answers), np.zeros((0, 2), np.float32))


def ranked(ranker: FakeRanker | None) -> Stored:
    rng = np.random.default_rng(0)
    columns = EventColumns(
        [f"u{n}" for n in range(5)], ["view"], [f"i{n}" for n in range(ITEMS)], [],
        user=np.repeat(np.arange(5), 6), behavior_type=np.zeros(30, int),
        item=rng.integers(ITEMS, size=30), text=np.full(30, -1), timestamp=None,
    )  # fmt: skip
    part = split(to_events(columns), Protocol("leave-one-out"))
    items = rng.normal(size=(ITEMS, 2)).astype(np.float32)
    answers = SimpleNamespace(
        version=SimpleNamespace(ranker=ranker),
        space=SimpleNamespace(items=items),
        found=SimpleNamespace(queries=np.ones((5, 2), np.float32)),
    )
    return Stored(part, cast(Any, answers), np.zeros((0, 2), np.float32))


@pytest.mark.parametrize("candidates", [5, 13, 30])
def test_the_ranker_is_timed_on_so_many_candidates(candidates: int) -> None:
    ranker = FakeRanker()
    taken = stored.ranker_ms(ranked(ranker), candidates)
    assert taken is not None
    assert taken > 0
    assert [len(pairs) for pairs in ranker.scored] == [candidates] * 5


def test_there_is_no_time_without_a_ranker_or_so_many_items() -> None:
    assert stored.ranker_ms(ranked(None), 10) is None
    assert stored.ranker_ms(ranked(FakeRanker()), ITEMS + 1) is None


def test_types_are_compared_with_those_of_a_baseline_user_by_user() -> None:
    # Training knows type x alone as the usual one; the version is right in all but one of ten.
    true = [0, 1] * 5
    chosen = [*true[:-1], 0]
    figures = stored.types_over(answered(chosen, true), "majority")
    assert figures["type_accuracy_over_majority_mean"] == pytest.approx(0.9 - 0.5)
    # User a has only x: nothing to gain; user b only y: four of five.
    assert figures["type_accuracy_over_majority_low"] == pytest.approx(0.0)
    assert figures["type_accuracy_over_majority_high"] == pytest.approx(0.8)


@dataclass(frozen=True)
class FakeVersion:
    """What answers read of a version."""

    config: Any
    item_ids: tuple[str, ...]
    ranker: Any = None


class Numbers:
    """Orders all items by their numbers."""

    searched = 0

    def candidates(self, histories: Any, searched: Pairs, *, repeats: bool) -> Pairs:
        rows = len(histories)
        return Pairs(np.repeat(np.arange(rows), ITEMS), np.tile(np.arange(ITEMS), rows))

    def score(self, histories: Any, pairs: Pairs, *_: Any) -> Any:
        return pairs.item.astype(np.float32)


@pytest.mark.parametrize("enough", [True, False])
def test_a_ranker_without_popularity_is_fitted_and_measured(
    enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ranked(None)
    part = plain.part
    found = Outputs(*(np.ones((len(part.test), 2), np.float32) for _ in range(3)))
    space = Space(np.ones((ITEMS, 2), np.float32), np.zeros((0, 2), np.float32))
    version: Any = FakeVersion(SimpleNamespace(repeats="allowed"), part.test.events.item_ids)
    answers = Answers(version, part.test, space, found, np.arange(ITEMS))
    asked: list[Any] = []

    def fit(train: Any, validation: Any, vectors: Any, **options: Any) -> Any:
        asked.append((train, validation, options["popularity"], len(options["model"].queries)))
        return SimpleNamespace(ranker=Numbers()) if enough else None

    monkeypatch.setattr(parts, "fit_ranker", fit)
    monkeypatch.setattr(stored, "answer", lambda _, targets, __: replace(answers, targets=targets))
    figures = stored.without_popularity(Stored(part, answers, plain.text_vectors))
    assert asked == [(part.train, part.validation, False, 5)]
    if not enough:
        assert figures == {}
        return
    measured = item_metrics(
        lambda _, rows: np.tile(np.arange(ITEMS, dtype=np.float32), (rows.stop - rows.start, 1)),
        part.test, np.ones(ITEMS, np.bool_), exclude_history=False,
    )  # fmt: skip
    for name in ("recall_at_10", "ndcg_at_10", "coverage_at_10", "hits_at_10"):
        assert figures[f"without_popularity_{name}_mean"] == measured[name]

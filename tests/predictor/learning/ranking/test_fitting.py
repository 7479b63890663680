"""The ranker learns what carries the data, and is measured where it has not learned."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.data import Events, Targets, to_events
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.ranking import fitting as ranking
from predictor.learning.ranking.examples import Examples, ModelOutputs, examples, measure
from predictor.learning.ranking.fitting import FittedRanker, fit_new_items, fit_ranker
from predictor.learning.ranking.tables import fit_tables, fit_texts
from predictor.learning.splits import Protocol, Split, split
from predictor.models.history import Histories
from predictor.models.ranking.candidates import Recipe
from predictor.models.ranking.pairs import Pairs
from predictor.models.ranking.ranker import LARGEST_WEIGHT, NewItems, Ranker
from predictor.models.ranking.tables import STATISTICS

ITEMS = 60
WEEK = 7 * 86_400_000_000


def shop(seed: int = 0, users: int = 80, *, timed: bool = True) -> Events:
    """Users with staples of their own, which they buy every other week, and whims."""
    rng = np.random.default_rng(seed)
    user, item, week = [], [], []
    for number in range(users):
        staples = rng.choice(ITEMS, 6, replace=False)
        for at in range(30):
            basket = {int(i) for i in staples if rng.random() < 0.5} | {int(rng.integers(ITEMS))}
            for bought in sorted(basket):
                user.append(number)
                item.append(bought)
                week.append(at)
    none = np.full(len(user), -1)
    return to_events(
        EventColumns(
            [f"u{number}" for number in range(users)],
            ["buy"],
            [f"i{number}" for number in range(ITEMS)],
            [],
            np.array(user),
            none + 1,
            np.array(item),
            none,
            np.array(week) * WEEK if timed else None,
        )
    )


def chain(seed: int = 0, users: int = 400) -> Events:
    """Users who go from each item to the one behind it, or, now and then, anywhere; no repeats."""
    rng = np.random.default_rng(seed)
    user, item = [], []
    for number in range(users):
        at, seen = int(rng.integers(ITEMS)), set()
        for _ in range(7):
            while at in seen:
                at = int(rng.integers(ITEMS))
            seen.add(at)
            user.append(number)
            item.append(at)
            at = (at + 1) % ITEMS if rng.random() < 0.7 else int(rng.integers(ITEMS))
    none = np.full(len(user), -1)
    return to_events(
        EventColumns(
            [f"u{number}" for number in range(users)],
            ["read"],
            [f"i{number}" for number in range(ITEMS)],
            [],
            np.array(user),
            none + 1,
            np.array(item),
            none,
            None,
        )
    )


def texts(seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(ITEMS, 16)).astype(np.float32)
    vectors[3] = 0
    return vectors


def noise_model(targets: Targets, seed: int = 0) -> ModelOutputs:
    rng = np.random.default_rng(seed)
    queries, items = rng.normal(size=(len(targets), 8)), rng.normal(size=(ITEMS, 8))
    return ModelOutputs(queries.astype(np.float32), items.astype(np.float32))


@cache
def shop_part() -> Split:
    return split(shop(), Protocol("time", test_share=0.1))


@cache
def chain_part() -> Split:
    return split(chain(), Protocol("leave-one-out"))


@cache
def fitted_shop() -> FittedRanker:
    part = shop_part()
    fitted = fit_ranker(
        part.train, part.validation, texts(), kind="time", horizon=part.horizon, repeats=True,
        seed=1,
    )  # fmt: skip
    assert fitted is not None
    return fitted


@cache
def fitted_chain() -> FittedRanker:
    part = chain_part()
    fitted = fit_ranker(
        part.train, part.validation, texts(), kind="leave-one-out", horizon=0, repeats=False,
        seed=1, model=noise_model(part.validation),
    )  # fmt: skip
    assert fitted is not None
    return fitted


def ranked(ranker: Ranker, targets: Targets, model: ModelOutputs | None) -> Examples:
    return examples(ranker.tables, ranker.recipe, ranker.groups, targets, model)


def test_a_shop_is_learned_from_earlier_dates() -> None:
    fitted, part = fitted_shop(), shop_part()
    found = ranked(fitted.ranker, part.test, None)
    ours = measure(found, fitted.ranker.score_features(found.table))
    popular = np.bincount(part.train.item, minlength=ITEMS).astype(np.float32)
    theirs = measure(found, popular[found.pairs.item])
    assert fitted.search is None
    assert fitted.validation["ndcg_at_10"] > theirs["ndcg_at_10"] + 0.2
    assert ours["ndcg_at_10"] > theirs["ndcg_at_10"] + 0.2


def test_a_chain_is_learned_from_the_validation_part() -> None:
    fitted, part = fitted_chain(), chain_part()
    assert fitted.search is not None
    assert fitted.validation["ndcg_at_10"] > fitted.search["ndcg_at_10"] + 0.2
    found = ranked(fitted.ranker, part.test, noise_model(part.test))
    assert measure(found, fitted.ranker.score_features(found.table))["ndcg_at_10"] > 0.4


def test_a_ranker_that_loses_says_so() -> None:
    part = chain_part()
    # A model that knows the answer.
    items = np.eye(ITEMS, dtype=np.float32)
    queries = np.zeros((len(part.validation), ITEMS), np.float32)
    queries[part.validation.row, part.validation.item] = 1
    # Of what is no answer, each item has a score of its own.
    items += np.random.default_rng(0).random((ITEMS, ITEMS), np.float32) / 100
    fitted = fit_ranker(
        part.train, part.validation, texts(), kind="leave-one-out", horizon=0, repeats=False,
        seed=1, model=ModelOutputs(queries, items),
    )  # fmt: skip
    assert fitted is not None
    assert fitted.search is not None
    assert fitted.search["ndcg_at_10"] == 1
    assert fitted.validation["ndcg_at_10"] <= fitted.search["ndcg_at_10"]


def test_too_few_contexts_give_none() -> None:
    part = split(chain(users=20), Protocol("leave-one-out"))
    assert (
        fit_ranker(
            part.train, part.validation, texts(), kind="leave-one-out", horizon=0, repeats=False,
            seed=1, model=noise_model(part.validation),
        )
        is None
    )  # fmt: skip


def test_events_without_items_give_none() -> None:
    part = chain_part()
    train = replace(part.train, item=np.full(len(part.train), -1))
    assert (
        fit_ranker(
            train, part.validation, texts(), kind="leave-one-out", horizon=0, repeats=False, seed=1
        )
        is None
    )


def test_the_same_seed_gives_the_same_ranker() -> None:
    part = shop_part()
    again = fit_ranker(
        part.train, part.validation, texts(), kind="time", horizon=part.horizon, repeats=True,
        seed=1,
    )  # fmt: skip
    assert again is not None
    assert again.ranker.files() == fitted_shop().ranker.files()
    assert again.validation == fitted_shop().validation


def test_the_measure_is_that_of_item_metrics() -> None:
    part, fitted = shop_part(), fitted_shop()
    found = ranked(fitted.ranker, part.test, None)
    scores = np.random.default_rng(0).integers(0, 4, len(found.pairs)).astype(np.float32)

    def scorer(targets: Targets, rows: slice) -> np.ndarray:
        dense = np.full((rows.stop - rows.start, ITEMS), -np.inf, np.float32)
        there = (found.pairs.row >= rows.start) & (found.pairs.row < rows.stop)
        pairs = found.pairs.chosen(there)
        dense[pairs.row - rows.start, pairs.item] = scores[there]
        return dense

    theirs = item_metrics(scorer, part.test, np.ones(ITEMS, np.bool_), exclude_history=False)
    ours = measure(found, scores)
    assert ours == pytest.approx({name: theirs[name] for name in ours})


@pytest.mark.parametrize("name", ["shop", "chain"])
def test_one_by_one_equals_batch(name: str) -> None:
    fitted, part = (
        (fitted_shop(), shop_part()) if name == "shop" else (fitted_chain(), chain_part())
    )
    ranker, targets = fitted.ranker, part.test
    model = noise_model(targets) if name == "chain" else None
    batch = ranked(ranker, targets, model)
    for row in range(0, len(targets), 7):
        one = np.arange(len(targets)) == row
        alone = ranked(ranker, targets.subset(one), None if model is None else model.subset(one))
        of_row = batch.pairs.row == row
        assert (alone.pairs.item == batch.pairs.item[of_row]).all()
        np.testing.assert_array_equal(alone.table, batch.table[of_row])
        np.testing.assert_array_equal(
            ranker.score_features(alone.table), ranker.score_features(batch.table)[of_row]
        )


def test_an_empty_history_is_ranked() -> None:
    nothing = np.zeros(0, np.int64)
    for fitted in (fitted_shop(), fitted_chain()):
        histories = Histories(
            nothing, nothing, nothing, np.zeros(1, np.int64), np.zeros(1, np.int64)
        )
        pairs = fitted.ranker.candidates(histories, Pairs(nothing, nothing))
        assert len(pairs)
        scores = fitted.ranker.score(
            histories, pairs, np.full(len(pairs), np.nan, np.float32),
            lambda item: np.zeros((len(item), 8), np.float32),
        )  # fmt: skip
        assert np.isfinite(scores).all()


def test_items_newer_than_the_tables_are_ranked_by_what_is_live() -> None:
    """A new item that the user buys each week must beat one that nobody buys."""
    ranker = fitted_shop().ranker
    weeks = np.arange(8) * WEEK
    new = np.full(8, ITEMS + 5)
    histories = Histories(new, np.zeros(8, np.int64), weeks, np.array([8]), weeks[-1:] + WEEK)
    pairs = Pairs.of(np.zeros(2, np.int64), np.array([ITEMS + 5, ITEMS + 9]))
    scores = ranker.score(
        histories, pairs, np.full(2, np.nan, np.float32),
        lambda item: np.zeros((len(item), 8), np.float32),
    )  # fmt: skip
    assert scores[0] > scores[1]
    assert ITEMS + 5 in ranker.candidates(histories, pairs).item
    assert ITEMS + 5 not in ranker.candidates(histories, pairs, repeats=False).item


def test_what_a_new_item_scores_is_learned_from_the_others() -> None:
    rng = np.random.default_rng(0)
    row = np.repeat(np.arange(5), 8)
    pairs = Pairs(row, np.tile(np.arange(8), 5))
    read = rng.normal(size=(40, 2)).astype(np.float32)
    # Each history has a level of its own, which says nothing of the weights.
    scores = (read @ [2, -3] + 7 * row).astype(np.float32)
    old = pairs.item > 1
    scores[~old] = -100
    found = fit_new_items(pairs, scores, read, old)
    assert (found.model_score, found.likeness) == pytest.approx((2, -3), abs=1e-4)
    assert fit_new_items(pairs, scores, read, old & False) == NewItems(0, 0)
    assert fitted_chain().ranker.new_items != NewItems(0, 0)


@pytest.mark.parametrize("spread", [0, 1e-9, 1e-20])
def test_what_is_nearly_the_same_for_all_gets_no_weight_that_serving_refuses(spread: float) -> None:
    rng = np.random.default_rng(0)
    pairs = Pairs(np.repeat(np.arange(5), 8), np.tile(np.arange(8), 5))
    read = np.zeros((40, 2), np.float32)
    read[:, 0] = spread * rng.normal(size=40)
    scores = rng.normal(size=40).astype(np.float32)
    found = fit_new_items(pairs, scores, read, pairs.item >= 0)
    assert abs(found.model_score) < LARGEST_WEIGHT
    assert found.likeness == 0


def test_tables_of_a_small_shop() -> None:
    part = shop_part()
    tables = fit_tables(part.train, fit_texts(texts(), 0), int(part.train.timestamp.max()))
    events = np.bincount(part.train.item, minlength=ITEMS)
    np.testing.assert_allclose(
        tables.statistics[:, STATISTICS.index("events")], np.log1p(events), rtol=1e-6
    )
    assert (tables.popular[:1] >= 0).all()
    assert tables.category[3] == 0
    assert (tables.category[np.arange(ITEMS) != 3] > 0).all()
    assert 7 <= tables.gap_days <= 30
    assert tables.statistics.shape == (ITEMS, len(STATISTICS))


def test_neighbours_are_those_of_a_plain_count() -> None:
    train = chain_part().train
    table = fit_tables(train, fit_texts(texts(), 0), 0).neighbours["next"]
    counts = np.zeros((ITEMS, ITEMS))
    for at in range(1, len(train)):
        if train.user[at] == train.user[at - 1]:
            counts[train.item[at - 1], train.item[at]] += 1
    total = np.bincount(train.item, minlength=ITEMS)
    for item in range(ITEMS):
        there = table.item[item] >= 0
        np.testing.assert_allclose(
            table.weight[item][there], counts[item][table.item[item][there]], rtol=1e-4
        )
        np.testing.assert_allclose(
            table.share[item][there],
            counts[item][table.item[item][there]] / total[item],
            rtol=1e-4,
        )
        assert (np.diff(table.share[item]) <= 0).all()
        assert there.sum() == min(50, np.count_nonzero(counts[item]))


def test_negatives_are_sampled_beside_all_hits() -> None:
    part = shop_part()
    ranker = fitted_shop().ranker
    found = ranked(ranker, part.test, None)
    few = found.sample(5, 0)
    assert few.label.sum() == found.label.sum()
    rows = np.unique(few.pairs.row)
    hits = np.bincount(few.pairs.row, few.label)[rows]
    assert (np.bincount(few.pairs.row)[rows] == hits + 5).all()
    assert (hits > 0).all()


def test_large_parts_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    part = shop_part()
    monkeypatch.setattr(ranking, "MOST_CANDIDATES", 650 * 10)
    recipe = Recipe(searched=0, own=400, popular=150, related=100)
    some, chosen = ranking.some_contexts(part.test, recipe, 3)
    assert len(some) == chosen.sum() == 10

"""What is learned of recommenders: factors, neighbours, and the weights of a blend."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from foretell.importing import EventColumns
from predictor.learning.data import Events, to_events
from predictor.learning.measures.answers import Answers, number
from predictor.learning.measures.baselines import histories_of, item_knn
from predictor.learning.measures.evaluation import Space
from predictor.learning.measures.metrics import item_metrics
from predictor.learning.ranking import recommenders
from predictor.learning.ranking.recommenders import blend, fit_recommender
from predictor.learning.splits import Protocol, Split, split
from predictor.models.ranking.recommender import METHODS, RECOMMENDERS, Recommender
from predictor.models.sequence.network import Outputs

GROUPS, OF_GROUP = 6, 10
ITEMS = GROUPS * OF_GROUP
USERS = 150


@dataclass(frozen=True)
class Version:
    """As much of one as answers need."""

    item_ids: tuple[str, ...]
    config: Any
    ranker: Any = None
    type_model: Any = None


def world(*, loyal: bool) -> Events:
    """Each user likes one group of items; the loyal ones have a favourite that comes again."""
    rng = np.random.default_rng(3)
    rows = []
    for user in range(USERS):
        group = user % GROUPS
        own = rng.permutation(OF_GROUP)[:7] + group * OF_GROUP
        favourite = own[0]
        for time, item in enumerate(own):
            rows.append((user, time, int(favourite if loyal and time % 2 else item)))
    user, time, item = np.array(rows).T
    names = [str(n) for n in range(max(USERS, ITEMS))]
    nothing = np.full(len(rows), -1)
    return to_events(
        EventColumns(names[:USERS], ["buy"], names[:ITEMS], [], user, np.zeros_like(user), item,
                     nothing, time * 1_000_000),
        names[:ITEMS],
    )  # fmt: skip


def answers(events: Events, *, repeats: bool, text: float = 0.0) -> tuple[Answers, Split]:
    """Of a version whose queries tell the user's group, as far as `text` outweighs noise."""
    part = split(events, Protocol("leave-one-out"))
    targets, rng = part.validation, np.random.default_rng(0)
    version: Any = Version(
        events.item_ids, SimpleNamespace(repeats="allowed" if repeats else "excluded")
    )
    of_item = np.repeat(np.eye(GROUPS, dtype=np.float32), OF_GROUP, axis=0)
    group = targets.events.user[targets.begin] % GROUPS
    noise = rng.normal(size=(len(targets), GROUPS)).astype(np.float32)
    queries = noise + text * np.eye(GROUPS, dtype=np.float32)[group]
    nothing = np.zeros((len(targets), 0), np.float32)
    found = Outputs(nothing, queries, nothing)
    space = Space(of_item, np.zeros((0, GROUPS), np.float32))
    return Answers(version, targets, space, found, number(version, events.item_ids)), part


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_each_finds_what_users_alike_had(name: str) -> None:
    found, part = answers(world(loyal=False), repeats=False)
    fitted = fit_recommender(name, part.train, found, seed=1)
    # Of the four left in the group; by chance it would be a tenth of that.
    assert fitted.validation["ndcg_at_10"] > 0.4
    assert set(fitted.recommender.weights) <= set(RECOMMENDERS[name])
    again = fit_recommender(name, part.train, found, seed=1)
    assert again.recommender.files() == fitted.recommender.files()


def test_a_blend_reads_what_helps_and_beats_its_parts() -> None:
    found, part = answers(world(loyal=True), repeats=True, text=2.0)
    fitted = fit_recommender("hybrid", part.train, found, seed=1)
    weights = fitted.recommender.weights
    assert weights["personal"] == max(weights.values())
    best = max(metrics["ndcg_at_10"] for metrics in fitted.alone.values())
    assert set(fitted.alone) == set(METHODS)
    assert fitted.validation["ndcg_at_10"] >= best
    # Search alone leaves a group's items tied, which popularity orders here.
    assert fitted.search["ndcg_at_10"] < fitted.alone["content"]["ndcg_at_10"]


@pytest.mark.parametrize(("text", "read"), [(0.0, False), (4.0, True)])
def test_texts_count_only_where_they_tell_something(text: float, read: bool) -> None:
    found, part = answers(world(loyal=False), repeats=False, text=text)
    whole = Recommender({"content": 1.0, "item_knn": 1.0}, histories_of(part.train), None, False)
    weights = blend(whole, found)
    assert (weights.get("content", 0.0) > 0.1) is read


def test_nothing_to_learn_weights_from_leaves_them_equal() -> None:
    found, part = answers(world(loyal=False), repeats=False)
    nobody = replace(found, targets=found.targets.subset(np.zeros(len(found.targets), np.bool_)))
    whole = Recommender({"item_knn": 1.0, "popular": 1.0}, histories_of(part.train), None, False)
    assert blend(whole, nobody) == {"item_knn": 1.0, "popular": 1.0}


def test_of_many_contexts_some_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found, part = answers(world(loyal=True), repeats=True, text=2.0)
    whole = fit_recommender("hybrid", part.train, found, seed=1)
    monkeypatch.setattr(recommenders, "CONTEXTS", 20)
    some = fit_recommender("hybrid", part.train, found, seed=1)
    assert (some.validation["contexts"], whole.validation["contexts"]) == (20, len(found.targets))
    chosen = np.arange(len(found.targets)) % 3 == 0
    ranking = replace(found, version=replace(found.version, ranker=whole.recommender))
    ranked, every = ranking.subset(chosen).ranked, ranking.ranked
    of = np.isin(every[0].row, np.flatnonzero(chosen))
    assert (ranked[0].item == every[0].item[of]).all()
    assert ranked[1] == pytest.approx(every[1][of])


def test_the_baseline_is_the_recommender() -> None:
    found, part = answers(world(loyal=False), repeats=False)
    fitted = fit_recommender("item_knn", part.train, found, seed=1)
    warm = np.ones(ITEMS, np.bool_)
    baseline = item_metrics(item_knn(part.train), part.validation, warm, exclude_history=True)
    assert fitted.validation["ndcg_at_10"] == pytest.approx(baseline["ndcg_at_10"])

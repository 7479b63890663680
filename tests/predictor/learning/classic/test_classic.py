"""Classic models: what they learn, what is kept of texts, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning import training
from predictor.learning.classic import fitting
from predictor.learning.classic.fitting import fit_classic
from predictor.learning.classic.heads import HEADS
from predictor.learning.classic.recipe import FEATURES, FINE_TUNED, FittedBag
from predictor.learning.data import history_of, to_events, training_targets
from predictor.learning.measures import baselines, evaluation
from predictor.learning.measures.answers import answer
from predictor.learning.measures.metrics import item_hits
from predictor.learning.measures.type_baselines import decayed_shares
from predictor.learning.sequence.fitting import FitConfig
from predictor.learning.sequence.recipe import resolve
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split
from predictor.models import model_dir
from predictor.models.calibration import softmax
from predictor.models.history import Ints
from predictor.models.sequence.bag import text_features_of
from predictor.models.version import EncoderConfig, Version

ITEMS, COLS = 20, 12
SENTIMENT = np.eye(COLS, dtype=np.float32)[5]
PROTOCOL = Protocol(split="leave-one-out")
LEARNED = tuple(name for name in HEADS if name != FINE_TUNED)  # the same head


def dataset(
    user: Ints, type_: Ints, item: Ints, names: list[str], *, vectors: bool = True
) -> Dataset:
    """Even items are drinks and odd ones tools, by text and vector."""
    rng = np.random.default_rng(5)
    kinds = np.arange(ITEMS) % 2
    made = rng.normal(0, 0.25, (ITEMS, COLS))
    made[:, 3] += 1 - 2 * kinds
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    texts = [("fine drink from the garden", "steel tool for the house")[kind] for kind in kinds]
    columns = EventColumns(
        [f"u{n}" for n in range(int(user.max()) + 1)], names, [f"i{n}" for n in range(ITEMS)], [],
        user, type_, item, np.full(len(user), -1), np.arange(len(user)) * 60_000_000,
    )  # fmt: skip
    return Dataset(
        events=to_events(columns, [f"i{n}" for n in range(ITEMS)]),
        item_vectors=(made * vectors).astype(np.float32),
        text_vectors=np.zeros((0, COLS), np.float32),
        encoder=EncoderConfig(name="e", pooling="mean", cols=COLS),
        targets=None,
        lineage={},
        item_texts=[f"{text} {n}" for n, text in enumerate(texts)] if vectors else [""] * ITEMS,
        sentiment=SENTIMENT,
    )


def world(*, by_text: bool = True, users: int = 150, vectors: bool = True) -> Dataset:
    """After a drink comes `buy`, after a tool `view`; or, not by_text, the types alternate."""
    rng = np.random.default_rng(1)
    length = 7
    item = rng.integers(0, ITEMS, (users, length))
    previous = np.roll(item, 1, axis=1) % 2 if by_text else (np.arange(length) + item[:, :1]) % 2
    return dataset(
        np.repeat(np.arange(users), length), previous.ravel(), item.ravel(), ["buy", "view"],
        vectors=vectors,
    )  # fmt: skip


def fitted(data: Dataset, model: str, **settings: Any) -> tuple[FittedBag, Split]:
    part = training.divide(data, PROTOCOL)
    return fit_classic(data, part, FitConfig(model_type=model, **settings)), part


def versioned(data: Dataset, found: FittedBag, part: Split) -> Version:
    made = training._assemble("v", data, part, found, exclude_history=False)
    return replace(made, reports={"metrics.json": {}})


def accuracy(data: Dataset, found: FittedBag, part: Split) -> float:
    answers = answer(versioned(data, found, part), part.test, found.space)
    return float(evaluation.measure_types(answers.type_scorer, part.test)["accuracy"])


@pytest.mark.parametrize("model", LEARNED)
def test_types_that_follow_from_texts_are_learned_and_served(tmp_path: Path, model: str) -> None:
    data = world()
    found, part = fitted(data, model)
    assert found.recipe.chosen.get("texts", 1.0) == 1.0
    assert accuracy(data, found, part) > 0.95  # the majority has about a half
    before = versioned(data, found, part)
    model_dir.write(tmp_path / "v", before, "", {})
    after = model_dir.load(tmp_path / "v")
    after.check_golden()
    assert after.config.network.model_type == f"bag:{model}"
    space, warm = evaluation.read_space(after, data)
    assert space.items == pytest.approx(found.space.items, abs=1e-6)
    assert warm.tolist() == found.warm.tolist()
    batch = history_of(
        part.test, slice(0, 9), found.recipe.history_length, space.items, space.texts
    )
    for ours, theirs in zip(after.predict(batch), before.predict(batch), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("model", LEARNED)
def test_one_seed_gives_one_model(model: str) -> None:
    data = world(users=40)
    first, second = (fitted(data, model)[0] for _ in range(2))
    assert first.network.trees == second.network.trees
    assert np.array_equal(first.space.items, second.space.items)
    for ours, theirs in zip(
        first.network.state_dict().values(), second.network.state_dict().values(), strict=True
    ):
        assert ours.equal(theirs)


def test_texts_that_say_nothing_are_not_read_unless_asked_for() -> None:
    data = world(by_text=False)
    found, part = fitted(data, "logistic")
    reads = text_features_of(found.network.config)
    assert found.recipe.chosen["texts"] == 0
    assert not found.network.affine[0].weight[:, :reads].any()
    assert accuracy(data, found, part) > 0.95
    asked, _ = fitted(data, "logistic", features="pca")
    assert "texts" not in asked.recipe.chosen
    assert asked.network.affine[0].weight[:, :reads].any()


def test_content_is_the_nearest_text_and_the_users_own_types() -> None:
    data = world()
    found, part = fitted(data, "content")
    answers = answer(versioned(data, found, part), part.test, found.space)
    plain = baselines.content(part.train, data.item_vectors)
    ours, theirs = (
        item_hits(scorer, part.test, exclude_history=False, returned=ITEMS)
        for scorer in (answers.item_scorer, plain)
    )
    assert np.array_equal(ours.top_hit, theirs.top_hit)
    rows = slice(0, len(part.test))
    shares = decayed_shares(part.train)(part.test, rows)
    assert softmax(answers.found.type_logits) == pytest.approx(shares, abs=1e-5)


def test_without_a_vector_the_most_popular_items_come_first() -> None:
    found, part = fitted(world(), "content")
    nobody = part.test.subset(np.arange(len(part.test)) == 0)
    empty = replace(nobody, end=nobody.begin)
    said = evaluation.outputs(found.network, empty, found.space, 50)
    best = np.argsort(-(said.queries @ found.space.items.T)[0])
    seen = baselines.popularity(part.train)
    assert seen[best[0]] == seen.max()
    assert (np.diff(seen[best]) <= 0).all()


def test_what_is_kept_of_a_text() -> None:
    data = world()
    spaces = {
        features: fitted(data, "logistic", features=features, dims=dims)[0].space.items
        for features, dims in (
            ("all", None),
            ("first", 4),
            ("pca", 3),
            ("select", 1),
            ("keywords", 2),
        )
    }
    assert set(spaces) == set(FEATURES)
    for items in spaces.values():
        assert (items[:, -1] > 0).all()  # popularity
    assert np.array_equal(spaces["all"][:, :-1], data.item_vectors)
    assert np.array_equal(spaces["first"][:, :-1], data.item_vectors[:, :4])
    # Own types say nothing about own texts here but by chance; see the next test.
    assert spaces["select"].shape == (ITEMS, 2)
    centred = data.item_vectors - data.item_vectors.mean(axis=0)
    # Each word of a kind is in all of its texts; by the alphabet these two come first.
    assert spaces["keywords"].shape == (ITEMS, 3)
    singular = np.linalg.svd(centred, compute_uv=False)[:3]
    kept = spaces["pca"][:, :-1]
    assert kept.T @ kept == pytest.approx(np.diag(singular**2), abs=1e-4)


def test_selection_keeps_the_dimension_that_tells_types_apart() -> None:
    item = np.random.default_rng(0).integers(0, ITEMS, 400)
    data = dataset(np.arange(400) // 8, item % 2, item, ["buy", "view"])
    data = replace(data, item_vectors=data.item_vectors.copy())
    data.item_vectors[:, 0] = 0.5  # a constant tells nothing
    found, _ = fitted(data, "linear", features="select", dims=1)
    assert found.space.items[:, 0] == pytest.approx(data.item_vectors[:, 3], abs=1e-6)


def test_keywords_are_the_words_and_phrases_that_tell_types_apart() -> None:
    item = np.random.default_rng(0).integers(0, ITEMS, 400)
    data = dataset(np.arange(400) // 8, item % 2, item, ["buy", "view"])
    texts = [f"the {'fine drink' if n % 2 else 'good tool'} of {n}" for n in range(ITEMS)]
    data = replace(data, item_texts=texts)
    found, _ = fitted(data, "logistic", features="keywords", dims=8)
    assert found.projection.terms is not None
    assert set(found.projection.terms.terms) == {
        "drink", "fine", "fine drink", "good", "good tool", "the fine", "the good", "tool"
    }  # fmt: skip
    fewer, _ = fitted(replace(data, item_texts=["same words"] * ITEMS), "mlp", features="keywords")
    assert np.isfinite(fewer.space.items).all()


def test_more_axes_than_there_are_words_change_nothing() -> None:
    data = world()
    few, part = fitted(data, "logistic", features="keywords", dims=60)
    many, _ = fitted(data, "logistic", features="keywords", dims=400)
    assert few.projection.terms is not None
    assert len(few.projection.terms.terms) < 60
    logits = [
        evaluation.outputs(f.network, part.test, f.space, 50).type_logits for f in (few, many)
    ]
    assert logits[0] == pytest.approx(logits[1], abs=1e-3)


@pytest.mark.parametrize("features", [None, "all", "keywords"])
def test_sentiment_is_an_axis_of_its_own(features: str | None) -> None:
    data = world()
    plain, _ = fitted(data, "logistic", features=features or "pca")
    found, part = fitted(data, "logistic", features=features, sentiment=True)
    assert found.space.items.shape[1] == plain.space.items.shape[1] + 1
    sentiment = data.item_vectors @ SENTIMENT  # of which pca takes the mean
    assert np.ptp(found.space.items[:, -2] - sentiment) < 1e-6
    assert found.space.items[:, -1] == pytest.approx(plain.space.items[:, -1])
    assert found.space.items[:, :-2] == pytest.approx(plain.space.items[:, :-1], abs=1e-6)
    assert accuracy(data, found, part) > 0.95


@pytest.mark.parametrize("model", LEARNED)
def test_types_that_follow_from_the_hour_are_learned_with_the_clock(model: str) -> None:
    rng = np.random.default_rng(3)
    users, length = 120, 7
    hours = np.cumsum(rng.integers(1, 48, (users, length)), axis=1)
    by_day = np.roll(hours, 1, axis=1) % 24 < 12
    user = np.repeat(np.arange(users), length)
    data = dataset(user, by_day.ravel() * 1, rng.integers(0, ITEMS, len(user)), ["buy", "view"])
    events = replace(data.events, timestamp=hours.ravel() * 3_600_000_000)
    data = replace(data, events=events)
    found, part = fitted(data, model, clock=True)
    assert accuracy(data, found, part) > 0.95
    blind, _ = fitted(data, model)
    assert accuracy(data, blind, part) < 0.7


@pytest.mark.parametrize("model", LEARNED)
def test_a_type_that_only_begins_histories(model: str) -> None:
    data = world()
    events = data.events
    first = np.zeros(len(events), np.bool_)
    first[events.first_of_user[:-1]] = True
    events = replace(
        events, behavior_types=("buy", "view", "sign up"), type=np.where(first, 2, events.type)
    )
    found, part = fitted(replace(data, events=events), model)
    said = answer(
        versioned(replace(data, events=events), found, part), part.test, found.space
    ).type_probabilities
    assert np.isfinite(said).all()
    assert said[:, 2].mean() < 0.3
    assert found.network.start.argmax() == 2


def test_more_types_than_have_a_mean_of_their_own() -> None:
    rng = np.random.default_rng(0)
    types = 11
    start = rng.integers(0, types, 80)
    data = dataset(
        np.repeat(np.arange(80), 8), (start[:, None] + np.arange(8)).ravel() % types,
        rng.integers(0, ITEMS, 640), [f"t{n}" for n in range(types)],
    )  # fmt: skip
    found, part = fitted(data, "logistic")
    assert accuracy(data, found, part) > 0.9


def test_lines_are_drawn_with_one_of_each_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST_LINES", 30)
    data = world()
    events = data.events
    rare = events.type.copy()
    rare[events.first_of_user[7] + 3] = 2
    events = replace(events, behavior_types=("buy", "view", "rare"), type=rare)
    part = training.divide(replace(data, events=events), PROTOCOL)
    lines = fitting._drawn(training_targets(part.train), 30, 1)
    assert 30 <= len(lines.type) <= 31
    assert set(lines.type) == {0, 1, 2}
    assert (lines.end > lines.begin).all()
    assert len(lines) == len(np.unique(lines.row))


@pytest.mark.parametrize("model", ["logistic", "lightgbm"])
def test_without_any_text_types_are_learned_alone(model: str) -> None:
    data = world(by_text=False, vectors=False)
    found, part = fitted(data, model)
    assert accuracy(data, found, part) > 0.95


def test_fewer_texts_than_components() -> None:
    data = world(users=30)
    data.item_vectors[1:] = 0
    found, _ = fitted(data, "logistic", features="pca", dims=8)
    assert np.isfinite(found.space.items).all()


@pytest.mark.parametrize(
    ("model", "settings", "complaint", "field"),
    [
        ("logistic", {"layers": 2}, "logistic has no setting layers", "layers"),
        ("logistic", {"epochs": 2}, "no setting epochs", "epochs"),
        ("word2vec_logistic", {"features": "pca"}, "no setting features", "features"),
        ("linear", {"features": "best"}, "none of all, first", "features"),
        ("linear", {"features": "pca", "dims": COLS + 1}, "1 to 12", "dims"),
        ("linear", {"features": "all", "dims": 3}, "keeps the 12", "dims"),
        ("content", {"sentiment": True}, "no setting sentiment", "sentiment"),
        ("hybrid", {"clock": True}, "no setting clock", "clock"),
        ("word2vec_logistic", {"dims": 10_000}, "1 to 4094", "dims"),
    ],
)
def test_settings_that_a_model_does_not_have(
    model: str, settings: dict[str, Any], complaint: str, field: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        fitted(world(users=10), model, **settings)
    assert caught.value.field == field


def test_a_sequence_model_has_no_features() -> None:
    part = training.divide(world(users=10), PROTOCOL)
    with pytest.raises(InvalidArgumentError, match="features") as caught:
        resolve(FitConfig(model_type="gru", features="pca"), part.train)
    assert caught.value.field == "features"


@pytest.mark.parametrize("model", [*LEARNED, "content"])
def test_one_type_and_no_texts(model: str) -> None:
    data = world(users=10, vectors=False)
    data = replace(data, events=replace(data.events, type=data.events.type * 0))
    with pytest.raises(InvalidArgumentError, match=r"no item has one|nothing to tell apart"):
        fitted(data, model)


def test_words_that_never_come_twice() -> None:
    data = replace(world(users=10), item_texts=[f"word{n}" for n in range(ITEMS)])
    for model, features in (("word2vec_logistic", None), ("logistic", "keywords")):
        with pytest.raises(InvalidArgumentError, match="0 words occur in two"):
            fitted(data, model, features=features)


def test_users_of_one_event_each() -> None:
    rng = np.random.default_rng(0)
    item = rng.integers(0, ITEMS, 60)
    data = dataset(np.arange(60), item % 2, item, ["buy", "view"])
    part = training.divide(data, Protocol(split="random"))
    with pytest.raises(InvalidArgumentError, match="no history to read"):
        fit_classic(data, part, FitConfig(model_type="logistic"))


def test_all_rows_alike() -> None:
    data = dataset(np.arange(40) // 8, np.arange(40) * 0, np.arange(40) * 0, ["buy"])
    with pytest.raises(InvalidArgumentError, match="nothing to tell apart"):
        fitted(data, "mlp")
    found, part = fitted(data, "content")
    assert accuracy(data, found, part) == 1.0


@pytest.mark.parametrize("model", LEARNED)
def test_nothing_to_choose_by(model: str) -> None:
    data = world()
    part = training.divide(data, PROTOCOL)
    nobody = replace(part.validation, end=part.validation.begin)
    found = fit_classic(
        data, replace(part, validation=nobody), FitConfig(model_type=model, features=None)
    )
    assert np.isfinite(found.network.affine[0].weight.numpy(force=True)).all()
    text = text_features_of(found.network.config)
    reads = found.network.affine[0].weight[:, :text].any()
    assert bool(reads) is (model == "word2vec_logistic")

"""Data that say little or nothing: every model answers, or tells which field is at fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning import training
from predictor.learning.classic.finetuning import fine_tune
from predictor.learning.classic.recipe import BY_CONTENT, CLASSIC, FINE_TUNED, resolve_classic
from predictor.learning.data import to_events
from predictor.learning.measures.answers import Answers, answer
from predictor.learning.measures.evaluation import read_space
from predictor.learning.measures.metrics import item_hits
from predictor.learning.parts import with_recommender, without_parts
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split
from predictor.models import model_dir
from predictor.models.ranking.recommender import RECOMMENDERS
from predictor.models.version import EncoderConfig, Version

MODELS = (*CLASSIC, "rnn")
OF_TYPES = tuple(model for model in CLASSIC if model not in BY_CONTENT)
BY_WORDS = ("word2vec_logistic", FINE_TUNED)
ITEMS, STEPS, COLS = 6, 8, 12
PROTOCOL = Protocol(split="time")

TOLD = {
    # What the data are, and of what: which models refuse it, and the field that is named.
    ("one type", "items"): dict.fromkeys(OF_TYPES, "behavior_type"),
    ("one type", "texts"): dict.fromkeys(MODELS, "behavior_type"),
    ("no texts", "items"): {
        **dict.fromkeys(BY_WORDS, "behavior_text"),
        "content": "items",
    },
    ("no texts", "texts"): {
        **dict.fromkeys(BY_WORDS, "behavior_text"),
        **dict.fromkeys(RECOMMENDERS, "item_id"),
        "content": "items",
    },
    ("one user", "items"): dict.fromkeys(MODELS, "user_id"),
    ("one user", "texts"): dict.fromkeys(MODELS, "user_id"),
    ("duplicates", "items"): {},
    ("duplicates", "texts"): {
        **dict.fromkeys(RECOMMENDERS, "item_id"),
        "content": "items",
    },
    ("one moment", "items"): dict.fromkeys(MODELS, "events"),
    ("new type", "items"): {},
    ("new type", "texts"): {
        **dict.fromkeys(RECOMMENDERS, "item_id"),
        "content": "items",
    },
    ("one text", "items"): {},
    ("one text", "texts"): {
        "word2vec_logistic": "behavior_text",
        **dict.fromkeys(RECOMMENDERS, "item_id"),
        "content": "items",
    },
}


def dataset(kind: str, form: str) -> Dataset:
    """Types that alternate, items or texts at random; and what is wrong with it.

    - duplicates: each user does one thing again and again, day by day.
    - one moment: the same, all at once.
    - new type: of the last days, which nobody has met before.
    """
    users, steps = (1, 60) if kind == "one user" else (12, STEPS)
    user, step = np.repeat(np.arange(users), steps), np.tile(np.arange(steps), users)
    thing, type_ = np.random.default_rng(1).integers(ITEMS, size=len(user)), (user + step) % 2
    second = step * 86_400 + user
    if kind == "one type":
        type_ = 0 * type_
    if kind in ("duplicates", "one moment"):
        thing, type_ = user % 3, user % 2
    if kind == "one moment":
        second = 0 * second
    if kind == "new type":
        type_ = np.where(step >= 6, 2, type_)
    said = [f"{('fine drink', 'steel tool')[n % 2]} number {n}" for n in range(ITEMS)]
    vectors = np.random.default_rng(2).normal(size=(ITEMS, COLS)).astype(np.float32)
    if kind == "one text":
        said, vectors = ["fine drink from the garden"] * ITEMS, vectors[:1].repeat(ITEMS, axis=0)
    if kind == "no texts":
        said, vectors = [""] * ITEMS, 0 * vectors
    none = np.full(len(user), -1)
    of_items = form == "items"
    texts = [] if of_items or kind == "no texts" else said[: 1 if kind == "one text" else None]
    columns = EventColumns(
        [f"u{n}" for n in range(users)], ["view", "buy", "rent"][: int(type_.max()) + 1],
        [f"i{n}" for n in range(ITEMS)] if of_items else [], texts, user, type_,
        thing if of_items else none, np.minimum(thing, len(texts) - 1) if texts else none,
        (1_700_000_000 + second) * 1_000_000,
    )  # fmt: skip
    return Dataset(
        events=to_events(columns),
        item_vectors=vectors if of_items else vectors[:0],
        text_vectors=vectors[: len(texts)],
        encoder=EncoderConfig(name="e", pooling="mean", cols=COLS),
        targets=None,
        lineage={"events": "made"},
        item_texts=said if of_items else [],
        sentiment=np.zeros(COLS, np.float32),
    )


def config(model: str) -> FitConfig:
    small = model == "rnn"
    return FitConfig(model, epochs=2 if small else None, dims=8 if small else None)


def fitted(data: Dataset, model: str) -> tuple[Version, Split]:
    """What `train` does, but for the reports."""
    part = training.divide(data, PROTOCOL)
    if model == FINE_TUNED:
        recipe = resolve_classic(config(model), data, part.train)
        nowhere = Path("nowhere")
        fine_tune(data, part.train, recipe, nowhere, cache_dir=nowhere, progress=False)
    made = training._fit(data, part, config(model), exclude_history=False, progress=False)
    version = training._assemble("v", data, part, made, exclude_history=False)
    answers = answer(version, part.validation, made.space)
    if model in RECOMMENDERS:
        return with_recommender(answers, part, data, model, 1, progress=False)[0], part
    return without_parts(answers, part), part


def check(answers: Answers) -> None:
    types = answers.type_probabilities
    assert np.isfinite(types).all()
    assert types.sum(axis=1) == pytest.approx(1, abs=1e-5)
    config = answers.version.config
    if config.has_items:
        hits = item_hits(answers.item_scorer, answers.targets, exclude_history=False)
        items = config.item_calibration.probabilities(hits.top_score)
        assert np.isfinite(items).all()
        assert ((items >= 0) & (items <= 1)).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("kind", "form"), TOLD)
def test_bad_data_are_told_or_answered(kind: str, form: str, model: str) -> None:
    data = dataset(kind, form)
    field = TOLD[kind, form].get(model)
    if field is not None:
        with pytest.raises(InvalidArgumentError) as caught:
            fitted(data, model)
        assert caught.value.field == field
        return
    if model == FINE_TUNED:
        return  # nothing is at fault, and such an encoder is of another test: test_finetuning
    version, part = fitted(data, model)
    space, _ = read_space(version, data)
    check(answer(version, part.test, space))


@pytest.mark.parametrize(
    ("kind", "form", "model"),
    [
        ("one type", "items", "rnn"),
        ("no texts", "texts", "logistic"),
        ("duplicates", "items", "hybrid"),
        ("one text", "texts", "logistic"),
        ("new type", "texts", "logistic"),
    ],
)
def test_a_version_of_such_data_has_reports_and_answers_again(
    tmp_path: Path, kind: str, form: str, model: str
) -> None:
    data = dataset(kind, form)
    trained = training.train(data, tmp_path / "v", protocol=PROTOCOL, config=config(model))
    json.dumps(trained.report, allow_nan=False)
    assert ("types" in trained.report) is (kind != "new type")
    assert ("own_text" in trained.report) is ((kind, form) == ("one text", "texts"))
    version = model_dir.load(tmp_path / "v")
    version.check_golden()
    space, _ = read_space(version, data)
    check(answer(version, training.divide(data, PROTOCOL).test, space))

"""A search among classic models of behavior types: each has settings of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning import commands, training
from predictor.learning.classic.fitting import fit_classic
from predictor.learning.classic.recipe import resolve_classic
from predictor.learning.data import to_events
from predictor.learning.measures.answers import answer
from predictor.learning.measures.evaluation import measure_types
from predictor.learning.search.folds import make_folds
from predictor.learning.search.results import table
from predictor.learning.search.searching import Plan, search
from predictor.learning.search.space import OF_CLASSIC, SETTINGS, Space, applies, space_of
from predictor.learning.search.study import Study, owned
from predictor.learning.search.trial import Result, measure
from predictor.learning.sequence import config_file
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol
from predictor.models.version import EncoderConfig

ITEMS, COLS, STEPS = 20, 12, 7
PLAN = Plan(folds=2, folds_by="user")


def dataset(*, users: int = 40, texts: bool = True, words: bool = True) -> Dataset:
    """After an even item comes `buy`, after an odd one `view`; texts tell which is which."""
    rng = np.random.default_rng(1)
    item = rng.integers(0, ITEMS, (users, STEPS))
    columns = EventColumns(
        [f"u{n}" for n in range(users)], ["buy", "view"], [f"i{n}" for n in range(ITEMS)], [],
        np.repeat(np.arange(users), STEPS), (np.roll(item, 1, axis=1) % 2).ravel(), item.ravel(),
        np.full(item.size, -1), np.arange(item.size) * 60_000_000,
    )  # fmt: skip
    vectors = rng.normal(0, 0.25, (ITEMS, COLS)).astype(np.float32) * texts
    vectors[:, 3] += texts * (1 - 2 * (np.arange(ITEMS) % 2))
    said = ("fine drink from the garden", "steel tool for the house")
    item_texts = [f"{said[n % 2]} {n}" if words else f"word{n}" for n in range(ITEMS)]
    return Dataset(
        events=to_events(columns, [f"i{n}" for n in range(ITEMS)]),
        item_vectors=vectors,
        text_vectors=vectors[:0],
        encoder=EncoderConfig(name="e", pooling="mean", cols=COLS),
        targets=None,
        lineage={"events": "made"},
        item_texts=item_texts if texts else [""] * ITEMS,
        sentiment=np.zeros(COLS, np.float32),
    )


def settings_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial["settings"] for trial in result["trials"]]


def test_the_best_of_several_models_is_a_file_that_train_takes(tmp_path: Path) -> None:
    data, out = dataset(), tmp_path / "s"
    plan = replace(PLAN, models=("logistic", "mlp", "word2vec_logistic"), trials=9)
    result = search(data, out, plan=plan, fixed=FitConfig(history_length=20))
    assert result["metric"] == "type_log_loss"  # though there are items
    assert settings_of(result)[0] == {"model_type": "logistic", "features": None, "dims": COLS}
    assert {chosen["model_type"] for chosen in settings_of(result)} == set(plan.models)
    for chosen in settings_of(result):
        own = {name for name in result["space"] if applies(name, chosen)}
        assert chosen.keys() == own
        assert ("hidden" in chosen) is (chosen["model_type"] == "mlp")
        assert ("features" in chosen) is (chosen["model_type"] != "word2vec_logistic")
        assert ("dims" in chosen) is (chosen.get("features") != "all")
    assert any(chosen.get("features") == "all" for chosen in settings_of(result))
    best = min(
        (trial for trial in result["trials"] if trial["state"] == "complete"),
        key=lambda trial: trial["mean"],
    )
    assert result["best"] == best
    config = config_file.read(out / "best.toml")
    assert config == replace(FitConfig(history_length=20), **best["settings"])
    assert table(result)
    names = {path.name for path in (out / "plots").iterdir()}
    assert {"history.png", "slices.png", "folds.png"} <= names
    recipe = resolve_classic(config, data, training.divide(data, Protocol()).train)
    assert recipe.model_type == best["settings"]["model_type"]


@pytest.mark.parametrize("model", ["linear", "lightgbm"])
def test_a_fold_is_scored_by_what_the_version_answers(model: str) -> None:
    """Of the linear regression the scores are no log odds before they are calibrated."""
    data = dataset()
    part = training.divide(data, Protocol())
    config = FitConfig(model_type=model, features="select", dims=3)
    (_, last) = make_folds(part, Protocol(), "time", 2)
    result, told = Result(), list[tuple[int, float]]()
    measure(
        data, [last], config, result, lambda *step: told.append(step), exclude_history=False
    )  # fmt: skip
    fitted = fit_classic(data, part, config)
    version = training._assemble("v", data, part, fitted, exclude_history=False)
    answers = answer(version, part.validation, fitted.space)
    expected = measure_types(answers.type_scorer, part.validation)["log_loss"]
    assert result.scores == [pytest.approx(-expected, rel=1e-6)]
    assert told == [(0, result.scores[0])]
    assert bool(result.epochs) is (model == "lightgbm")


def test_few_settings_are_tried_once_each(tmp_path: Path) -> None:
    """And one that was begun when the process was killed is run from its beginning."""
    data = dataset(texts=False)
    plan = replace(PLAN, models=("linear",), trials=30)
    whole = search(data, tmp_path / "whole", plan=plan)
    tried = [tuple(chosen.values()) for chosen in settings_of(whole)]
    assert len(set(tried)) == len(tried) == 4
    some = tmp_path / "killed"
    search(data, some, plan=replace(plan, trials=2))
    with owned(some):  # as a process leaves it that is killed in the middle of a trial
        space: Space = {"history_length": OF_CLASSIC["history_length"]}
        study = Study(some, space, {}, sampler="tpe", seed=Protocol().seed, warm_up=1)
        assert study.ask() is not None
    again = search(data, some, plan=plan)
    assert settings_of(again) == settings_of(whole)
    assert [trial["folds"] for trial in again["trials"]] == [
        trial["folds"] for trial in whole["trials"]
    ]


def test_a_model_that_the_texts_are_too_few_for_is_passed_over(tmp_path: Path) -> None:
    plan = replace(PLAN, models=("logistic", "word2vec_logistic"), trials=5)
    result = search(dataset(words=False), tmp_path / "s", plan=plan)
    for trial in result["trials"]:
        if trial["settings"]["model_type"] == "word2vec_logistic":
            assert trial["why"].startswith("0 words occur in two of the ")
    assert result["best"]["settings"]["model_type"] == "logistic"


@pytest.mark.parametrize("model", SETTINGS)
def test_what_is_searched_are_settings_of_the_model(model: str) -> None:
    data = dataset()
    train = training.divide(data, Protocol()).train
    usual = {"features": "pca", "dims": 8, "history_length": 20, "hidden": 16, "epochs": 10,
             "clock": True, "sentiment": True}  # fmt: skip
    for name in SETTINGS[model]:
        config = FitConfig(model_type=model, **{name: usual[name]})  # type: ignore[arg-type]
        assert getattr(resolve_classic(config, data, train), name) == usual[name]
    for name in OF_CLASSIC.keys() - SETTINGS[model]:
        config = FitConfig(model_type=model, **{name: usual[name]})  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=f"has no setting {name}"):
            resolve_classic(config, data, train)


@pytest.mark.parametrize(
    ("models", "fixed", "tune", "said", "field"),
    [
        (("content",), {}, None, "content is not searched: what there is to choose", "model"),
        (("hybrid",), {}, None, "hybrid is not searched: what there is to choose", "model"),
        (("bert_finetune",), {}, None, "each trial would fine-tune an encoder", "model"),
        ((), {"model_type": "bert"}, None, "bert is not searched: there are ", "model"),
        (("mlp", "gru"), {}, None, "mlp and sequence models have other settings", "model"),
        (("mlp",), {}, ("dropout",), "dropout has no effect on this data and mlp", "tune"),
        (("linear",), {}, ("hidden",), "hidden has no effect on this data and linear", "tune"),
        (("linear",), {"features": "all"}, ("dims",), "dims has no effect", "tune"),
        (("mlp", "linear"), {"hidden": 8}, None, "linear has no setting hidden", "hidden"),
        ((), {"model_type": "linear", "layers": 2}, None, "no setting layers", "layers"),
    ],
)
def test_what_cannot_be_searched_is_told_and_writes_nothing(
    tmp_path: Path,
    models: tuple[str, ...],
    fixed: dict[str, Any],
    tune: tuple[str, ...] | None,
    said: str,
    field: str,
) -> None:
    plan = replace(PLAN, models=models, tune=tune)
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        search(dataset(users=20), tmp_path / "s", plan=plan, fixed=FitConfig(**fixed))
    assert caught.value.field == field
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("model", ["linear", "gru"])
def test_clock_and_sentiment_are_searched_where_asked_for(tmp_path: Path, model: str) -> None:
    data, fixed = dataset(), FitConfig(model_type=model, epochs=None if model == "linear" else 1)
    usual = replace(PLAN, models=(model,), trials=1)
    assert (
        not {"clock", "sentiment"}
        & search(data, tmp_path / "u", plan=usual, fixed=fixed)["space"].keys()
    )
    plan = replace(usual, tune=("clock", "sentiment"), trials=4)
    result = search(data, tmp_path / "s", plan=plan, fixed=fixed)
    assert list(result["space"]) == ["clock", "sentiment"]
    tried = {tuple(chosen.values()) for chosen in settings_of(result)}
    assert tried == {(a, b) for a in (False, True) for b in (False, True)}
    timeless = replace(data, events=replace(data.events, has_times=False))
    with pytest.raises(InvalidArgumentError, match="clock has no effect"):
        search(timeless, tmp_path / "t", plan=replace(plan, folds_by="user"), fixed=fixed)


def test_a_fault_in_the_models_is_told_before_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["search", "--events", "/nowhere", "--out", str(tmp_path / "s"), "--model"]
    assert commands.main([*given, "logistic", "gru"]) == 2
    assert "search them apart" in capsys.readouterr().err
    assert commands.main([*given, "logistic", "mlp"]) == 2
    assert "/nowhere" in capsys.readouterr().err


def test_a_setting_of_the_file_is_not_searched(tmp_path: Path) -> None:
    fixed = FitConfig(model_type="logistic", features="select", history_length=20)
    result = search(dataset(), tmp_path / "s", plan=replace(PLAN, trials=2), fixed=fixed)
    assert list(result["space"]) == ["dims"]
    assert [chosen["dims"] for chosen in settings_of(result)] in ([12, 8], [8, 12])
    assert json.loads((tmp_path / "s" / "search.json").read_text())["fixed"]["features"] == "select"


def test_features_that_do_not_go_with_the_file_are_not_tried() -> None:
    data = dataset(users=20)
    for dims, possible in ((3, False), (COLS, True)):
        fixed = FitConfig(model_type="mlp", dims=dims)
        start = resolve_classic(fixed, data, training.divide(data, Protocol()).train)
        features = space_of(data, [start], fixed)["features"]
        assert isinstance(features, CategoricalDistribution)
        assert ("all" in features.choices) is possible

"""A search from data to a configuration file that trains, on small data."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns
from predictor.learning import commands, training
from predictor.learning.data import to_events
from predictor.learning.search.results import table
from predictor.learning.search.searching import Plan, search
from predictor.learning.sequence import config_file
from predictor.learning.sequence.recipe import FitConfig
from predictor.learning.sources import Dataset
from predictor.models.version import EncoderConfig

PNG = b"\x89PNG"
TINY = FitConfig(model_type="gru", dims=8, hidden=8, layers=1, epochs=1, batch_contexts=64)
PLAN = Plan(trials=2, folds=2, tune=("learning_rate", "dropout"))


def dataset(*, items: int = 12, types: int = 3, users: int = 30, times: bool = True) -> Dataset:
    """Users who go through types in a circle, with items at random; without texts."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), 10)
    step = np.tile(np.arange(10), users)
    item = rng.integers(items, size=len(user)) if items else np.full(len(user), -1)
    none = np.full(len(user), -1)
    columns = EventColumns(
        [f"u{n}" for n in range(users)], [f"t{n}" for n in range(types)],
        [f"i{n}" for n in range(items)], [], user, (user + step) % types, item, none,
        (1_700_000_000 + step * 86_400 + user) * 1_000_000 if times else None,
    )  # fmt: skip
    vectors = np.zeros((items, 4), np.float32)
    encoder = EncoderConfig(name="none", pooling="mean", cols=4)
    lineage: dict[str, str | int] = {"events": "made", "seed": 0}
    none = np.zeros(4, np.float32)
    return Dataset(
        to_events(columns), vectors, vectors[:0], encoder, None, lineage, [""] * items, none
    )


def test_the_best_setting_is_a_file_that_train_takes(tmp_path: Path) -> None:
    data, out = dataset(), tmp_path / "found"
    plan = replace(PLAN, models=("gru", "lstm"), trials=4)
    result = search(data, out, plan=plan, fixed=TINY, command="python -m predictor search ...")
    assert result == json.loads((out / "search.json").read_text())
    assert [trial["trial"] for trial in result["trials"]] == [1, 2, 3, 4]
    assert {trial["settings"]["model_type"] for trial in result["trials"]} == {"gru", "lstm"}
    for trial in result["trials"]:
        assert trial["mean"] == pytest.approx(np.mean(trial["folds"]), abs=1e-12)
        assert trial["spread"] == pytest.approx(np.std(trial["folds"], ddof=1), abs=1e-12)
        assert trial["epochs"] == [1, 1]
    best = max(result["trials"], key=lambda trial: trial["mean"])
    assert result["best"] == best
    config = config_file.read(out / "best.toml")
    assert config == replace(TINY, **best["settings"])
    comment = (out / "best.toml").read_text()
    assert f"# ndcg_at_10 {best['mean']:.4f} +- {best['spread']:.4f}" in comment
    assert "# found by: python -m predictor search ..." in comment
    names = {path.name for path in (out / "plots").iterdir()}
    assert names == {"history.png", "slices.png", "folds.png", "importances.png"}
    assert all(path.read_bytes().startswith(PNG) for path in (out / "plots").iterdir())
    shown = table(result)
    assert f"trial{best['trial']:>28}" in shown
    # The last fold is the division of train: it comes to the same score.
    training.train(data, tmp_path / "v", config=config, parts=False)
    curve = json.loads((tmp_path / "v" / "history.json").read_text())
    assert [epoch["score"] for epoch in curve] == best["folds"][-1:]


def test_more_trials_continue_a_search_and_the_test_part_changes_nothing(tmp_path: Path) -> None:
    data = dataset()
    first = search(data, tmp_path / "a", plan=replace(PLAN, budget_s=0.01), fixed=TINY)
    assert len(first["trials"]) == 1  # one is begun, however little time there is
    second = search(data, tmp_path / "a", plan=PLAN, fixed=TINY)
    assert second["trials"][:1] == first["trials"]
    cut = np.sort(data.events.timestamp)[int(len(data.events) * 0.8)]
    item = np.where(data.events.timestamp >= cut, 3, data.events.item)
    other = replace(data, events=replace(data.events, item=item))
    again = search(other, tmp_path / "b", plan=PLAN, fixed=TINY)
    assert without_seconds(again) == without_seconds(second)
    with pytest.raises(InvalidArgumentError, match="another folds_by and folds"):
        search(data, tmp_path / "a", plan=replace(PLAN, folds_by="user"), fixed=TINY)


def without_seconds(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**trial, "seconds": None} for trial in result["trials"]]


def test_settings_that_do_not_fit_together_are_passed_over(tmp_path: Path) -> None:
    fixed = replace(TINY, model_type="transformer", dims=128, hidden=None, heads=128)
    plan = replace(PLAN, tune=("hidden",), sampler="random", trials=4)
    result = search(dataset(), tmp_path / "s", plan=plan, fixed=fixed)
    fits = [trial["settings"]["hidden"] % 128 == 0 for trial in result["trials"]]
    assert [trial["state"] == "complete" for trial in result["trials"]] == fits
    assert not all(fits)
    why = next(trial["why"] for trial in result["trials"] if trial["state"] == "pruned")
    assert why.startswith("128 heads cannot share ")


def test_what_diverges_is_no_setting(tmp_path: Path) -> None:
    fixed = replace(TINY, learning_rate=1e30, clip=1e30)
    plan = replace(PLAN, tune=("dropout",), trials=1)
    with pytest.raises(InvalidArgumentError, match="no trial was finished: it diverged"):
        search(dataset(), tmp_path / "s", plan=plan, fixed=fixed)
    assert not (tmp_path / "s" / "best.toml").exists()


def test_types_alone_are_measured_by_log_loss_and_a_hopeless_trial_is_pruned(
    tmp_path: Path,
) -> None:
    """After five whole ones, by the epochs of its first fold."""
    data = dataset(items=0, times=False)
    plan = replace(PLAN, trials=8, tune=("learning_rate",), sampler="random")
    result = search(data, tmp_path / "s", plan=plan, fixed=replace(TINY, epochs=3))
    assert (result["metric"], result["better"]) == ("type_log_loss", "lower")
    assert result["folds_by"] == "user"
    whole = [trial for trial in result["trials"] if trial["state"] == "complete"]
    pruned = [trial for trial in result["trials"] if trial["state"] == "pruned"]
    assert result["best"]["mean"] == min(trial["mean"] for trial in whole) > 0
    assert pruned
    assert all(trial["trial"] > 5 and len(trial["folds"]) < 2 for trial in pruned)


@pytest.mark.parametrize(
    ("changes", "fixed", "said"),
    [
        ({"tune": ("droput",)}, TINY, "'droput' is none of the settings"),
        ({"tune": ("terms",)}, TINY, "terms has no effect on this data"),
        ({"tune": ()}, TINY, "decides everything"),
        ({}, replace(TINY, towers=3), "3 towers cannot share"),
        ({}, replace(TINY, model_type="logistic"), "logistic has no setting epochs"),
        ({"folds": 200}, TINY, "do not give 200 folds"),
        ({"folds": 1, "folds_by": "user"}, TINY, "two folds at least"),
    ],
)
def test_what_cannot_be_searched_is_told_and_writes_nothing(
    tmp_path: Path, changes: dict[str, Any], fixed: FitConfig, said: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        search(dataset(), tmp_path / "s", plan=replace(PLAN, **changes), fixed=fixed)
    assert not (tmp_path / "s").exists()


@pytest.fixture
def command(tmp_path: Path, embedder_address: str) -> list[str]:
    path = tmp_path / "events.csv"
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "behavior_type", "item_id", "timestamp"])
        for user in range(100):
            for step in range(8):
                row = (f"u{user}", "ab"[step % 2], f"i{rng.integers(20)}", step * 1000 + user)
                writer.writerow(row)
    config = tmp_path / "fixed.toml"
    config.write_text(config_file.text(replace(TINY, epochs=4, batch_contexts=32), ""))
    arguments = ["search", "--events", str(path), "--embedder", embedder_address, "--trials", "3"]
    return [*arguments, "--folds", "2", "--tune", "dropout", "--config", str(config), "--json"]


def in_the_middle_of(trial: str, line: str) -> bool:
    """Whether a line of the bar says that some epochs of a trial are done."""
    return f"{trial}/3: " in line and "/8 [" in line and " 0/8 [" not in line


class Terminated(io.StringIO):
    """A standard error that terminates its process in the middle of the second trial."""

    def write(self, text: str) -> int:
        if in_the_middle_of("trial 2", text):
            signal.raise_signal(signal.SIGTERM)
        return super().write(text)


def kill_in_the_middle_of(trial: str, command: Sequence[str]) -> None:
    arguments = [sys.executable, "-m", "predictor", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # a bar's lines end where it is drawn anew
            if in_the_middle_of(trial, line):
                process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_killed_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main([*command, "--out", str(tmp_path / "whole")]) == 0
    whole = json.loads(capsys.readouterr().out)
    command += ["--out", str(tmp_path / "killed")]
    with contextlib.redirect_stderr(Terminated()) as terminated:
        assert commands.main(command) == 130
    assert "interrupted: 1 of 3 trials are kept in" in terminated.getvalue()
    assert "the same command continues" in terminated.getvalue()
    kill_in_the_middle_of("trial 3", command)
    kept = json.loads((tmp_path / "killed" / "search.json").read_text())
    assert len(kept["trials"]) == 2
    assert commands.main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(again["trials"]) == 3
    assert without_seconds(again) == without_seconds(whole)

"""A study goes on as if it had never been stopped, and knows what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from foretell.errors import FailedPreconditionError, InvalidArgumentError
from predictor.learning.search.space import Setting, Space
from predictor.learning.search.study import TRIES, SamplerKind, Study, owned

SPACE: Space = {
    "dropout": FloatDistribution(0.0, 1.0),
    "dims": CategoricalDistribution((32, 64, 128)),
}
START = {"dropout": 0.5, "dims": 64}


def opened(folder: Path, sampler: SamplerKind = "tpe", seed: int = 1) -> Study:
    folder.mkdir(exist_ok=True)
    return Study(folder, SPACE, START, sampler=sampler, seed=seed, warm_up=1)


def asked(study: Study) -> Trial:
    trial = study.ask()
    assert trial is not None
    return trial


def settings(study: Study) -> list[dict[str, object]]:
    return [trial.params for trial in study.finished]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_stopped_study_goes_on_as_if_it_had_not_been(
    tmp_path: Path, sampler: SamplerKind
) -> None:
    trials = 12 if sampler == "tpe" else 4  # beyond TPE's ten random ones, which nothing changes
    whole = opened(tmp_path / "whole", sampler)
    for _ in range(trials):
        trial = asked(whole)
        whole.complete(trial, trial.params["dropout"])
    stopped = opened(tmp_path / "stopped", sampler)
    for at in range(trials):
        if at in (0, 2, 10):  # the process is killed
            asked(stopped)
            stopped = opened(tmp_path / "stopped", sampler)
        elif at in (1, 11):  # the trial is interrupted
            stopped.drop(asked(stopped))
        trial = asked(stopped)
        stopped.complete(trial, trial.params["dropout"])
    assert settings(stopped) == settings(whole)
    assert settings(whole)[0] == START
    drawn = {trial["dropout"] for trial in settings(whole)}
    assert len(drawn) == trials
    other = opened(tmp_path / "other", sampler, seed=2)
    for _ in range(2):
        other.complete(asked(other), 0.0)
    assert settings(other)[1] != settings(whole)[1]


def test_what_ends_the_process_each_time_is_given_up(tmp_path: Path) -> None:
    for _ in range(TRIES):
        study = opened(tmp_path)
        study.drop(asked(study))  # what a person interrupts does not count
        trial = asked(study)
        assert not study.ended_the_process(trial)
    study = opened(tmp_path)
    trial = asked(study)
    assert study.ended_the_process(trial)
    study.prune(trial, "too much")
    assert [trial.user_attrs["why"] for trial in study.finished] == ["too much"]
    assert not study.ended_the_process(asked(study))


def test_another_search_does_not_go_on_here(tmp_path: Path) -> None:
    opened(tmp_path).claim({"folds": 3, "data": {"events": "a"}})
    opened(tmp_path).claim({"folds": 3, "data": {"events": "a"}})
    with pytest.raises(InvalidArgumentError, match="another folds and data"):
        opened(tmp_path).claim({"folds": 2, "data": {"events": "b"}})


def test_a_directory_belongs_to_one_search(tmp_path: Path) -> None:
    with (
        owned(tmp_path / "new"),
        pytest.raises(FailedPreconditionError, match="another search is running"),
        owned(tmp_path / "new"),
    ):
        pass
    with owned(tmp_path / "new"):
        pass
    with pytest.raises(InvalidArgumentError, match="something else"), owned(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(FailedPreconditionError, match="cannot be written"):  # noqa: SIM117
        with owned(tmp_path / "file"):
            pass


def test_a_file_that_is_no_study_is_told(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"no database at all, but long enough to be read as one")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        opened(tmp_path)


def test_importances_need_some_trials_that_differ(tmp_path: Path) -> None:
    study = opened(tmp_path)
    assert study.importances() == {}
    for _ in range(8):
        trial = asked(study)
        study.complete(trial, trial.params["dropout"])
    found = study.importances()
    assert list(found) == ["dropout", "dims"]
    assert sum(found.values()) == pytest.approx(1)


def test_a_trial_chooses_what_has_an_effect_and_what_none_had(tmp_path: Path) -> None:
    space: Space = {
        "model_type": CategoricalDistribution(("linear", "lightgbm")),
        "features": CategoricalDistribution(("all", "first")),
        "dims": CategoricalDistribution((8, 16)),
        "epochs": IntDistribution(10, 11),
    }
    start: dict[str, Setting] = {
        "model_type": "lightgbm",
        "features": "first",
        "dims": 8,
        "epochs": 10,
    }
    study = Study(tmp_path, space, start, sampler="random", seed=1, warm_up=1)
    while (trial := study.ask()) is not None:
        study.complete(trial, 0.0)
    assert settings(study)[0] == start
    found = {tuple(trial.values()) for trial in settings(study)}
    linear = {("linear", "all"), *(("linear", "first", dims) for dims in (8, 16))}
    trees = {("lightgbm", *own[1:], epochs) for own in linear for epochs in (10, 11)}
    assert found == linear | trees
    assert len(settings(study)) == len(found)

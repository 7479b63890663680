"""What train --config takes, and what it says to the rest."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from foretell.errors import InvalidArgumentError
from predictor.learning import commands
from predictor.learning.classic.recipe import CLASSIC
from predictor.learning.sequence import config_file
from predictor.learning.sequence.recipe import FitConfig
from predictor.models.sequence.encoders import model_types


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = FitConfig(
        model_type="gru", dims=32, terms=False, traces=True, negatives=0, learning_rate=1e-05,
        dropout=0.1 + 0.2, averaging=0.995, weight_decay=0.0,
    )  # fmt: skip
    path = tmp_path / "c.toml"
    path.write_text(config_file.text(config, "two lines,\none with \x07 a bell\n\nafter a gap"))
    assert config_file.read(path) == config
    assert path.read_text().splitlines()[:4] == [
        "# two lines,", "# one with ? a bell", "#", "# after a gap",
    ]  # fmt: skip
    assert "epochs" not in path.read_text()


@pytest.mark.parametrize("model", [*model_types(), *CLASSIC])
def test_every_model_that_train_knows_can_be_named(tmp_path: Path, model: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'model_type = "{model}"\n')
    assert config_file.read(path).model_type == model


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("dropout = 0\nlate_weight = 2\n")
    assert config_file.read(path) == FitConfig(dropout=0, late_weight=2)


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        ("droput = 0.1", "droput", "none of the settings model_type"),
        ("[fit]\ndims = 3", "fit", "none of the settings"),
        ("seed = 3", "seed", "--seed"),
        ("dims = 12.0", "dims", "whole number from 1"),
        ("dims = true", "dims", "must be a number"),
        ("dims = 0", "dims", "whole number from 1"),
        ("hidden = 99999999999999999999", "hidden", "whole number from 1 to 1,000,000"),
        ("history_length = 5001", "history_length", "to 5,000"),
        ("negatives = -1", "negatives", "whole number from 0"),
        ("dropout = 1.0", "dropout", "below 1"),
        ("averaging = -0.1", "averaging", "at least 0"),
        ("learning_rate = 0", "learning_rate", "above 0"),
        ("learning_rate = nan", "learning_rate", "must be a number"),
        ("weight_decay = inf", "weight_decay", "must be a number"),
        ("weight_decay = -0.1", "weight_decay", "not be negative"),
        ("learning_rate = '0.1'", "learning_rate", "must be a number"),
        ("dims = [64]", "dims", "whole number"),
        ("terms = 1", "terms", "true or false"),
        ("model_type = 'grus'", "model_type", "one of rnn, gru, lstm"),
        ("model_type = ['gru']", "model_type", "one of"),
        ("features = 'some'", "features", "one of all"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, line: str, name: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(line + "\n")
    with pytest.raises(InvalidArgumentError) as caught:
        config_file.read(path)
    assert caught.value.field == name
    assert repr(name) in caught.value.message
    assert said in caught.value.message


@pytest.mark.parametrize("content", [b"dims 3", b"\xff\xfe", b"dims = 1\ndims = 2"])
def test_what_is_no_toml_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="no TOML file"):
        config_file.read(path)


def test_a_missing_file_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--events", "none.csv", "--out", str(tmp_path / "v"), "--config"]
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        assert commands.main([*arguments, str(path)]) == 2
        assert said in capsys.readouterr().err


def test_options_win_and_the_lineage_knows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("dims = 32\nepochs = 4\n")
    config, lineage = config_file.given(path, dims=64, epochs=None, model_type="gru")
    assert config == FitConfig(model_type="gru", dims=64, epochs=4)
    assert lineage == {
        "config": "c.toml",
        "config_sha256": "71d5890a54e1d005c427bb376a5384be1be49bc14c3c8b8eed2b284374e05bba",
    }
    assert config_file.given(None, dims=8) == (FitConfig(dims=8), {})


def test_every_field_of_a_fit_is_a_setting() -> None:
    assert {*config_file.NAMES, "seed"} == {field.name for field in fields(FitConfig)}

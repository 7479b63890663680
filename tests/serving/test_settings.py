from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from serving.settings import ServiceSettings, load


class SampleSettings(ServiceSettings):
    """A sample."""

    model_config = SettingsConfigDict(env_prefix="SAMPLE_")

    size_bytes: int = Field(default=1, ge=1)
    """How large."""
    folder: Path | None = None
    """Where."""


def read(*arguments: str) -> SampleSettings:
    return load(SampleSettings, arguments, "sample")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as raised:
        read(*arguments)
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    settings = read()
    assert settings.size_bytes == 1
    assert settings.folder is None


def test_flag_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('size_bytes = 2\nfolder = "there"\nport = 9\n')
    assert read("--config", str(file)).size_bytes == 2
    monkeypatch.setenv("SAMPLE_SIZE_BYTES", "3")
    settings = read("--config", str(file))
    assert (settings.size_bytes, settings.folder, settings.port) == (3, Path("there"), 9)
    assert read("--config", str(file), "--size-bytes", "4").size_bytes == 4


def test_config_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("size_bytes = 2\n")
    monkeypatch.setenv("SAMPLE_CONFIG", str(file))
    assert read().size_bytes == 2


def test_faults_are_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("sise_bytes = 2\n")
    assert "sise_bytes" in refusal(capsys, "--config", str(file))
    file.write_text("size_bytes = \n")
    assert refusal(capsys, "--config", str(file)).count("\n") == 1
    assert "there is no file" in refusal(capsys, "--config", str(tmp_path / "none.toml"))
    message = refusal(capsys, "--size-bytes", "0")
    assert "size_bytes" in message
    assert message.count("\n") == 1
    assert "size_bytes" in refusal(capsys, "--size-bytes", "many")
    monkeypatch.setenv("SAMPLE_SIZE", "3")
    assert "SAMPLE_SIZE" in refusal(capsys)


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--no-such-flag" in refusal(capsys, "--no-such-flag", "1")


def test_settings_are_frozen_and_described() -> None:
    settings = read("--port", "5")
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 6
    assert "port=5" in settings.describe()


def test_every_setting_has_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    for name, field in SampleSettings.model_fields.items():
        assert field.description, name
    with pytest.raises(SystemExit) as raised:
        read("--help")
    assert raised.value.code == 0
    assert "How large." in capsys.readouterr().out

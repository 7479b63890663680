"""Settings of a service: flags, then environment, then a TOML file, then defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from serving.logs import LogFormat


class ServiceSettings(BaseSettings):
    """What every service can be told.

    Each field is a flag (`--max-concurrent-calls`), an environment variable (prefix and upper
    case) and a key of the TOML file that `--config` names.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = None
    """TOML file with settings."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=0, ge=0, le=65_535)
    """Port to listen on; 0: any free one, printed once the service is ready."""
    drain_s: float = Field(default=0.2, ge=0, le=300)
    """After SIGTERM, seconds of reported NOT_SERVING before new calls are refused."""
    grace_s: float = Field(default=30.0, ge=0, le=3_600)
    """After that, seconds in which calls in flight may finish."""
    max_concurrent_calls: int = Field(default=1_000, ge=1)
    """Calls in flight, above which new ones get RESOURCE_EXHAUSTED."""
    max_queue_ms: int = Field(default=200, ge=1, le=3_600_000)
    """How long a call may wait for the texts (the predictor: the predictions) of others, or 8 times
    as long as its own take if that is longer; beyond that it gets RESOURCE_EXHAUSTED at once."""
    max_streams: int = Field(default=100, ge=1)
    """Answers that are streams, such as WatchItems, open at once; counted apart from the calls."""
    max_connection_age_s: float = Field(default=1_800.0, ge=1, le=86_400)
    """Age at which clients are asked to connect anew, so that they find new processes; a tenth more
    or less by chance. Calls on the old connection get 5 minutes more, streams too."""
    tls_certificate_file: Path | None = None
    """PEM file of the service's certificate chain; read again when it changes."""
    tls_key_file: Path | None = None
    """PEM file of its key."""
    tls_client_ca_file: Path | None = None
    """PEM file of authorities, one of which must have signed a client's certificate."""
    tokens_file: Path | None = None
    """TOML file of the tokens that callers must show; read again when it changes."""
    allow_insecure: bool = False
    """Listen on other addresses than this machine's own without certificate and tokens."""
    log_format: LogFormat = LogFormat.AUTO
    """Lines of the log on the standard error: json, text, or by whether that is a terminal."""
    metrics_port: int = Field(default=0, ge=0, le=65_535)
    """Port of Prometheus's page /metrics, on the same address and without TLS or token; 0: none."""
    otlp_endpoint: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """Where traces go: http://HOST:PORT, or https, of an OpenTelemetry collector (OTLP over gRPC);
    empty: none are made. Needs the extra tracing."""
    trace_sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the calls that are traced, of those whose caller has not decided that."""
    reflection: bool = True
    """Answer the reflection service, which tells anybody the contracts."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of precedence; the command line comes before all of them."""
        toml = settings_cls.model_config.get("toml_file")
        sources = (init_settings, env_settings)
        return (*sources, TomlConfigSettingsSource(settings_cls)) if toml else sources

    def describe(self) -> str:
        """One line for the log; secrets are masked by their type."""
        shown = ((name, value.value if isinstance(value, Enum) else value) for name, value in self)
        return " ".join(f"{name}={value}" for name, value in shown)


Settings = TypeVar("Settings", bound=ServiceSettings)


def load(kind: type[Settings], arguments: Sequence[str], program: str) -> Settings:
    """Settings from the command line, the environment and the file that `--config` names.

    Exits with status 2 and one line that names the setting at fault.
    """
    prefix = kind.model_config["env_prefix"]
    known = {prefix + name.upper() for name in kind.model_fields}
    for variable in os.environ:
        if variable.startswith(prefix) and variable not in known:
            _refuse(program, f"unknown setting in the environment: {variable}")
    try:
        settings = _read(kind, arguments, program, None)
        if settings.config is None:
            return settings
        if not settings.config.is_file():
            _refuse(program, f"config: there is no file {settings.config}")
        return _read(kind, arguments, program, settings.config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        _refuse(program, f"{name}: {first['msg']} (got {first['input']!r})")
    except (SettingsError, ValueError) as error:
        _refuse(program, str(error))


def _read(
    kind: type[Settings], arguments: Sequence[str], program: str, file: Path | None
) -> Settings:
    class Configured(kind):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(toml_file=file)

    Configured.__doc__ = kind.__doc__
    values: dict[str, Any] = {"_cli_parse_args": list(arguments), "_cli_prog_name": program}
    return Configured(**values)


def _refuse(program: str, message: str) -> NoReturn:
    sys.stderr.write(f"{program}: {message}\n")
    raise SystemExit(2)

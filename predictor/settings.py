"""What the predictor can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from foretell._security import Security
from serving.settings import ServiceSettings

PROGRAM = "predictor"
"""Its name in messages and in the log."""


class PredictorSettings(ServiceSettings):
    """Settings of `python -m predictor`; environment variables begin with FORETELL_PREDICTOR_."""

    model_config = SettingsConfigDict(
        env_prefix="FORETELL_PREDICTOR_", protected_namespaces=("settings_",)
    )

    port: int = Field(default=50_052, ge=0, le=65_535)
    """Port to listen on; 0: any free one, printed once the service is ready."""
    processes: int = Field(default=1, ge=1, le=64)
    """Processes that serve behind the one port (Linux). A dead one is replaced. Limits and rates
    count in each; metrics are on metrics_port and the ports after it."""
    data_dir: Path = Path("data/predictor")
    """Events and registered models. Several predictors on one host may share it."""
    embedder: str = "127.0.0.1:50051"
    """host:port of the embedder; several IP:PORT of the same contents with commas between them."""
    embedder_ca_file: str = ""
    """PEM file of authorities that may have signed the embedder's certificate; turns TLS on."""
    embedder_certificate_file: str = ""
    """PEM file of a certificate to show to the embedder."""
    embedder_key_file: str = ""
    """PEM file of its key."""
    embedder_server_name: str = ""
    """Name in the embedder's certificate, where it is not the address's."""
    embedder_token_file: str = ""
    """File with the token to show to the embedder."""
    embedder_deadline_ms: int = Field(default=1_000, ge=1, le=600_000)
    """How long a prediction waits for the embedder before it answers without."""
    activation_deadline_s: float = Field(default=120.0, gt=0, le=3_600)
    """How long ActivateModel and DeleteModel may take where their caller set no deadline."""
    heartbeat_s: float = Field(default=1.0, gt=0, le=60)
    """How often a process says that it lives and looks which model is active. One that has been
    silent for five times as long counts as gone. Processes on one data_dir need the same value."""
    history_events: int = Field(default=200, ge=1, le=5_000)
    """Latest events of a user that an answer without a model rests on."""
    retention_days: int = Field(default=0, ge=0, le=36_500)
    """Events older than this are deleted in the background; 0: kept for ever."""
    retention: dict[str, Annotated[int, Field(ge=0, le=36_500)]] = Field(default={})
    """Days of single behavior types, in place of retention_days: `--retention view=90`, repeated;
    a table in TOML, JSON in the environment."""
    threads: int = Field(default=1, ge=1, le=256)
    """Threads of the sequence model's forward pass. More of them help PredictMany only."""

    @model_validator(mode="after")
    def _ports_exist(self) -> Self:
        if self.metrics_port + self.processes - 1 > 65_535:
            raise ValueError("metrics_port: there are not as many ports after it as processes")
        return self

    @property
    def embedder_security(self) -> Security:
        """How the embedder is called.

        Raises:
            InvalidArgumentError: files that do not go together.
        """
        return Security(
            ca_file=self.embedder_ca_file,
            certificate_file=self.embedder_certificate_file,
            key_file=self.embedder_key_file,
            server_name=self.embedder_server_name,
            token_file=self.embedder_token_file,
        )

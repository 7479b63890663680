"""Registered versions: their files under DATA_DIR/models, their rows, and which one is active."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from foretell.predictor.v1 import model_service_pb2, prediction_service_pb2
from predictor.models import model_dir
from predictor.models.version import OWN
from serving.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS models (
    version TEXT PRIMARY KEY,
    registered_us INTEGER NOT NULL,
    files TEXT NOT NULL,
    model TEXT NOT NULL,
    published INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS models_newest ON models (registered_us, version);
CREATE TABLE IF NOT EXISTS activations (
    generation INTEGER PRIMARY KEY AUTOINCREMENT,
    version TEXT NOT NULL,
    previous TEXT NOT NULL,
    activated_us INTEGER NOT NULL
);
"""


@dataclass(frozen=True)
class RegisteredModel:
    """A version's row."""

    version: str
    registered_us: int
    """Microseconds since 1970."""
    model_type: str
    behavior_types: list[str]
    items: int
    """Of the catalogue at training."""
    repeats: str
    """allowed or excluded."""
    metrics: dict[str, float]
    parts: list[str]
    """Beside the sequence model."""
    published: bool
    """Whether its collections were complete in the embedder once."""

    def to_proto(self, active: str) -> model_service_pb2.Model:
        """As the contract describes it; `active` is the active version."""
        message = model_service_pb2.Model(
            version=self.version,
            model_type=self.model_type,
            active=self.version == active,
            behavior_types=self.behavior_types,
            items=self.items,
            repeats=(
                prediction_service_pb2.REPEATS_EXCLUDED
                if self.repeats == "excluded"
                else prediction_service_pb2.REPEATS_ALLOWED
            ),
            metrics=self.metrics,
            parts=self.parts,
        )
        message.registered_at.FromMicroseconds(self.registered_us)
        return message


@dataclass(frozen=True)
class Activation:
    """What is active since when; the last row of all activations counts."""

    generation: int
    """Grows with every activation; 0: there was none."""
    version: str
    previous: str
    """The version before; empty where there was none."""


NEVER = Activation(0, "", "")
"""Before the first activation."""


def models_dir(data_dir: Path) -> Path:
    """Where versions' directories are."""
    return data_dir / "models"


def register(db: Database, data_dir: Path, directory: Path) -> str:
    """Brings a version directory in: checks it, copies it, and writes its row.

    Repeated with the same directory it changes nothing. Returns the version's name.

    Raises:
        InvalidArgumentError: the directory is damaged, of another format, or does not give its
            golden answers here.
        AlreadyExistsError: another version of this name is registered.
    """
    version = model_dir.load(directory)
    version.check_golden()
    config = version.config
    files = json.dumps(config.files, sort_keys=True)
    known = (
        db.connection()
        .execute("SELECT files FROM models WHERE version = ?", (config.version,))
        .fetchone()
    )
    if known is not None:
        if known[0] != files:
            raise AlreadyExistsError(
                f"another version {config.version!r} is registered",
                reason="VERSION_EXISTS",
                field="version",
            )
        return config.version
    copy(directory, models_dir(data_dir) / config.version)
    model = {
        "model_type": config.network.model_type,
        "behavior_types": list(config.behavior_types),
        "items": len(version.item_ids),
        "repeats": config.repeats,
        "parts": [name for name in model_dir.PARTS if getattr(version, name) is not None],
        "metrics": _own_metrics(version.reports["metrics.json"]),
    }
    row = (config.version, time.time_ns() // 1_000, files, json.dumps(model))
    db.submit(
        lambda connection: connection.execute("INSERT INTO models VALUES (?, ?, ?, ?, 0)", row)
    ).result()
    return config.version


def copy(source: Path, target: Path) -> None:
    """Copies a directory durably; it appears whole or not at all.

    What is there without a row is left from a registration that was cut off, and replaced.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for left in (temporary, target):
        shutil.rmtree(left, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, temporary)
        for path in (temporary, *temporary.rglob("*")):
            _sync(path)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The version's figures in its metrics.json, such as items.hits_at_10; no baseline's."""
    metrics = {}
    for part in ("items", "types"):
        methods = report.get(part)
        own = methods.get(OWN) if isinstance(methods, Mapping) else None
        for name, value in own.items() if isinstance(own, Mapping) else ():
            # An integer beyond the range of float is no figure.
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max:
                metrics[f"{part}.{name}"] = float(value)
    return metrics


def page(
    connection: sqlite3.Connection, size: int, before: tuple[int, str] | None
) -> tuple[list[RegisteredModel], tuple[int, str] | None]:
    """Up to `size` versions registered before `before`, newest first; and `before` of the next
    page, None on the last one."""
    rows = connection.execute(
        """
        SELECT version, registered_us, model, published FROM models
        WHERE (registered_us, version) < (?, ?)
        ORDER BY registered_us DESC, version DESC LIMIT ?
        """,
        (*(before or (2**63 - 1, "")), size + 1),
    ).fetchall()
    models = [_read(row) for row in rows[:size]]
    last = models[-1] if len(rows) > size else None
    return models, (last.registered_us, last.version) if last else None


def files(connection: sqlite3.Connection) -> dict[str, str]:
    """All versions, with the sha256 of their files in JSON."""
    return dict(connection.execute("SELECT version, files FROM models"))


def get(connection: sqlite3.Connection, version: str) -> RegisteredModel:
    """One version.

    Raises:
        NotFoundError: it is not registered.
    """
    row = connection.execute(
        "SELECT version, registered_us, model, published FROM models WHERE version = ?", (version,)
    ).fetchone()
    if row is None:
        raise NotFoundError(
            f"version {version!r} is not registered", reason="VERSION_NOT_FOUND", field="version"
        )
    return _read(row)


def _read(row: tuple[str, int, str, int]) -> RegisteredModel:
    version, registered_us, model, published = row
    return RegisteredModel(version, registered_us, **json.loads(model), published=bool(published))


def active(connection: sqlite3.Connection) -> Activation:
    """What is active now."""
    row = connection.execute(
        "SELECT generation, version, previous FROM activations ORDER BY generation DESC LIMIT 1"
    ).fetchone()
    return Activation(*row) if row else NEVER


def activate(connection: sqlite3.Connection, version: str) -> Activation:
    """Makes a version the active one; of the active one nothing changes.

    Raises:
        NotFoundError: it is not registered.
    """
    get(connection, version)
    now = active(connection)
    if now.version != version:
        connection.execute(
            "INSERT INTO activations (version, previous, activated_us) VALUES (?, ?, ?)",
            (version, now.version, time.time_ns() // 1_000),
        )
    return active(connection)


def set_published(connection: sqlite3.Connection, version: str, published: bool) -> None:
    """Notes whether the version's collections are complete in the embedder."""
    connection.execute("UPDATE models SET published = ? WHERE version = ?", (published, version))


def check_deletable(connection: sqlite3.Connection, version: str) -> None:
    """Raises:
    NotFoundError: the version is not registered.
    FailedPreconditionError: it is the active one.
    """
    get(connection, version)
    if active(connection).version == version:
        raise FailedPreconditionError(
            f"version {version!r} is active; activate another one first",
            reason="VERSION_ACTIVE",
            field="version",
        )


def remove(connection: sqlite3.Connection, version: str) -> None:
    """Deletes a version's row; see check_deletable for what it raises."""
    check_deletable(connection, version)
    connection.execute("DELETE FROM models WHERE version = ?", (version,))


def remove_files(data_dir: Path, version: str) -> None:
    """Deletes the files of a version whose row is gone."""
    shutil.rmtree(models_dir(data_dir) / version, ignore_errors=True)

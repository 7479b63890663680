"""The version directory: all that passes from training to serving.

    config.json             VersionConfig, with the sha256 of every other file
    weights.safetensors     the sequence network, without item vectors
    projection.safetensors  weight_0, bias_0, ...: affine layers from text vector to model space
    items.safetensors       `residuals` (items, dims) float32; only with an item head
    items.json              the ids of these rows
    golden.safetensors      a few histories with the answers expected of the network
    metrics.json  lineage.json  history.json  plots/*.png

Everything is safetensors or JSON, nothing is pickled: a directory from a stranger can be wrong but
runs no code. `load` checks the format number, every sha256 and all shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from foretell.errors import InvalidArgumentError
from foretell.projection import Activation, AffineLayer, Projection
from foretell.vectors import Vectors
from predictor.models.history import GAPS, HistoryBatch, Ints
from predictor.models.sequence import NetworkConfig, SequenceModel, SequenceNetwork

FORMAT = 1
"""Of the directory. A reader refuses any other."""

VERSION_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,48}")
"""Names that, with `.behaviors` behind them, are names of collections."""

GOLDEN_TOLERANCE = 1e-3
"""Largest difference to the golden answers: covers other CPUs and libraries, not other weights."""


class EncoderConfig(BaseModel):
    """The text encoder whose vectors the version was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    pooling: str
    cols: int = Field(gt=0)


class VersionConfig(BaseModel):
    """config.json of a version directory."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format: Literal[1] = 1
    version: str = Field(pattern=rf"^{VERSION_NAME.pattern}$")
    model_type: str
    encoder: EncoderConfig
    behavior_types: tuple[str, ...] = Field(min_length=1)
    """In the order of the network's type logits."""
    history_length: int = Field(gt=0)
    """A history is cut to this many last events before it is read."""
    dims: int = Field(gt=0)
    """Dimensions of the model's space."""
    hidden: int = Field(gt=0)
    repeats: Literal["allowed", "excluded"]
    """What REPEATS_UNSPECIFIED means: `excluded` where users hardly ever repeat an item."""
    has_items: bool
    """Whether there is an item head: publish `VERSION.items`."""
    has_texts: bool
    """Whether events carry texts: publish `VERSION.behaviors`."""
    has_times: bool
    """Whether time gaps were seen in training; see history_batch."""
    type_temperature: float = Field(gt=0)
    """Type probabilities are softmax(logits / type_temperature)."""
    item_temperature: float = Field(gt=0)
    """Item probabilities are softmax(scores / item_temperature) over `candidates` best items."""
    candidates: int = Field(gt=0)
    activations: tuple[Literal["identity", "relu", "gelu", "tanh"], ...] = ("identity",)
    """Of the projection's layers."""
    files: dict[str, str]
    """sha256 of every other file, by its path within the directory."""


@dataclass(frozen=True)
class Golden:
    """Histories and the answers that the version gave when it was written."""

    histories: HistoryBatch
    type_probabilities: NDArray[np.float32]
    """(histories, behavior_types)."""
    queries: Vectors
    """(histories, dims)."""


@dataclass(frozen=True)
class Version:
    """A loaded version directory."""

    path: Path
    config: VersionConfig
    model: SequenceModel
    projection: Projection
    """From text vectors (encoder.cols) to the model's space (dims); never normalised."""
    item_ids: tuple[str, ...]
    """Items with a residual of their own; empty without an item head."""
    residuals: Vectors
    """(len(item_ids), dims)."""
    golden: Golden
    metrics: dict[str, Any]
    """metrics.json: see evaluation."""

    def predict(self, batch: HistoryBatch) -> tuple[NDArray[np.float32], Vectors]:
        """Calibrated type probabilities (histories, types) and queries (histories, dims)."""
        outputs = self.model.predict(batch)
        return softmax(outputs.type_logits, self.config.type_temperature), outputs.queries

    def item_probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities (rows, k) of the `candidates` best scores (rows, k) of each history."""
        return softmax(scores, self.config.item_temperature)

    def check_golden(self) -> None:
        """Recomputes the golden histories.

        Raises:
            InvalidArgumentError: an answer differs by more than GOLDEN_TOLERANCE.
        """
        probabilities, queries = self.predict(self.golden.histories)
        for name, ours, theirs in (
            ("type probabilities", probabilities, self.golden.type_probabilities),
            ("query vectors", queries, self.golden.queries),
        ):
            worst = float(np.abs(ours - theirs).max(initial=0.0))
            if not worst <= GOLDEN_TOLERANCE:  # catches NaN too
                raise _damaged(
                    self.path / "golden.safetensors",
                    f"{name} differ by {worst:.2g}; at most {GOLDEN_TOLERANCE} is allowed",
                )


def softmax(scores: NDArray[np.float32], temperature: float = 1.0) -> NDArray[np.float32]:
    """Row-wise softmax of scores / temperature, safe for large scores."""
    if not scores.shape[-1]:
        return scores
    scaled = scores.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    out: NDArray[np.float32] = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(
        np.float32
    )
    return out


def check_version_name(name: str) -> str:
    """The name, if a version may have it.

    Raises:
        InvalidArgumentError: it may not.
    """
    if not VERSION_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"{name!r} is no version name: 1 to 49 of a-z, 0-9, '.', '_', '-', "
            "the first a letter or digit",
            reason="BAD_VERSION_NAME",
            field="version",
        )
    return name


# Writing


@dataclass(frozen=True)
class TrainedVersion:
    """All that `write` needs."""

    config: VersionConfig
    """`files` is filled in by `write`."""
    network: SequenceNetwork
    projection: Projection
    item_ids: tuple[str, ...]
    residuals: Vectors
    golden_histories: HistoryBatch
    reports: dict[str, Any]
    """File name (metrics.json, ...) to what it holds."""
    plots: dict[str, bytes]
    """File name to PNG."""


def check_absent(directory: Path) -> None:
    """Raises InvalidArgumentError where a version directory cannot be written: something is there.

    Asked before a training, so that an hour's work does not end in this error.
    """
    if directory.exists():
        raise InvalidArgumentError(
            f"{directory} exists already", reason="VERSION_EXISTS", field="out"
        )


def write(directory: Path, trained: TrainedVersion) -> None:
    """Writes a version directory; it appears whole or not at all.

    Raises:
        InvalidArgumentError: the directory exists.
    """
    check_absent(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_files(temporary, trained)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(directory.parent)


def _write_files(directory: Path, trained: TrainedVersion) -> None:
    files = dict(_contents(trained))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config = trained.config.model_copy(update={"files": hashes})
    files["config.json"] = (config.model_dump_json(indent=2) + "\n").encode()
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(directory)


def _contents(trained: TrainedVersion) -> list[tuple[str, bytes]]:
    network = trained.network.eval()
    weights = {name: value.float().cpu().numpy() for name, value in network.state_dict().items()}
    layers = {
        f"{kind}_{position}": array
        for position, layer in enumerate(trained.projection.layers)
        for kind, array in (("weight", layer.weight), ("bias", layer.bias))
    }
    outputs = network.predict(trained.golden_histories)
    golden = {
        **_history_tensors(trained.golden_histories),
        "type_probabilities": softmax(outputs.type_logits, trained.config.type_temperature),
        "queries": outputs.queries,
    }
    files = [
        ("weights.safetensors", save_tensors(weights)),
        ("projection.safetensors", save_tensors(layers)),
        ("golden.safetensors", save_tensors(golden)),
    ]
    if trained.config.has_items:
        residuals = np.ascontiguousarray(trained.residuals, dtype=np.float32)
        files.append(("items.safetensors", save_tensors({"residuals": residuals})))
        files.append(("items.json", json.dumps(trained.item_ids, ensure_ascii=False).encode()))
    files += [(name, _json(report)) for name, report in trained.reports.items()]
    files += [(f"plots/{name}", png) for name, png in trained.plots.items()]
    return files


def _json(report: Any) -> bytes:
    return (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _history_tensors(batch: HistoryBatch) -> dict[str, NDArray[Any]]:
    return {
        "vectors": np.ascontiguousarray(batch.vectors, dtype=np.float32),
        "known": batch.known.astype(np.uint8),
        "types": batch.types,
        "gaps": batch.gaps,
        "lengths": batch.lengths,
    }


def _sync(directory: Path) -> None:
    """Makes the directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def load(path: str | os.PathLike[str]) -> Version:
    """Loads and checks a version directory; the network comes back in evaluation mode, on the CPU.

    Raises:
        InvalidArgumentError: no version directory, of another format, or damaged; the message
            names the file.
    """
    directory = Path(path)
    config = read_config(directory)
    data = {name: _checked(directory, name, digest) for name, digest in config.files.items()}
    projection = _projection(directory, config, data)
    item_ids, residuals = _items(directory, config, data)
    network = _network(directory, config, data)
    golden = _golden(directory, config, data)
    metrics = _parse(directory / "metrics.json", data["metrics.json"])
    if not isinstance(metrics, dict):
        raise _damaged(directory / "metrics.json", "not a JSON object")
    return Version(directory, config, network, projection, item_ids, residuals, golden, metrics)


def read_config(path: str | os.PathLike[str]) -> VersionConfig:
    """Reads config.json alone, without looking at the other files.

    Raises:
        InvalidArgumentError: it is missing, damaged, or of another format.
    """
    file = Path(path) / "config.json"
    try:
        text = file.read_bytes()
    except OSError as error:
        raise _damaged(file, f"not readable ({error.strerror}): no version directory") from None
    raw = _parse(file, text)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise _damaged(file, f"format {found!r}; this program reads format {FORMAT}")
    try:
        config = VersionConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(file, f"{where}: {first['msg']}") from None
    missing = _required(config) - config.files.keys()
    if missing:
        raise _damaged(file, f"`files` lacks {', '.join(sorted(missing))}")
    return config


def _required(config: VersionConfig) -> set[str]:
    names = {"weights.safetensors", "projection.safetensors", "golden.safetensors", "metrics.json"}
    return names | ({"items.safetensors", "items.json"} if config.has_items else set())


def _checked(directory: Path, name: str, digest: str) -> bytes:
    file = directory / name
    if not file.resolve().is_relative_to(directory.resolve()):
        raise _damaged(directory / "config.json", f"`files` names {name!r}, outside the directory")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise _damaged(file, f"not readable ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise _damaged(file, "its sha256 is not the one in config.json")
    return data


def _tensors(file: Path, data: bytes) -> dict[str, NDArray[Any]]:
    try:
        tensors: dict[str, NDArray[Any]] = load_tensors(data)
    except (SafetensorError, ValueError) as error:
        raise _damaged(file, f"not a safetensors file ({error})") from None
    for name, values in tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise _damaged(file, f"{name} has numbers that are not finite")
    return tensors


def _take(
    file: Path, tensors: dict[str, NDArray[Any]], name: str, shape: tuple[int | None, ...]
) -> NDArray[Any]:
    """The tensor, which must have this shape; None stands for any size."""
    if name not in tensors:
        raise _damaged(file, f"{name} is missing")
    found = tensors[name].shape
    fits = len(found) == len(shape) and all(
        want in (None, have) for have, want in zip(found, shape, strict=True)
    )
    if not fits:
        raise _damaged(file, f"{name} has shape {found}, not {shape}")
    return tensors[name]


def _projection(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> Projection:
    file = directory / "projection.safetensors"
    tensors = _tensors(file, data[file.name])
    layers = []
    cols: int | None = config.encoder.cols
    for position, activation in enumerate(config.activations):
        last = position == len(config.activations) - 1
        weight = _take(file, tensors, f"weight_{position}", (config.dims if last else None, cols))
        cols = weight.shape[0]
        bias = _take(file, tensors, f"bias_{position}", (cols,))
        layers.append(AffineLayer(weight, bias, Activation[activation.upper()]))
    return Projection(tuple(layers))


def _items(
    directory: Path, config: VersionConfig, data: dict[str, bytes]
) -> tuple[tuple[str, ...], Vectors]:
    if not config.has_items:
        return (), np.zeros((0, config.dims), np.float32)
    names = directory / "items.json"
    ids = _parse(names, data[names.name])
    if not isinstance(ids, list) or not all(isinstance(item_id, str) for item_id in ids):
        raise _damaged(names, "not a list of ids")
    if len(set(ids)) != len(ids):
        raise _damaged(names, "an id occurs twice")
    file = directory / "items.safetensors"
    residuals = _take(file, _tensors(file, data[file.name]), "residuals", (len(ids), config.dims))
    return tuple(ids), residuals


def _network(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> SequenceNetwork:
    file = directory / "weights.safetensors"
    try:
        network = SequenceNetwork(
            NetworkConfig(
                behavior_types=len(config.behavior_types),
                dims=config.dims,
                hidden=config.hidden,
                model_type=config.model_type,
            )
        )
    except ValueError as error:
        raise _damaged(directory / "config.json", str(error)) from None
    expected = network.state_dict()
    tensors = _tensors(file, data[file.name])
    unknown = tensors.keys() - expected.keys()
    if unknown:
        raise _damaged(file, f"{min(unknown)} belongs to no {config.model_type}")
    network.load_state_dict(
        {
            name: torch.from_numpy(_take(file, tensors, name, tuple(value.shape)))
            for name, value in expected.items()
        }
    )
    return network.eval().requires_grad_(False)


def _golden(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> Golden:
    file = directory / "golden.safetensors"
    tensors = _tensors(file, data[file.name])
    lengths: Ints = _take(file, tensors, "lengths", (None,))
    tokens, rows, types = int(lengths.sum()), len(lengths), len(config.behavior_types)
    histories = HistoryBatch(
        vectors=_take(file, tensors, "vectors", (tokens, config.dims)),
        known=_take(file, tensors, "known", (tokens,)).astype(np.bool_),
        types=_take(file, tensors, "types", (tokens,)),
        gaps=_take(file, tensors, "gaps", (tokens,)),
        lengths=lengths,
    )
    for name, values, top in (
        ("lengths", histories.lengths, config.history_length),
        ("types", histories.types, types),
        ("gaps", histories.gaps, GAPS - 1),
    ):
        if values.dtype != np.int64 or not ((values >= 0) & (values <= top)).all():
            raise _damaged(file, f"{name} are not all integers from 0 to {top}")
    probabilities = _take(file, tensors, "type_probabilities", (rows, types))
    return Golden(histories, probabilities, _take(file, tensors, "queries", (rows, config.dims)))


def _parse(file: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise _damaged(file, f"not JSON ({error})") from None


def _damaged(file: Path, what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{file}: {what}", reason="BAD_MODEL_DIRECTORY", metadata={"file": str(file)}
    )

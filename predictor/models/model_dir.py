"""The version directory: all that passes from training to serving.

    config.json             VersionConfig, with the sha256 of every other file
    weights.safetensors     the network, without item vectors
    trees.txt               boosted trees beside the layers of a BagNetwork, where there are any
    projection.safetensors  weight_0, bias_0, ...: affine layers from text vector to model space
    terms.json              the projection's terms, where it has any
    terms.safetensors       `idf` (terms,), `rows` (terms, dims)
    items.json              the catalogue at training: ids; only with an item head
    items.safetensors       `warm` (rows,) int64 positions in items.json, `residuals` (rows, dims)
    ranker/  type_model/  item_type_model/   the files() of these parts, where there are any
    encoder/                the text encoder, where it was made with the version: for the embedder
    golden.safetensors      a few histories with the answers expected of the network
    metrics.json  lineage.json  history.json  card.md  data_report.md  plots/*.png

Everything is safetensors or JSON, nothing is pickled: a directory from a stranger can be wrong but
runs no code. `load` checks the format number, every sha256 and all shapes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save as save_tensors

from foretell.errors import InvalidArgumentError
from foretell.projection import Activation, AffineLayer, Projection
from foretell.terms import TermRows
from foretell.vectors import Vectors
from predictor.models.history import GAPS, HOURS, HistoryBatch, Ints
from predictor.models.ranking import recommender
from predictor.models.ranking.ranker import Ranker
from predictor.models.sequence.bag import BagNetwork, Network, features_of, is_bag, make_network
from predictor.models.sequence.encoders import ENCODERS, NetworkConfig
from predictor.models.sequence.network import HALF_LIVES
from predictor.models.trees import check_trees
from predictor.models.types.models import ItemTypeModel, TypeModel
from predictor.models.untrusted import (
    ODD,
    damaged,
    parse,
    read_checked,
    read_file,
    read_strings,
    read_tensors,
    take,
)
from predictor.models.version import (
    VERSION_NAME,
    Golden,
    SecondStage,
    Version,
    VersionConfig,
)

PARTS: dict[str, Callable[[Mapping[str, bytes], VersionConfig], Any]] = {
    "ranker": lambda files, _: _second_stage(files),
    "type_model": lambda files, config: TypeModel.load(files, len(config.behavior_types)),
    "item_type_model": lambda files, config: ItemTypeModel.load(files, len(config.behavior_types)),
}
"""How each optional part of a Version is made of the files in its folder; ValueError: it cannot."""

_SMALL = 4_096
"""Sizes up to it may be larger than a network: positions and heads of one that has none."""

FORMAT = 2
"""Of the directory. A reader refuses any other."""


def check_version_name(name: str) -> str:
    """The name, if a version may have it.

    Raises:
        InvalidArgumentError: it may not.
    """
    if not re.fullmatch(VERSION_NAME, name):
        raise InvalidArgumentError(
            f"{name!r} is no version name: 1 to 49 of a-z, 0-9, '.', '_', '-', "
            "the first a letter or digit",
            reason="BAD_VERSION_NAME",
            field="version",
        )
    return name


# Writing


def check_absent(directory: Path) -> None:
    """Raises InvalidArgumentError where a version directory cannot be written: something is there.

    Asked before a training, so that an hour's work does not end in this error.
    """
    if directory.exists():
        raise InvalidArgumentError(
            f"{directory} exists already", reason="VERSION_EXISTS", field="out"
        )


def write(
    directory: Path,
    version: Version,
    card: str,
    plots: Mapping[str, bytes],
    *,
    data_report: str | None = None,
    encoder: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a version directory; it appears whole or not at all.

    Args:
        directory: its name is the version's.
        version: what answers, and its reports.
        card: for people, in Markdown.
        plots: PNG by name.
        data_report: what was odd about the data, in Markdown.
        encoder: files of a text encoder that was made with the version, by name.

    Raises:
        InvalidArgumentError: the directory exists.
    """
    check_absent(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        extra = {f"plots/{name}": png for name, png in plots.items()}
        extra |= {f"encoder/{name}": data for name, data in (encoder or {}).items()}
        if data_report is not None:
            extra["data_report.md"] = data_report.encode()
        _write_files(temporary, version, {"card.md": card.encode(), **extra})
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(directory.parent)


def _write_files(directory: Path, version: Version, extra: Mapping[str, bytes]) -> None:
    files = {**_contents(version), **extra}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config = version.config.model_copy(update={"files": hashes})
    files["config.json"] = (config.model_dump_json(indent=2) + "\n").encode()
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync(directory)


def _contents(version: Version) -> dict[str, bytes]:
    network = version.network
    weights = {name: value.float().cpu().numpy() for name, value in network.state_dict().items()}
    layers = {
        f"{kind}_{position}": array
        for position, layer in enumerate(version.projection.layers)
        for kind, array in (("weight", layer.weight), ("bias", layer.bias))
    }
    golden = {
        **_history_tensors(version.golden.histories),
        "type_probabilities": version.golden.type_probabilities,
        "queries": version.golden.queries,
    }
    files: dict[str, bytes] = {
        "weights.safetensors": save_tensors(weights),
        "projection.safetensors": save_tensors(layers),
        "golden.safetensors": save_tensors(golden),
    }
    if isinstance(network, BagNetwork) and network.trees:
        files["trees.txt"] = network.trees.encode()
    terms = version.projection.terms
    if terms is not None and terms.terms:
        files["terms.json"] = json.dumps(terms.terms, ensure_ascii=False).encode()
        files["terms.safetensors"] = save_tensors({"idf": terms.idf, "rows": terms.rows})
    if version.config.has_items:
        items: dict[str, NDArray[Any]] = {
            "warm": version.warm,
            "residuals": np.ascontiguousarray(version.residuals),
        }
        files["items.safetensors"] = save_tensors(items)
        files["items.json"] = json.dumps(version.item_ids, ensure_ascii=False).encode()
    for folder in PARTS:
        part = getattr(version, folder)
        if part is not None:
            files |= {f"{folder}/{name}": data for name, data in part.files().items()}
    return files | {name: _json(report) for name, report in version.reports.items()}


def _json(report: Any) -> bytes:
    return (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _history_tensors(batch: HistoryBatch) -> dict[str, NDArray[Any]]:
    return {
        "vectors": np.ascontiguousarray(batch.vectors, dtype=np.float32),
        "known": batch.known.astype(np.uint8),
        "types": batch.types,
        "gaps": batch.gaps,
        "hours": batch.hours,
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
    data = {name: read_checked(directory, name, digest) for name, digest in config.files.items()}
    projection = _projection(directory, config, data)
    item_ids, warm, residuals = _items(directory, config, data)
    network = _network(directory, config, data)
    golden = _golden(directory, config, data)
    reports = {
        name: parse(directory / name, data[name])
        for name in data.keys() & {"metrics.json", "lineage.json", "history.json"}
    }
    if not isinstance(reports["metrics.json"], dict):
        raise damaged(directory / "metrics.json", "not a JSON object")
    parts = {folder: _part(directory, folder, data, config) for folder in PARTS}
    ranker = parts["ranker"]
    if ranker is not None and ranker.items != len(item_ids):
        raise damaged(directory / "ranker", f"its tables are not of {len(item_ids)} items")
    for folder in ("type_model", "item_type_model"):
        part = parts[folder]
        if part is not None and len(part.table.counts) not in (0, len(item_ids)):
            raise damaged(directory / folder, f"its table is not of {len(item_ids)} items")
    return Version(
        config, network, projection, item_ids, warm, residuals, golden, **parts, reports=reports
    )


def _second_stage(files: Mapping[str, bytes]) -> SecondStage:
    if recommender.HEAD in files:
        return recommender.Recommender.load(files)
    return Ranker.load(files)


def _part(directory: Path, folder: str, data: Mapping[str, bytes], config: VersionConfig) -> Any:
    """A learned part from its folder; None where there is none."""
    prefix = f"{folder}/"
    files = {
        name.removeprefix(prefix): content
        for name, content in data.items()
        if name.startswith(prefix)
    }
    if not files:
        return None
    for name, content in files.items():
        if name.endswith(".safetensors"):
            read_tensors(directory / folder / name, content)
        elif name.endswith(".txt"):
            _check_trees(directory / folder / name, content)
    try:
        return PARTS[folder](files, config)
    except ODD as error:
        raise damaged(directory / folder, str(error) or repr(error)) from None


def _check_trees(file: Path, data: bytes) -> None:
    try:
        check_trees(data.decode("ascii"))
    except ValueError as error:
        raise damaged(file, str(error)) from None


def read_config(path: str | os.PathLike[str]) -> VersionConfig:
    """Reads config.json alone, without looking at the other files.

    Raises:
        InvalidArgumentError: it is missing, damaged, or of another format.
    """
    file = Path(path) / "config.json"
    if not file.exists():
        raise damaged(file, "is missing: this is no version directory")
    text = read_file(file)
    raw = parse(file, text)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise damaged(file, f"format {found!r}; this program reads format {FORMAT}")
    try:
        config = VersionConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(file, f"{where}: {first['msg']}") from None
    missing = _required(config) - config.files.keys()
    if missing:
        raise damaged(file, f"`files` lacks {', '.join(sorted(missing))}")
    types = len(set(config.behavior_types))
    if types != len(config.behavior_types):
        raise damaged(file, "a behavior type occurs twice")
    if not config.network.behavior_types == types == len(config.type_calibration.biases):
        raise damaged(file, f"network or type_calibration is not of {types} behavior_types")
    return config


def _required(config: VersionConfig) -> set[str]:
    names = {"weights.safetensors", "projection.safetensors", "golden.safetensors", "metrics.json"}
    return names | ({"items.safetensors", "items.json"} if config.has_items else set())


def _projection(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> Projection:
    file = directory / "projection.safetensors"
    tensors = read_tensors(file, data[file.name])
    layers = []
    cols: int | None = config.encoder.cols
    for position, activation in enumerate(config.activations):
        last = position == len(config.activations) - 1
        weight = take(file, tensors, f"weight_{position}", (config.dims if last else None, cols))
        cols = weight.shape[0]
        bias = take(file, tensors, f"bias_{position}", (cols,))
        layers.append(AffineLayer(weight, bias, Activation[activation.upper()]))
    return Projection(tuple(layers), terms=_terms(directory, config, data))


def _terms(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> TermRows | None:
    file = directory / "terms.safetensors"
    lacking = {"terms.json", file.name} - data.keys()
    if len(lacking) == 2:
        return None
    if lacking:
        raise damaged(directory / "config.json", f"`files` lacks {min(lacking)}")
    terms = read_strings(directory / "terms.json", data["terms.json"], "term")
    tensors = read_tensors(file, data[file.name])
    idf = take(file, tensors, "idf", (len(terms),))
    return TermRows(terms, idf, take(file, tensors, "rows", (len(terms), config.dims)))


def _items(
    directory: Path, config: VersionConfig, data: dict[str, bytes]
) -> tuple[tuple[str, ...], Ints, Vectors]:
    if not config.has_items:
        return (), np.zeros(0, np.int64), np.zeros((0, config.dims), np.float32)
    names = directory / "items.json"
    ids = read_strings(names, data[names.name], "id")
    file = directory / "items.safetensors"
    tensors = read_tensors(file, data[file.name])
    warm = take(file, tensors, "warm", (None,), np.int64)
    if (np.diff(warm, prepend=-1, append=len(ids)) <= 0).any():
        raise damaged(file, f"warm are not ascending positions of {len(ids)} items")
    return ids, warm, take(file, tensors, "residuals", (len(warm), config.dims))


def _network(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> Network:
    file = directory / "weights.safetensors"
    tensors = read_tensors(file, data[file.name])
    _check_size(directory / "config.json", config, tensors)
    try:
        network = make_network(config.network)
    except (ValueError, RuntimeError) as error:
        raise damaged(directory / "config.json", str(error)) from None
    expected = network.state_dict()
    unknown = tensors.keys() - expected.keys()
    if unknown:
        raise damaged(file, f"{min(unknown)} belongs to no such {config.network.model_type}")
    network.load_state_dict(
        {
            name: torch.from_numpy(take(file, tensors, name, tuple(value.shape)))
            for name, value in expected.items()
        }
    )
    if isinstance(network, BagNetwork) and "trees.txt" in data:
        _check_trees(directory / "trees.txt", data["trees.txt"])
        try:
            network.grow(data["trees.txt"].decode("ascii"))
        except ValueError as error:
            raise damaged(directory / "trees.txt", str(error)) from None
    return network.eval().requires_grad_(False)


def _check_size(file: Path, config: VersionConfig, tensors: dict[str, NDArray[Any]]) -> None:
    """Before memory is taken for the network: that its weights could be those in the file."""
    shape = config.network
    numbers = sum(values.size for values in tensors.values())
    sizes = {
        "dims": shape.dims, "hidden": shape.hidden, "layers": shape.layers,
        "heads": shape.heads, "positions": shape.positions, "towers": shape.towers,
    }  # fmt: skip
    for name, size in sizes.items():
        if name == "layers" and is_bag(shape):
            size += 1  # beside the hidden ones there is one
        if not 0 < size <= max(numbers, _SMALL):
            raise damaged(file, f"network.{name} is {size}: that is no size of these weights")
    # Each tower leads from its state, and its traces of the types, to all types.
    traces = len(HALF_LIVES) * shape.towers * shape.traces
    least = shape.behavior_types * (shape.hidden + traces * shape.behavior_types)
    most = shape.towers
    if is_bag(shape):
        least, most = _least_of_bag(shape), shape.layers
    elif shape.model_type in ENCODERS:
        # Two affine layers at least lead from the tokens through each layer of the encoder.
        through = shape.hidden * (shape.dims + shape.hidden * (2 * shape.layers - 1))
        least += through // shape.towers
        least += shape.positions * shape.hidden * (shape.model_type == "transformer")
        most = max(most, shape.layers)
    if most > len(tensors) or least > numbers:
        raise damaged(file, f"network: {numbers} weights are too few for its sizes")


def _least_of_bag(shape: NetworkConfig) -> int:
    """Weights of its affine layers."""
    if not shape.layers:
        return features_of(shape) * shape.behavior_types
    through = features_of(shape) + (shape.layers - 1) * shape.hidden + shape.behavior_types
    return through * shape.hidden


def _golden(directory: Path, config: VersionConfig, data: dict[str, bytes]) -> Golden:
    file = directory / "golden.safetensors"
    tensors = read_tensors(file, data[file.name])
    lengths: Ints = take(file, tensors, "lengths", (None,), np.int64)
    tokens, rows, types = int(lengths.sum()), len(lengths), len(config.behavior_types)
    histories = HistoryBatch(
        vectors=take(file, tensors, "vectors", (tokens, config.dims)),
        known=take(file, tensors, "known", (tokens,), np.uint8).astype(np.bool_),
        types=take(file, tensors, "types", (tokens,), np.int64),
        gaps=take(file, tensors, "gaps", (tokens,), np.int64),
        hours=take(file, tensors, "hours", (tokens,), np.int64),
        lengths=lengths,
    )
    for name, values, top in (
        ("lengths", histories.lengths, config.history_length),
        ("types", histories.types, types),
        ("gaps", histories.gaps, GAPS - 1),
        ("hours", histories.hours, HOURS - 1),
    ):
        if not ((values >= 0) & (values <= top)).all():
            raise damaged(file, f"{name} are not all integers from 0 to {top}")
    probabilities = take(file, tensors, "type_probabilities", (rows, types))
    return Golden(histories, probabilities, take(file, tensors, "queries", (rows, config.dims)))

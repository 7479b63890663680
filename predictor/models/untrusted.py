"""Files from strangers: bytes, JSON and tensors that may be wrong, and errors that name them."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from foretell.errors import InvalidArgumentError

ODD = (ValueError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError)
"""What code raises that is given JSON of another form than it reads."""

EMPTY_COLS = 1 << 16
"""Longest side of an array without numbers: its file is short however long it claims to be."""


MOST_BYTES = {".safetensors": 8 << 30, ".json": 512 << 20, ".txt": 256 << 20}
"""Largest file that is read, by its suffix: the vectors of tens of millions of items, the ids of
millions, trees. Parsed JSON takes several times its bytes."""

MOST_OTHER_BYTES = 64 << 20
"""Likewise of cards and plots."""


def read_file(file: Path) -> bytes:
    """A plain file of no unreasonable size, which is looked at before anything is read."""
    most = MOST_BYTES.get(file.suffix, MOST_OTHER_BYTES)
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
            raise damaged(file, "not a file")
        if found.st_size > most:
            raise damaged(file, f"{found.st_size:,} bytes; {most:,} at most are read")
        return file.read_bytes()
    except OSError as error:
        raise damaged(file, f"not readable ({error.strerror})") from None


def read_checked(directory: Path, name: str, digest: str) -> bytes:
    """A plain file of the directory whose sha256 is `digest`."""
    file = directory / name
    try:
        inside = file.resolve().is_relative_to(directory.resolve())
    except (OSError, ValueError):  # no name that a file can have
        inside = False
    if not inside:
        raise damaged(directory / "config.json", f"`files` names {name!r}, outside the directory")
    data = read_file(file)
    if hashlib.sha256(data).hexdigest() != digest:
        raise damaged(file, "its sha256 is not the one in config.json")
    return data


def read_tensors(file: Path, data: bytes) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file, all of their numbers finite."""
    try:
        tensors: dict[str, NDArray[Any]] = load_tensors(data)
    except (SafetensorError, *ODD) as error:  # LookupError: a type that numpy does not have
        raise damaged(file, f"not a safetensors file of plain numbers ({error})") from None
    for name, values in tensors.items():
        if not values.size and max(values.shape, default=0) > EMPTY_COLS:
            raise damaged(file, f"{name} has shape {values.shape}, but no numbers")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise damaged(file, f"{name} has numbers that are not finite")
    return tensors


def take(
    file: Path,
    tensors: dict[str, NDArray[Any]],
    name: str,
    shape: tuple[int | None, ...],
    dtype: type = np.float32,
) -> NDArray[Any]:
    """The tensor, which must have this shape and type; None stands for any size."""
    if name not in tensors:
        raise damaged(file, f"{name} is missing")
    found = tensors[name].shape
    fits = len(found) == len(shape) and all(
        want in (None, have) for have, want in zip(found, shape, strict=True)
    )
    if not fits:
        raise damaged(file, f"{name} has shape {found}, not {shape}")
    if tensors[name].dtype != dtype:
        raise damaged(file, f"{name} is {tensors[name].dtype}, not {np.dtype(dtype)}")
    return tensors[name]


def read_strings(file: Path, data: bytes, what: str) -> tuple[str, ...]:
    """A JSON list of different strings."""
    values = parse(file, data)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise damaged(file, f"not a list of {what}s")
    if len(set(values)) != len(values):
        raise damaged(file, f"{'an' if what[0] == 'i' else 'a'} {what} occurs twice")
    return tuple(values)


def parse(file: Path, data: bytes) -> Any:
    """JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"not JSON ({error})") from None


def damaged(file: Path, what: str) -> InvalidArgumentError:
    """The error that names the file and what is wrong; every function here raises it."""
    return InvalidArgumentError(
        f"{file}: {what}", reason="BAD_MODEL_DIRECTORY", metadata={"file": str(file)}
    )

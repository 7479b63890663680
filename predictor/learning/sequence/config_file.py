"""Settings of a fit in a TOML file: what `train --config` reads and `search` writes.

    model_type = "gru"
    learning_rate = 0.004

The fields are FitConfig's; one that is left out is derived from the data, see `recipe.resolve`. The
seed is not among them: it is the protocol's, which divides the data too.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from foretell.errors import InvalidArgumentError
from predictor.learning.classic.recipe import CLASSIC, FEATURES
from predictor.learning.sequence.recipe import FitConfig
from predictor.models.history import HISTORY_EVENTS
from predictor.models.sequence.encoders import model_types

LARGEST = 1_000_000
"""Of a count: a larger one is a slip of the keyboard, and would end in an error about memory."""

NAMES = tuple(field.name for field in fields(FitConfig) if field.name != "seed")
"""Of the fields that a file may have."""

_CHOICES: dict[str, Callable[[], Sequence[str]]] = {
    "model_type": lambda: (*model_types(), *CLASSIC),
    "features": lambda: FEATURES,
}
_FROM_ZERO = {"text_dims", "negatives"}
_SHARES = {"dropout", "input_dropout", "row_dropout", "term_dropout", "averaging"}
_POSITIVE = {"learning_rate", "clip"}


def read(path: Path) -> FitConfig:
    """The settings of a file.

    Raises:
        InvalidArgumentError: it cannot be read, is no TOML, or a field of it is unknown, of another
            type or out of range; `field` names it.
    """
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise _wrong(f"{path}: {error.strerror}", "config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(f"{path} is no TOML file: {error}", "config") from None
    for name, value in found.items():
        problem = _problem(name, value)
        if problem:
            raise _wrong(f"{path}: {name!r} {problem}", name)
    return FitConfig(**found)


def given(path: Path | None, **options: Any) -> tuple[FitConfig, dict[str, str | int]]:
    """The settings of a file, if there is one, and of options, which win where they are not None.

    Returns:
        the settings; and for the lineage, the name of the file and its sha256.

    Raises:
        InvalidArgumentError: see `read`.
    """
    config = FitConfig()
    lineage: dict[str, str | int] = {}
    if path is not None:
        config = read(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lineage = {"config": path.name, "config_sha256": digest}
    told = {name: value for name, value in options.items() if value is not None}
    return replace(config, **told), lineage


def text(config: FitConfig, comment: str) -> str:
    """The file of some settings: a comment, then a line for each field that is not None."""
    printable = ("".join(c if c.isprintable() else "?" for c in s) for s in comment.splitlines())
    lines = [f"# {line}".rstrip() for line in printable]
    given = asdict(config)
    # A string of JSON, a number of it and its booleans are TOML's as well.
    lines += [f"{name} = {json.dumps(given[name])}" for name in NAMES if given[name] is not None]
    return "\n".join(lines) + "\n"


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with a field; None: nothing."""
    if name == "seed":
        return "is not a setting of the file: give --seed, which divides the data too"
    if name not in NAMES:
        return f"is none of the settings {', '.join(NAMES)}"
    kind = get_args(get_type_hints(FitConfig)[name])[0]
    if kind is str:
        known = _CHOICES[name]()
        return None if value in known else f"must be one of {', '.join(known)}"
    if kind is bool:
        return None if isinstance(value, bool) else "must be true or false"
    if isinstance(value, bool):
        return "must be a number"
    if kind is int:
        low = 0 if name in _FROM_ZERO else 1
        high = HISTORY_EVENTS if name == "history_length" else LARGEST
        fits = isinstance(value, int) and low <= value <= high
        return None if fits else f"must be a whole number from {low} to {high:,}"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "must be a number"
    if name in _SHARES:
        return None if 0 <= value < 1 else "must be at least 0 and below 1"
    if name in _POSITIVE:
        return None if value > 0 else "must be above 0"
    return None if value >= 0 else "must not be negative"


def _wrong(message: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, reason="BAD_CONFIG", field=field)

"""A shop that nobody owns: items, histories and a trained model, to measure the services with.

Items have short titles; users walk among items near their own and come back to what they had, so
that a model has something to learn; how well it does is not the point. The model is made once and
kept under the benchmarks' cache.
"""

from __future__ import annotations

import csv
import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import foretell
from bench.harness import say
from predictor.models import model_dir
from serving.process import ServiceProcess

ITEMS = 12_101
"""As many as Amazon Beauty 5-core has."""

USERS = 1_000
EVENTS = 50
"""Of each user."""

DIMS = 64

PLAIN, RANKED = "plain", "ranked"
"""The versions: the sequence model alone, and with all that training has found useful."""

_ADJECTIVES = (
    *("organic", "cheap", "fine", "large", "small", "green"),
    *("red", "blue", "soft", "dry", "fresh", "classic"),
)
_NOUNS = (
    *("tea", "coffee", "bread", "cheese", "apple", "soap"),
    *("shampoo", "cream", "oil", "brush", "perfume", "mask", "lotion"),
)
_TYPES = ("view", "view", "view", "buy", "search")
_DAY_S = 86_400


def items() -> list[foretell.Item]:
    """The catalogue."""
    words = len(_ADJECTIVES), len(_NOUNS)
    return [
        foretell.Item(
            f"item-{at}",
            f"{_ADJECTIVES[at % words[0]]} {_NOUNS[at // words[0] % words[1]]} no {at // 156}",
        )
        for at in range(ITEMS)
    ]


def users() -> list[str]:
    """The customers."""
    return [f"user-{number}" for number in range(USERS)]


def events() -> Iterator[tuple[str, str, str, int]]:
    """(user, behavior type, item, Unix seconds) of all histories, user by user."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, ITEMS + 1) ** 0.8
    popularity /= popularity.sum()
    for user in users():
        home, time_s = rng.integers(ITEMS), 1_700_000_000 + int(rng.integers(30 * _DAY_S))
        near = (home + rng.integers(0, 200, EVENTS)) % ITEMS
        chosen = np.where(rng.random(EVENTS) < 0.6, near, rng.choice(ITEMS, EVENTS, p=popularity))
        for number in range(1, EVENTS):  # what they liked they take again
            if rng.random() < 0.4:
                chosen[number] = chosen[rng.integers(number)]
        for at in chosen.tolist():
            time_s += 1 + int(rng.exponential(2 * _DAY_S))
            yield user, _TYPES[rng.integers(len(_TYPES))], f"item-{at}", time_s


def versions(cache: Path) -> Path:
    """The folder with the version directories PLAIN and RANKED; trained where they are missing.

    Raises:
        RuntimeError: training found no ranker useful, so that there is nothing to compare.
    """
    folder = cache.expanduser() / "shop"
    if not (folder / PLAIN).exists():
        say(f"training a model in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder / "items.csv", ("item_id", "text"), ((i.id, i.text) for i in items()))
        columns = ("user_id", "behavior_type", "item_id", "timestamp")
        _write(folder / "events.csv", columns, events())
        _train(folder)
        version = model_dir.load(folder / RANKED)
        if version.ranker is None:
            raise RuntimeError("training has found no ranker useful")
        plain = dataclasses.replace(
            version,
            config=version.config.model_copy(update={"version": PLAIN, "files": {}}),
            ranker=None,
            type_model=None,
            item_type_model=None,
        )
        model_dir.write(folder / PLAIN, plain, "", {})
    return folder


def fill(embedder: ServiceProcess, predictor: ServiceProcess) -> None:
    """Sends items and histories."""
    with foretell.Client(embedder.address, predictor.address) as client:
        client.import_items(items())
        client.import_events(
            foretell.Event(user, kind, _datetime(time_s), item_id)
            for user, kind, item_id, time_s in events()
        )


def register(version: Path, data_dir: Path) -> None:
    """Brings a version to a predictor."""
    _run("predictor", "register", str(version), "--data-dir", str(data_dir))


def _datetime(time_s: int) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)


def _train(folder: Path) -> None:
    files = ["--items", str(folder / "items.csv"), "--events", str(folder / "events.csv")]
    recipe = ["--model", "transformer", "--dims", str(DIMS), "--epochs", "1"]
    _run("predictor", "train", *files, *recipe, "--out", str(folder / RANKED))


def _run(*command: str) -> None:
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)


def _write(file: Path, columns: Sequence[str], rows: Iterator[tuple[object, ...]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        writer.writerows(rows)

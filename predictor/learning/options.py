"""What several commands ask for: the data, how to divide it, and where text vectors come from."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from foretell import Client
from foretell.errors import InvalidArgumentError
from predictor.learning import sources
from predictor.learning.sources import Dataset
from predictor.learning.splits import SPLITS, Protocol
from predictor.settings import PredictorSettings

THREADS = 1
"""Of torch. The products of a step are small: a second thread made training a third faster on an
idle machine, and ten times slower on a busy one, where threads wait for one another."""


def add_data(command: argparse.ArgumentParser) -> None:
    """The options that say what data to use and how to divide it."""
    data = command.add_argument_group("data")
    data.add_argument("--events", type=Path, metavar="FILE", help="CSV or Parquet: user_id, "
                      "behavior_type, behavior_text or item_id, timestamp")  # fmt: skip
    data.add_argument("--items", type=Path, metavar="FILE", help="CSV or Parquet: item_id, text")
    data.add_argument("--store", type=Path, metavar="DIR", help="instead of files: a predictor's "
                      "data directory, and the items of --embedder")  # fmt: skip
    data.add_argument("--targets", type=Path, metavar="FILE", help="what users did next: user_id, "
                      "item_id or behavior_type; all events are then history")  # fmt: skip
    data.add_argument("--split", choices=SPLITS, help="default: time; leave-one-out for items "
                      "without timestamps, random without items")  # fmt: skip
    data.add_argument("--test-share", type=share, metavar="X",
                      help=f"default: {Protocol.test_share}")  # fmt: skip
    data.add_argument("--test-from", type=moment, metavar="TIME", help="the instant of a time or "
                      "every split (ISO 8601); default: by --test-share")  # fmt: skip
    data.add_argument("--validation-from", type=moment, metavar="TIME",
                      help="the same for the validation part")  # fmt: skip
    data.add_argument("--hold-out", type=share, metavar="X", help="share of the items that "
                      "training does not see, to measure cold ones (default: none)")  # fmt: skip
    data.add_argument("--clean", action="store_true", help="drop repeated events, impossible "
                      "times, bursts and bots; without it they are told, and kept")  # fmt: skip
    data.add_argument("--seed", type=int, metavar="N", help=f"default: {Protocol.seed}")
    texts = command.add_argument_group("text vectors")
    texts.add_argument("--embedder", metavar="HOST:PORT", help="default: one that is started for "
                       "this command; with --store the predictor's own")  # fmt: skip
    texts.add_argument("--encoder", metavar="NAME", help="of that one: a Hugging Face id or a "
                       "folder (default: the embedded MiniLM)")  # fmt: skip
    texts.add_argument("--pooling", choices=sources.POOLINGS, help="of that one: how token vectors "
                       "become one (default: what the encoder says, else mean)")  # fmt: skip
    texts.add_argument("--cache-dir", type=Path, default=sources.CACHE_DIR, metavar="DIR",
                       help="where that one keeps vectors (default: %(default)s)")  # fmt: skip
    command.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def share(text: str) -> float:
    """A number between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return number


def moment(text: str) -> int:
    """Microseconds since 1970 of a date or time in ISO 8601, in UTC where it names no zone."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be a date or time in ISO 8601") from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return round(found.timestamp() * 1_000_000)


def protocol_of(options: argparse.Namespace, usual: Protocol) -> Protocol:
    """What the options say, and the rest as usual."""
    given = {field.name: getattr(options, field.name) for field in fields(Protocol)}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


@contextlib.contextmanager
def dataset_of(options: argparse.Namespace) -> Iterator[Dataset]:
    """Reads what the options name, with vectors."""
    if bool(options.events) == bool(options.store):
        raise InvalidArgumentError("give either --events (and --items) or --store")
    if options.store and options.items:
        raise InvalidArgumentError("--items goes with --events; a store's items are --embedder's")
    if options.store and not options.embedder:
        options.embedder = PredictorSettings().embedder
    # Files first: a fault in them is told before a process is started.
    source = None
    if options.events:
        source = sources.read_files(options.events, options.items, options.targets, progress=True)
        source = source.inspected(clean=options.clean, progress=True)
    with sources.embedder(
        options.embedder, options.cache_dir, options.encoder, options.pooling
    ) as client:
        if source is None:
            source = _store(options, client).inspected(clean=options.clean, progress=True)
        dataset = sources.with_vectors(source, client, progress=True)
    torch.set_num_threads(THREADS)
    yield dataset


def _store(options: argparse.Namespace, client: Client) -> sources.Source:
    return sources.read_store(options.store, client, options.targets, progress=True)

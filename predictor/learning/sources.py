"""Where training gets its data from: files or the event store, and vectors from an embedder."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from foretell import Client
from foretell.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from foretell.importing import (
    EventColumns,
    EventReader,
    ItemReader,
    Reader,
    Summary,
    Target,
    TargetReader,
)
from foretell.types import Item
from foretell.vectors import Vectors
from predictor.database import FILE
from predictor.learning.data import Events, to_events
from predictor.learning.quality.inspection import Inspection, inspect
from predictor.learning.sentiment import SENTENCES, sentiment_axis
from predictor.models.history import NONE, Ints
from predictor.models.version import EncoderConfig
from serving.process import started

T = TypeVar("T")

CACHE_DIR = Path("~/.cache/foretell")
"""Where vectors of texts are kept between trainings when nobody says otherwise."""

CATEGORY = "category"
"""Attribute of items by which pictures are coloured."""

POOLINGS = ("mean", "cls", "last_token")
"""Of an embedder: the mean of the tokens' vectors, or that of the first or the last one."""

EMBED_TEXTS = 512
"""Texts in one call: a progress bar moves, and the answer stays far below the message limit."""

EMBED_TIMEOUT_S = 600.0
"""Deadline of such a call: 512 long texts on a slow CPU."""


@dataclass(frozen=True)
class Source:
    """Events, items and targets as they were read."""

    columns: EventColumns
    items: Sequence[Item] | None
    """The catalogue; None: the items are the ids that events name, without texts."""
    targets: Sequence[Target] | None
    lineage: dict[str, str | int]
    """Where it is from: names and sha256 of files, or the store's last event."""
    summaries: dict[str, Summary] = field(default_factory=dict)
    """What importing made of the rows, by kind and name of the file."""
    inspection: Inspection | None = None
    """What is odd about the events as they were read; None: nobody has looked."""

    def inspected(self, *, clean: bool = False, progress: bool = False) -> Source:
        """The same, looked through; with `clean`, without the events that cleaning drops.

        Raises:
            InvalidArgumentError: there are no events, or cleaning would leave none.
        """
        self.events()
        found, columns = inspect(self.columns, self.items, self.summaries), self.columns
        lineage = dict(self.lineage)
        if clean:
            found, columns = found.cleaned()
            lineage["events_dropped"] = len(self.columns) - len(columns)
        if progress:
            sys.stderr.write(f"{found}\n")
        return replace(self, columns=columns, lineage=lineage, inspection=found)

    def events(self) -> Events:
        """The events, sorted and encoded.

        Raises:
            InvalidArgumentError: there are none.
        """
        ids = None if self.items is None else [item.id for item in self.items]
        return to_events(self.columns, ids)


@dataclass(frozen=True)
class Dataset:
    """Events with the vectors of what they name."""

    events: Events
    item_vectors: Vectors
    """(items, encoder.cols) of the items' texts; zero where an item has none."""
    text_vectors: Vectors
    """(texts, encoder.cols); zero where no event without an item has the text."""
    encoder: EncoderConfig
    targets: Sequence[Target] | None
    lineage: dict[str, str | int]
    item_texts: Sequence[str]
    """(items,); "" where an item has none."""
    sentiment: Vectors
    """(encoder.cols,) direction of praise, see `sentiment`."""
    categories: Sequence[str] | None = None
    """(items,) the attribute CATEGORY; None where no item has it."""
    inspection: Inspection | None = None
    """See Source."""

    def own_texts(self, events: Events) -> tuple[Ints, list[str]]:
        """The text of each event, its item's or else its own: (events,) its number, or NONE; and
        the texts by number, of the items and then of the events.

        Args:
            events: some of the data set's.
        """
        items = len(events.item_ids)
        number = np.where(events.item >= 0, events.item, items + events.text)
        number[(events.item < 0) & (events.text < 0)] = NONE
        return number, [*(self.item_texts or [""] * items), *events.texts]

    def in_order(self, item_ids: Sequence[str]) -> Dataset:
        """The same with the items of `item_ids` first, in that order, as far as there are any.

        What a version measures goes by the places of its items.
        """
        place = {item_id: number for number, item_id in enumerate(item_ids)}
        ids = self.events.item_ids
        last = len(place)
        by = np.argsort([place.get(item_id, last) for item_id in ids], kind="stable")
        items = by.tolist()
        categories = self.categories
        return replace(
            self,
            events=self.events.with_items([ids[at] for at in items]),
            item_vectors=self.item_vectors[by],
            item_texts=[self.item_texts[at] for at in items],
            categories=None if categories is None else [categories[at] for at in items],
        )


def read_files(
    events: Path, items: Path | None, targets: Path | None = None, *, progress: bool = False
) -> Source:
    """Reads CSV or Parquet files; what is refused or mended goes to the standard error.

    Raises:
        InvalidArgumentError: a file or column is missing, or nothing in a file can be used.
    """
    lineage: dict[str, str | int] = {}
    reader = EventReader(events, with_attributes=False)
    columns = reader.read_columns()
    _report(reader, progress)
    _require(len(columns), reader)
    lineage |= {"events": events.name, "events_sha256": _sha256(events)}
    summaries = {f"events {events.name}": reader.summary}
    catalogue = wanted = None
    if items is not None:
        item_reader = ItemReader(items)
        catalogue = _read_all(item_reader, progress)
        summaries[f"items {items.name}"] = item_reader.summary
        lineage |= {"items": items.name, "items_sha256": _sha256(items)}
    if targets is not None:
        wanted = _read_all(TargetReader(targets), progress)
        lineage |= {"targets": targets.name, "targets_sha256": _sha256(targets)}
    return Source(columns, catalogue, wanted, lineage, summaries)


def _read_all(reader: Reader[T], progress: bool) -> list[T]:
    rows = list(reader)
    _report(reader, progress)
    _require(len(rows), reader)
    return rows


def _require(kept: int, reader: Reader[T]) -> None:
    if not kept:
        why = ", ".join(reason for reason, _ in reader.summary.refused.most_common(3))
        raise InvalidArgumentError(
            f"{reader.path}: no usable rows" + (f" ({why})" if why else ""),
            reason="NO_ROWS",
            field=str(reader.path),
        )


def _report(reader: Reader[T], progress: bool) -> None:
    if progress:
        sys.stderr.write(f"{reader.path}: {reader.summary}\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_store(
    data_dir: Path, client: Client, targets: Path | None = None, *, progress: bool = False
) -> Source:
    """Reads a predictor's events (the service may run) and its embedder's items.

    Raises:
        InvalidArgumentError: there is no event store, or nothing in it.
    """
    columns, last = _read_events(data_dir / FILE)
    items: list[Item] = []
    token = ""
    while True:
        page = client.list_items(page_size=1_000, page_token=token)
        items += page.elements
        token = page.next_page_token
        if not token:
            break
    wanted = None if targets is None else _read_all(TargetReader(targets), progress)
    lineage: dict[str, str | int] = {"store_events": len(columns), "store_last_event": last}
    return Source(columns, items, wanted, lineage)


_STORED = """
SELECT users.user_id, types.name, time, coalesce(item_id, ''), coalesce(texts.text, ''), event
FROM events JOIN users USING (user) JOIN types USING (type)
LEFT JOIN texts ON texts.number = events.text
ORDER BY event
"""


def _read_events(path: Path) -> tuple[EventColumns, int]:
    """All events of the store in the order of their arrival, and the last one's number."""
    if not path.is_file():
        raise InvalidArgumentError(
            f"{path} does not exist: --store takes a predictor's data directory",
            reason="NO_STORE",
            field="store",
        )
    codes: tuple[dict[str, int], ...] = ({}, {}, {"": -1}, {"": -1})
    users, kinds, items, texts = codes
    rows: list[tuple[int, int, int, int, int]] = []
    last = 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        for user, kind, time, item, text, event in connection.execute(_STORED):
            last = event
            rows.append(
                (
                    users.setdefault(user, len(users)),
                    kinds.setdefault(kind, len(kinds)),
                    items.setdefault(item, len(items) - 1),
                    texts.setdefault(text, len(texts) - 1),
                    time,
                )
            )
    if not rows:
        raise InvalidArgumentError(f"{path} holds no events", reason="NO_EVENTS", field="store")
    columns = np.array(rows, np.int64).T
    return EventColumns(
        list(users), list(kinds), list(items)[1:], list(texts)[1:],
        columns[0], columns[1], columns[2], columns[3], columns[4],
    ), last  # fmt: skip


@contextlib.contextmanager
def embedder(
    address: str | None, cache_dir: Path, encoder: str | None, pooling: str | None = None
) -> Iterator[Client]:
    """A client of the embedder at `address`; without one, of an embedder started for the block.

    The one that is started only encodes, and keeps vectors under `cache_dir`.

    Raises:
        FailedPreconditionError: it cannot be started.
        InvalidArgumentError: an encoder or pooling is given for an embedder that runs already.
    """
    asked = {"encoder": encoder, "pooling": pooling}
    if address:
        for field, value in asked.items():
            if value:
                raise InvalidArgumentError(
                    f"--{field} goes with an embedder that training starts itself, "
                    "not with --embedder",
                    field=field,
                )
        with Client(address) as client:
            yield client
        return
    cache = cache_dir.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    arguments = ["--port", "0", "--cache-dir", str(cache)]
    for field, value in asked.items():
        arguments += [f"--{field}", value] if value else []
    with contextlib.ExitStack() as stack:
        try:
            service = stack.enter_context(
                started("embedder", arguments, log=cache / "embedder.log")
            )
        except RuntimeError as error:
            raise FailedPreconditionError(str(error), reason="NO_EMBEDDER") from None
        yield stack.enter_context(Client(service.address))


def with_vectors(source: Source, client: Client, *, progress: bool = False) -> Dataset:
    """Encodes the texts of the items, and those of the events that have no item."""
    events = source.events()
    info = client.embedder_info()
    encoder = EncoderConfig(name=info.encoder, pooling=info.pooling, cols=info.cols)
    item_texts = [item.text for item in source.items or ()] or [""] * len(events.item_ids)
    needed = np.zeros(len(events.texts), np.bool_)
    needed[events.text[(events.item < 0) & (events.text >= 0)]] = True
    texts = [text if use else "" for text, use in zip(events.texts, needed, strict=True)]
    read = [*item_texts, *texts, *SENTENCES]
    vectors = encode(read, info.cols, client, progress=progress)
    items, of_events, sentences = np.split(vectors, np.cumsum([len(item_texts), len(texts)]))
    return Dataset(
        events,
        items,
        of_events,
        encoder,
        source.targets,
        source.lineage,
        item_texts,
        sentiment_axis(sentences),
        _categories(source.items or ()),
        source.inspection,
    )


def _categories(items: Sequence[Item]) -> list[str] | None:
    categories = [item.attributes.get(CATEGORY, "") for item in items]
    return categories if any(categories) else None


def encode(texts: Sequence[str], cols: int, client: Client, *, progress: bool = False) -> Vectors:
    """Vectors (texts, cols) in the encoder's space; zero for empty texts. Equal texts count once.

    Raises:
        ForetellError: the embedder refuses a text, or does not answer.
    """
    # Texts of like length share a batch, and the longest come first: the bar's rate only rises.
    distinct = sorted({text for text in texts if text}, key=len, reverse=True)
    position = {text: row for row, text in enumerate(distinct)}
    found = np.zeros((len(distinct) + 1, cols), np.float32)  # the last row is for empty texts
    with tqdm(total=len(distinct), desc="encode", unit="texts", disable=not progress) as bar:
        for begin in range(0, len(distinct), EMBED_TEXTS):
            batch = distinct[begin : begin + EMBED_TEXTS]
            found[begin : begin + len(batch)] = _embed(batch, client)
            bar.update(len(batch))
    rows = np.array([position.get(text, len(distinct)) for text in texts], np.int64)
    return found[rows] if len(rows) else np.zeros((0, cols), np.float32)


def _embed(texts: Sequence[str], client: Client) -> Vectors:
    """One call; waits while the embedder has too much to do for others."""
    deadline = time.monotonic() + EMBED_TIMEOUT_S
    while True:
        try:
            result = client.embed(texts, timeout_s=max(1.0, deadline - time.monotonic()))
        except ResourceExhaustedError as error:
            pause = error.retry_after_s or 1.0
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
            continue
        if result.failures:
            raise result.failures[0].error
        return result.vectors

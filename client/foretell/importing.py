"""Reads files of events, items and targets, row by row, and cleans them.

CSV (UTF-8, comma, a header line) and Parquet (with the extra `parquet`), told apart by the
extension. Columns:

- events: `user_id`, `behavior_type`, and `behavior_text` or `item_id` or both; optional
  `timestamp`, `event_id`; every further column becomes an attribute.
- items: `item_id`, `text`; every further column becomes an attribute.
- targets: `user_id`, and `item_id` or `behavior_type` or both; further columns are passed over.

What is mended and what is refused:

- Texts lose HTML, entities and control characters, get one space between words and Unicode NFC;
  behavior types and attributes likewise, but for HTML. Ids lose white space around them and are
  left alone otherwise, for they are keys.
- An over-long text or attribute is cut, since nothing reads its end; an over-long id or type is
  refused, since its beginning would be another's.
- `timestamp` is ISO 8601 (UTC where it names no zone) or Unix seconds, milliseconds or
  microseconds by magnitude. A row whose timestamp is empty, unreadable, before 1970 or more than
  a day ahead is refused. In a file without the column, the order of the rows is the time.
- Events with the same `event_id` are one: the first stands. Of items with the same `item_id` the
  last stands. Events that are equal and have no event_id all stand, because a basket may hold
  two of one thing.
- An event needs a text or an item_id; an item's text may be empty, which is counted.
- A row with an invalid byte, or with more or fewer cells than the header, is refused; the
  others are read.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import ClassVar, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from foretell import _cells, limits
from foretell._cells import Absent, CellCache, Cells, Cleaned, TimeCache, Uncached
from foretell._tables import REJECT_COLUMNS, Rejects, Table, Unreadable, bad_file, open_table
from foretell.errors import InvalidArgumentError
from foretell.types import Event, Item

T = TypeVar("T")
R = TypeVar("R")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NO_ATTRIBUTES: Final[Mapping[str, str]] = {}


@dataclass(frozen=True, slots=True)
class Target:
    """What a user did next, for an evaluation: an item, a behavior type, or both."""

    user_id: str
    item_id: str = ""
    behavior_type: str = ""


@dataclass(slots=True)
class Summary:
    """What became of the rows: `rows == kept + sum(refused.values())`."""

    rows: int = 0
    """Rows read; the header and empty lines are none."""
    kept: int = 0
    """Rows that stand, mended ones among them."""
    mended_rows: int = 0
    """Rows that stand and in which something was mended."""
    mended: Counter[str] = field(default_factory=Counter)
    """What was mended, in how many rows; a row may count for several."""
    refused: Counter[str] = field(default_factory=Counter)
    """Why rows were refused: one reason a row."""
    noted: Counter[str] = field(default_factory=Counter)
    """What is unusual about rows that stand."""

    def __str__(self) -> str:
        """For people, a line per reason."""
        lines = [
            f"{self.rows:,} rows read, {self.kept:,} kept ({self.mended_rows:,} of them mended), "
            f"{self.refused.total():,} refused"
        ]
        for title, counts in (
            ("mended", self.mended),
            ("refused", self.refused),
            ("noted", self.noted),
        ):
            lines += [f"  {title}: {reason}: {n:,}" for reason, n in counts.most_common()]
        return "\n".join(lines)


class Reader(Generic[T]):
    """An iterable over the clean rows of a file; each iteration reads it from the start.

    Making one reads the header alone.

    Args:
        path: the file.
        rejects: where to write the refused rows as CSV: `rejected_row` (from 1, the header not
            counted), `rejected_reason`, then the original columns. It is itself importable.
        with_attributes: whether further columns are read at all.

    Raises:
        InvalidArgumentError: the file is missing or unreadable, a column is missing or double,
            more further columns than an event or item may have attributes.
        FailedPreconditionError: a Parquet file, and pyarrow is not installed.
    """

    required: ClassVar[tuple[str, ...]]
    """Columns that there must be."""
    one_of: ClassVar[tuple[str, ...]] = ()
    """Columns of which there must be at least one."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that may be there."""

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        rejects: str | PathLike[str] | None = None,
        with_attributes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.summary = Summary()
        """Of the latest iteration; grows while it runs."""
        self._rejects_path = None if rejects is None else Path(rejects)
        if self._rejects_path is not None and self._rejects_path.resolve() == self.path.resolve():
            raise bad_file(self.path, "the refused rows would overwrite it")
        self._rejects: Rejects | None = None
        self._table: Table = open_table(self.path)
        self.columns = self._table.columns
        """Of the file, in its order."""
        self._check_columns()
        self._attributes = self._attribute_names() if with_attributes else []

    def __iter__(self) -> Iterator[T]:
        return self._reading(self._parsed())

    def _reading(self, parsed: Iterator[R]) -> Iterator[R]:
        """Starts the summary and the file of refused rows, and ends it."""
        self.summary = Summary()
        if self._rejects_path is not None:
            self._rejects = Rejects(self._rejects_path, self.columns)
        try:
            yield from parsed
        finally:
            if self._rejects is not None:
                self._rejects.close()
                self._rejects = None

    def fraction(self) -> float:
        """How much of the file is read, 0 to 1: for progress bars."""
        return self._table.fraction()

    def _parsed(self) -> Iterator[T]:
        raise NotImplementedError

    def _rows(self) -> Iterator[Sequence[str]]:
        """Rows with a cell for every column; the others are refused."""
        width, summary = len(self.columns), self.summary
        for row in self._table.rows():
            summary.rows += 1
            if len(row) == width:
                yield row
            elif isinstance(row, Unreadable):
                self._refuse(row.reason, row)
            else:
                more = "more" if len(row) > width else "fewer"
                self._refuse(f"{more} cells than columns", row)

    def _refuse(self, reason: str, row: Sequence[str], row_number: int | None = None) -> None:
        self.summary.refused[reason] += 1
        if self._rejects is not None:
            self._rejects.write(row_number or self.summary.rows, reason, row)

    def _keep(self, flags: int) -> None:
        summary = self.summary
        summary.kept += 1
        if flags:
            summary.mended_rows += 1
            for bit, name in enumerate(_cells.MENDS):
                if flags >> bit & 1:
                    summary.mended[name] += 1

    def _clean(
        self, columns: Sequence[tuple[str, Callable[[str], Cleaned]]]
    ) -> Iterator[tuple[Sequence[str], list[str], Mapping[str, str], int]]:
        """Rows without a fault in a cell.

        Each comes as it was, as the clean values of `columns` (empty where the file lacks one),
        as attributes, and with the flags of what was mended.
        """
        plan = [self._cells(name, clean) for name, clean in columns]
        plan += [self._cells(name, _cells.clean_attribute) for name in self._attributes]
        attributes = _NO_ATTRIBUTES
        for row in self._rows():
            values, all_flags = [], 0
            for position, cells in plan:
                value, flags = cells[row[position]]
                values.append(value)
                all_flags |= flags
            if all_flags & _cells.FAULT:
                faults = (cells[row[position]] for position, cells in plan)
                self._refuse(next(why for why, flags in faults if flags & _cells.FAULT), row)
                continue
            if self._attributes:
                named = zip(self._attributes, values[len(columns) :], strict=True)
                attributes = {name: value for name, value in named if value}
            yield row, values, attributes, all_flags

    def _cells(self, name: str, clean: Callable[[str], Cleaned]) -> tuple[int, Cells]:
        if name not in self.columns:
            return 0, Absent()
        # No two event ids are alike: a cache would only fill.
        return self.columns.index(name), (Uncached if name == "event_id" else CellCache)(clean)

    def _check_columns(self) -> None:
        counts = Counter(self.columns)
        double = [name or "without a name" for name, n in counts.items() if n > 1]
        if double:
            raise bad_file(self.path, f"has more than one column {', '.join(double)}")
        missing = [name for name in self.required if name not in counts]
        if self.one_of and not counts.keys() & set(self.one_of):
            missing.append(" or ".join(self.one_of))
        if missing:
            found = ", ".join(self.columns)
            hint = ""
            if len(self.columns) == 1 and any(mark in found for mark in ";\t|"):
                hint = "; the columns must be separated by commas"
            raise InvalidArgumentError(
                f"{self.path}: the columns {', '.join(missing)} are missing; found: {found}{hint}",
                reason="MISSING_COLUMNS",
                field=str(self.path),
                metadata={"missing": ",".join(missing), "found": ",".join(self.columns)},
            )

    def _attribute_names(self) -> list[str]:
        own = {*self.required, *self.one_of, *self.optional, *REJECT_COLUMNS}
        names = [name for name in self.columns if name not in own]
        if len(names) > limits.ATTRIBUTES:
            raise bad_file(
                self.path,
                f"has {len(names)} columns that would become attributes; "
                f"at most {limits.ATTRIBUTES} may be",
            )
        for name in names:
            value, flags = _cells.clean_attribute(name)
            if not value or flags or len(value) > limits.ATTRIBUTE_KEY_CHARS:
                raise bad_file(
                    self.path,
                    f"the column name {name!r} is no attribute's name: 1 to "
                    f"{limits.ATTRIBUTE_KEY_CHARS} printable characters",
                )
        return names


EventRow = tuple[str, str, int | None, str, str, str, Mapping[str, str]]
"""user_id, behavior_type, microseconds since 1970 (None: the file has no timestamps), item_id,
text, event_id, attributes."""


class EventReader(Reader[Event]):
    """Reads events; see the module for columns and cleaning, and Reader for the other arguments.

    Args:
        start: time of the first row of a file without timestamps; each further row is a
            microsecond later, so that the order of the rows stays the order of time and no two
            rows make a basket. None: such events have no timestamp.
    """

    required = ("user_id", "behavior_type")
    one_of = ("behavior_text", "item_id")
    optional = ("timestamp", "event_id")

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        rejects: str | PathLike[str] | None = None,
        with_attributes: bool = True,
        start: datetime | None = None,
    ) -> None:
        super().__init__(path, rejects=rejects, with_attributes=with_attributes)
        self._start = start

    @property
    def has_timestamps(self) -> bool:
        """Whether the file has the column; otherwise the order of the rows is the time."""
        return "timestamp" in self.columns

    def _parsed(self) -> Iterator[Event]:
        start = self._start
        for user, kind, microseconds, item, text, event_id, attributes in self._tuples():
            timestamp = None
            if microseconds is not None:
                timestamp = _EPOCH + timedelta(microseconds=microseconds)
            elif start is not None:
                timestamp = start + timedelta(microseconds=self.summary.rows - 1)
            yield Event(user, kind, timestamp, item, text, event_id, attributes)

    def read_columns(self) -> EventColumns:
        """The whole file as arrays: a third of the time and memory of events, for training."""
        builder = _ColumnsBuilder(self.has_timestamps)
        for row in self._reading(self._tuples()):
            builder.add(row)
        return builder.build()

    def _tuples(self) -> Iterator[EventRow]:
        columns = (
            ("user_id", _cells.clean_id("user_id", required=True)),
            ("behavior_type", _cells.clean_type()),
            ("item_id", _cells.clean_id("item_id")),
            ("behavior_text", _cells.clean_cell_text),
            ("event_id", _cells.clean_id("event_id")),
        )
        latest = datetime.now(UTC) + timedelta(seconds=limits.FUTURE_SECONDS)
        times = TimeCache((latest - _EPOCH) // timedelta(microseconds=1))
        at_time = self.columns.index("timestamp") if self.has_timestamps else -1
        event_ids: set[str] = set()
        for row, (user, kind, item, text, event_id, *_), attributes, flags in self._clean(columns):
            microseconds = None
            if at_time >= 0:
                time = times[row[at_time]]
                if isinstance(time, str):
                    self._refuse(time, row)
                    continue
                microseconds = time
            if not item and not text:
                self._refuse("neither item_id nor behavior_text", row)
                continue
            if event_id:
                if event_id in event_ids:
                    self._refuse("an earlier row has the same event_id", row)
                    continue
                event_ids.add(event_id)
            self._keep(flags)
            yield user, kind, microseconds, item, text, event_id, attributes


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """Events as arrays of shape (events,) in the order of the file.

    Strings are numbers: the position in the list of the distinct ones, in order of appearance.
    """

    user_ids: list[str]
    behavior_types: list[str]
    item_ids: list[str]
    texts: list[str]
    user: NDArray[np.int64]
    """Position in user_ids."""
    behavior_type: NDArray[np.int64]
    """Position in behavior_types."""
    item: NDArray[np.int64]
    """Position in item_ids; -1: none."""
    text: NDArray[np.int64]
    """Position in texts; -1: none."""
    timestamp: NDArray[np.int64] | None
    """Microseconds since 1970; None: the order is the time."""

    def __len__(self) -> int:
        return len(self.user)


class _ColumnsBuilder:
    def __init__(self, has_timestamps: bool) -> None:
        self._codes: tuple[dict[str, int], ...] = ({}, {}, {"": -1}, {"": -1})
        self._columns = [array("q") for _ in self._codes]
        self._timestamps = array("q") if has_timestamps else None

    def add(self, row: EventRow) -> None:
        users, kinds, items, texts = self._codes
        user, kind, item, text = self._columns
        user.append(users.setdefault(row[0], len(users)))
        kind.append(kinds.setdefault(row[1], len(kinds)))
        # One less, for the empty string is in the dictionary.
        item.append(items.setdefault(row[3], len(items) - 1))
        text.append(texts.setdefault(row[4], len(texts) - 1))
        if self._timestamps is not None and row[2] is not None:
            self._timestamps.append(row[2])

    def build(self) -> EventColumns:
        users, kinds, items, texts = (list(codes) for codes in self._codes)
        user, kind, item, text = (np.array(column, dtype=np.int64) for column in self._columns)
        times = None if self._timestamps is None else np.array(self._timestamps, dtype=np.int64)
        return EventColumns(users, kinds, items[1:], texts[1:], user, kind, item, text, times)


class ItemReader(Reader[Item]):
    """Reads items; see the module for columns and cleaning, and Reader for arguments.

    It holds all items until the file is read, because a later row may replace an earlier one.
    """

    required = ("item_id", "text")
    _held = 0

    def fraction(self) -> float:
        """How many of the items have been given out, 0 to 1."""
        return self.summary.kept / self._held if self._held else 0.0

    def _parsed(self) -> Iterator[Item]:
        columns = (
            ("item_id", _cells.clean_id("item_id", required=True)),
            ("text", _cells.clean_cell_text),
        )
        items: dict[str, tuple[Item, int]] = {}
        originals: dict[str, tuple[int, Sequence[str]]] = {}  # only if there is a rejects file
        for row, (item_id, text, *_), attributes, flags in self._clean(columns):
            if items.pop(item_id, None) is not None:  # the later row also takes its own place
                number, original = originals.get(item_id, (self.summary.rows, ()))
                self._refuse("a later row has the same item_id", original, number)
            items[item_id] = Item(item_id, text, attributes), flags
            if self._rejects is not None:
                originals[item_id] = self.summary.rows, row
        self._held = len(items)
        for item, flags in items.values():
            self._keep(flags)
            if not item.text:
                self.summary.noted["item without text"] += 1
            yield item


class TargetReader(Reader[Target]):
    """Reads targets; see the module for columns and cleaning, and Reader for arguments."""

    required = ("user_id",)
    one_of = ("item_id", "behavior_type")

    def __init__(
        self, path: str | PathLike[str], *, rejects: str | PathLike[str] | None = None
    ) -> None:
        super().__init__(path, rejects=rejects, with_attributes=False)

    def _parsed(self) -> Iterator[Target]:
        columns = (
            ("user_id", _cells.clean_id("user_id", required=True)),
            ("item_id", _cells.clean_id("item_id")),
            ("behavior_type", _cells.clean_type(required=False)),
        )
        for row, (user, item, kind), _, flags in self._clean(columns):
            if item or kind:
                self._keep(flags)
                yield Target(user, item, kind)
            else:
                self._refuse("neither item_id nor behavior_type", row)

"""Cleans the cells of imported rows: what is kept, what is mended, what cannot stand.

Behavior repeats itself, and so do its cells: each distinct short cell is cleaned once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from foretell import limits
from foretell.texts import clean_text, plain_text

MENDS: Final = (
    "white space",
    "Unicode normal form",
    "control characters",
    "HTML",
    f"text cut to {limits.TEXT_CHARS:,} characters",
    f"attribute cut to {limits.ATTRIBUTE_VALUE_CHARS:,} characters",
)
"""What may be mended in a cell, in the order of the bits of its flags."""

SPACE, UNICODE, CONTROL, HTML, TEXT_CUT, ATTRIBUTE_CUT = (1 << i for i in range(len(MENDS)))

FAULT: Final = 1 << 30
"""Flag of a cell that cannot stand; in place of its value is the reason."""

INVALID_UTF8: Final = "invalid UTF-8"

Cleaned = tuple[str, int]
"""The cell's value (with FAULT: the reason) and the flags of what was mended."""

EPOCH: Final = datetime(1970, 1, 1)
_MICROSECOND: Final = timedelta(microseconds=1)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBER: Final = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_DATE_DIGITS: Final = 8  # YYYYMMDD

_UNITS: Final = ((1e11, 1_000_000), (1e14, 1_000), (1e17, 1))
"""Below this number, a number counts units of so many microseconds: seconds until the year 5138,
then milliseconds and microseconds, each from 1973 on."""

_CACHE_CELLS = 200_000
_CACHE_CHARS = 256
"""Together they bound a column's cache to some 200 MB at worst."""


class CellCache(dict[str, Cleaned]):
    """Cleaned cells by what they were: `cache[cell]` cleans where it must."""

    def __init__(self, clean: Callable[[str], Cleaned]) -> None:
        super().__init__()
        self._clean = clean

    def __missing__(self, cell: str) -> Cleaned:
        cleaned = self._clean(cell)
        if len(cell) <= _CACHE_CHARS:
            if len(self) >= _CACHE_CELLS:
                self.clear()
            self[cell] = cleaned
        return cleaned


class Uncached:
    """Cleans each cell anew: for columns in which no two are alike."""

    def __init__(self, clean: Callable[[str], Cleaned]) -> None:
        self._clean = clean

    def __getitem__(self, cell: str) -> Cleaned:
        return self._clean(cell)


class Absent:
    """Stands for a column that the file does not have."""

    def __getitem__(self, cell: str) -> Cleaned:
        return "", 0


Cells = CellCache | Uncached | Absent
"""Gives the clean cell of a column."""


class TimeCache(dict[str, int | str]):
    """Timestamps in microseconds since 1970 by their cells; a str is why one cannot stand."""

    def __init__(self, latest_us: int) -> None:
        super().__init__()
        self._latest_us = latest_us

    def __missing__(self, cell: str) -> int | str:
        if len(self) >= _CACHE_CELLS:
            self.clear()
        self[cell] = result = clean_timestamp(cell, self._latest_us)
        return result


def clean_id(column: str, *, required: bool = False) -> Callable[[str], Cleaned]:
    """Cleans ids: white space around one goes; nothing else may change, for it is a key."""

    def clean(cell: str) -> Cleaned:
        value = cell.strip()
        if required and not value:
            return f"{column} is empty", FAULT
        if len(value) > limits.ID_CHARS:
            return f"{column} has more than {limits.ID_CHARS} characters", FAULT
        if value.isascii() and value.isprintable():
            return value, 0 if len(value) == len(cell) else SPACE
        if _broken(cell):
            return INVALID_UTF8, FAULT
        if _CONTROL.search(value):
            return f"{column} has control characters", FAULT
        return value, 0 if len(value) == len(cell) else SPACE

    return clean


def clean_type(*, required: bool = True) -> Callable[[str], Cleaned]:
    """Cleans behavior types and counts them against their limit."""
    known: set[str] = set()

    def clean(cell: str) -> Cleaned:
        if _broken(cell):
            return INVALID_UTF8, FAULT
        value = plain_text(cell)
        if not value and required:
            return "behavior_type is empty", FAULT
        if len(value) > limits.TYPE_CHARS:
            return f"behavior_type has more than {limits.TYPE_CHARS} characters", FAULT
        if len(known) >= limits.BEHAVIOR_TYPES and value not in known:
            return f"more than {limits.BEHAVIOR_TYPES:,} behavior types", FAULT
        known.add(value)
        return value, _mended(cell, value)

    return clean


def clean_cell_text(cell: str) -> Cleaned:
    """Cleans a text: HTML, control characters, white space, Unicode; what is over-long is cut.

    An encoder reads some hundred tokens of it, so that a cut loses nothing it would see.
    """
    if _is_clean(cell) and "<" not in cell and "&" not in cell:
        value, flags = cell, 0
    elif _broken(cell):
        return INVALID_UTF8, FAULT
    else:
        value = clean_text(cell)
        plain = plain_text(cell)
        flags = _mended(cell, plain) | (0 if plain == value else HTML)
    if len(value) > limits.TEXT_CHARS:
        return value[: limits.TEXT_CHARS].rstrip(), flags | TEXT_CUT
    return value, flags


def clean_attribute(cell: str) -> Cleaned:
    """Cleans an attribute as a text, but for HTML: it may be an address with '&' in it."""
    if _is_clean(cell):
        value, flags = cell, 0
    elif _broken(cell):
        return INVALID_UTF8, FAULT
    else:
        value = plain_text(cell)
        flags = _mended(cell, value)
    if len(value) > limits.ATTRIBUTE_VALUE_CHARS:
        return value[: limits.ATTRIBUTE_VALUE_CHARS].rstrip(), flags | ATTRIBUTE_CUT
    return value, flags


def clean_timestamp(cell: str, latest_us: int) -> int | str:
    """Microseconds since 1970, or why the cell has none that may stand.

    ISO 8601 (without a zone it is UTC) or Unix seconds, milliseconds or microseconds, told apart
    by magnitude. Eight digits that are a date are one.
    """
    cell = cell.strip()
    if not cell:
        return "timestamp is empty"
    microseconds = _iso(cell) if "-" in cell[1:] or len(cell) == _DATE_DIGITS else None
    if microseconds is None and _NUMBER.fullmatch(cell):
        number = float(cell)
        unit = next((unit for below, unit in _UNITS if abs(number) < below), None)
        if unit is None:
            return "timestamp is in the future" if number > 0 else "timestamp is before 1970"
        # An integer stays exact; the fraction of a float is as good as the float.
        microseconds = int(cell) * unit if cell.isdecimal() else round(number * unit)
    if microseconds is None:
        microseconds = _iso(cell)
    if microseconds is None:
        return INVALID_UTF8 if _broken(cell) else "timestamp cannot be read"
    if microseconds < 0:
        return "timestamp is before 1970"
    if microseconds > latest_us:
        return "timestamp is in the future"
    return microseconds


def _iso(cell: str) -> int | None:
    if cell.endswith(" UTC"):  # as BigQuery and pandas write it
        cell = cell[:-4]
    try:
        moment = datetime.fromisoformat(cell)
    except ValueError:
        return None
    if moment.tzinfo is not None:
        try:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
        except OverflowError:  # a zone that leads out of the years 1 to 9999
            return None
    return (moment - EPOCH) // _MICROSECOND


def _is_clean(cell: str) -> bool:
    """Whether plain_text certainly changes nothing: one fast pass for the usual case."""
    # The only printable white space is the blank.
    return (
        cell.isprintable()
        and "  " not in cell
        and (not cell or (cell[0] != " " and cell[-1] != " "))
        and (cell.isascii() or unicodedata.is_normalized("NFC", cell))
    )


def _mended(cell: str, plain: str) -> int:
    """What plain_text did to a cell."""
    if cell == plain:
        return 0
    flags = 0
    if not unicodedata.is_normalized("NFC", cell):
        flags |= UNICODE
    if any(_unprintable(char) for char in set(cell)):
        flags |= CONTROL
    if not flags or " ".join(cell.split()) != cell:
        flags |= SPACE
    return flags


def _unprintable(char: str) -> bool:
    return not char.isspace() and not plain_text(char)


def _broken(cell: str) -> bool:
    """Whether the cell has bytes that are not UTF-8 (surrogates, as _tables reads them)."""
    if cell.isascii():
        return False
    try:
        cell.encode()
    except UnicodeEncodeError:
        return True
    return False

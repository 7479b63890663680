"""How the command shows things: JSON, tables, a progress bar."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TextIO

import numpy as np

from foretell.errors import ForetellError

_TEXT_CHARS = 60
"""Characters of a text in a table, if the terminal's width is not known to be larger."""

_BAR_CHARS = 30
_BAR_PAUSE_S = 0.1


def to_json(value: Any) -> Any:
    """A value as what `json.dumps` takes: dataclasses, arrays, times and errors included."""
    match value:
        case ForetellError():
            return {
                "code": value.code.name,
                "reason": value.reason,
                "message": value.message,
                "field": value.field,
            }
        case datetime():
            return value.isoformat()
        case np.ndarray():
            return value.tolist()
        case str() | int() | float() | None:  # StrEnum too
            return value
        case Mapping():
            return {str(key): to_json(entry) for key, entry in value.items()}
        case Iterable():
            return [to_json(entry) for entry in value]
    return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}


def pairs(entries: Mapping[str, object]) -> str:
    """A line per entry: name and value."""
    width = max(map(len, entries), default=0)
    return "\n".join(f"  {name:<{width}}  {_cell(value)}" for name, value in entries.items())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns, numbers to the right; the last column is cut to the terminal's width."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    numeric = [
        len(cells) > 1 and all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    terminal = shutil.get_terminal_size((_TEXT_CHARS + sum(widths[:-1]), 24)).columns
    lines = []
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        lines.append("  " + (line if len(line) + 2 <= terminal else line[: terminal - 3] + "…"))
    return "\n".join(lines)


def _cell(value: object) -> str:
    match value:
        case float():
            return f"{value:.4f}"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S")
        case Mapping():
            return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return " ".join(str(value).split())


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()


class Progress:
    """A bar on a terminal; nothing where the stream is none.

    Args:
        label: what is going on.
        fraction: gives how much is done, 0 to 1.
        stream: where it goes.
    """

    def __init__(
        self, label: str, fraction: Callable[[], float], stream: TextIO = sys.stderr
    ) -> None:
        self._label = label
        self._fraction = fraction
        self._stream = stream
        self._start = time.monotonic()
        self._shown = 0.0
        self._active = stream.isatty()

    def update(self, count: int) -> None:
        """Says how many are done."""
        now = time.monotonic()
        if not self._active or now - self._shown < _BAR_PAUSE_S:
            return
        self._shown = now
        fraction = self._fraction()
        rate = count / max(now - self._start, 1e-9)
        bar = "#" * int(fraction * _BAR_CHARS)
        self._stream.write(
            f"\r{self._label} [{bar:<{_BAR_CHARS}}] {fraction:4.0%}  {count:,}  {rate:,.0f}/s\x1b[K"
        )
        self._stream.flush()

    def close(self) -> None:
        """Clears the bar's line."""
        if self._active:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

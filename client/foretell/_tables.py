"""Rows of text out of CSV and Parquet files, and the file of refused rows."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from foretell.errors import FailedPreconditionError, InvalidArgumentError

if TYPE_CHECKING:
    import pyarrow

REJECT_COLUMNS = ("rejected_row", "rejected_reason")
"""What a file of refused rows has before the original columns. Readers pass over them, so that
a mended file of refused rows can be imported as it is."""

_BATCH_ROWS = 65_536
"""Rows of a Parquet file that are in memory as Python objects at a time."""


class Unreadable(list[str]):
    """A row that has no cells because it cannot be read as a row."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class Table(Protocol):
    """A file of rows with named columns. Every cell is text; invalid bytes are surrogates."""

    columns: tuple[str, ...]

    def rows(self) -> Iterator[Sequence[str]]:
        """The rows from the first one on, `Unreadable` ones among them.

        Raises:
            InvalidArgumentError: the file cannot be read on.
        """

    def fraction(self) -> float:
        """How much of the file `rows` has read, 0 to 1."""


def open_table(path: Path) -> Table:
    """The table in a file named *.csv or *.parquet; its header is read.

    Raises:
        InvalidArgumentError: another extension, or the file cannot be read as what it is named.
        FailedPreconditionError: a Parquet file, and pyarrow is not installed.
    """
    match path.suffix.lower():
        case ".csv":
            return CsvTable(path)
        case ".parquet":
            return ParquetTable(path)
    raise bad_file(path, f"has the extension '{path.suffix}'; .csv and .parquet are read")


def bad_file(path: Path, message: str) -> InvalidArgumentError:
    """The error of a file that cannot be imported."""
    return InvalidArgumentError(f"{path}: {message}", reason="BAD_FILE", field=str(path))


class CsvTable:
    """A CSV file: comma-separated, a header line, UTF-8 with or without byte order mark."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._bytes = 0
        with self._open() as file:
            try:
                header = next(csv.reader(file), [])
            except csv.Error as error:
                raise bad_file(path, f"the header is no CSV: {error}") from None
        if not header:
            raise bad_file(path, "is empty or begins with an empty line; a header is needed")
        self.columns = tuple(name.strip() for name in header)

    def rows(self) -> Iterator[Sequence[str]]:
        """See Table. Empty lines are no rows."""
        with self._open() as self._file:
            reader = csv.reader(self._file)
            next(reader, None)
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:  # the reader goes on with the next line
                    yield Unreadable(f"no CSV: {error}")
                else:
                    if row:
                        yield row

    def fraction(self) -> float:
        """See Table."""
        if self._file is None or self._file.closed:
            return 0.0 if self._file is None else 1.0
        return min(1.0, self._file.buffer.tell() / max(self._bytes, 1))

    @contextlib.contextmanager
    def _open(self) -> Iterator[TextIO]:
        try:
            # surrogateescape: an invalid byte spoils its row, not the file.
            with self._path.open(
                encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as file:
                start = file.buffer.read(2)
                if start in (b"\xff\xfe", b"\xfe\xff"):
                    raise bad_file(self._path, "is UTF-16; save it as UTF-8")
                file.seek(0)
                self._bytes = self._path.stat().st_size
                yield file
        except OSError as error:
            raise bad_file(self._path, error.strerror or str(error)) from error


class ParquetTable:
    """A Parquet file; every type that has an obvious text is read, null as an empty cell."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise FailedPreconditionError(
                f"{path}: to read Parquet, pip install 'foretell[parquet]'",
                reason="PYARROW_MISSING",
            ) from None
        self._path = path
        self._errors = (pyarrow.ArrowException, OSError, ValueError)
        self._row = self._rows = 0
        with self._readable() as file:
            schema = file.schema_arrow
            self.columns = tuple(name.strip() for name in schema.names)
            self._rows = file.metadata.num_rows
        for column in schema:
            if pyarrow.types.is_nested(column.type):
                raise bad_file(path, f"column {column.name} is {column.type}, which has no text")

    def rows(self) -> Iterator[Sequence[str]]:
        """See Table."""
        self._row = 0
        with self._readable() as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                columns = [self._texts(batch.column(i)) for i in range(batch.num_columns)]
                yield from zip(*columns, strict=True)
                self._row += batch.num_rows

    def fraction(self) -> float:
        """See Table."""
        return self._row / self._rows if self._rows else 1.0

    @contextlib.contextmanager
    def _readable(self) -> Iterator[Any]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                yield file
        except self._errors as error:
            raise bad_file(self._path, f"cannot be read as Parquet: {error}") from error

    @staticmethod
    def _texts(column: pyarrow.Array) -> list[str]:
        import pyarrow

        kind = column.type
        if pyarrow.types.is_dictionary(kind):
            column = column.dictionary_decode()
            kind = column.type
        if pyarrow.types.is_timestamp(kind):
            # Stored in UTC whatever the zone says; a zone-less one is UTC by our convention.
            column = column.cast(pyarrow.timestamp("us", "UTC"), safe=False)
        try:
            cells = column.cast(pyarrow.string()).to_pylist()
        except (pyarrow.ArrowInvalid, UnicodeDecodeError):
            binary = column.cast(pyarrow.large_binary()).to_pylist()
            cells = [cell and cell.decode(errors="surrogateescape") for cell in binary]
        if pyarrow.types.is_floating(kind):  # pandas writes a missing number as NaN
            return ["" if cell is None or cell == "nan" else cell for cell in cells]
        return [cell or "" for cell in cells]


class Rejects:
    """Writes refused rows to a CSV file: row number, reason, the original cells.

    Raises:
        InvalidArgumentError: the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        try:
            self._file = path.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise bad_file(path, error.strerror or str(error)) from error
        self._writer = csv.writer(self._file)
        self._writer.writerow((*REJECT_COLUMNS, *columns))

    def write(self, row_number: int, reason: str, row: Sequence[str]) -> None:
        """Adds a row; it is in the file once that is closed."""
        self._writer.writerow((row_number, reason, *row))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

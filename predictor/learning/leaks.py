"""Whether versions may be measured on a test part: none of them may have learned from it.

What a version has seen stands in its metrics.json (`protocol`: how the events were divided, and
the times of the last training and validation events) and its lineage.json (the files' sha256).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from foretell.errors import InvalidArgumentError
from predictor.learning.sources import Dataset
from predictor.learning.splits import Protocol, Split
from predictor.models.version import Version

SECOND = 1_000_000
"""In microseconds: how exactly metrics.json tells times."""

SAME_DATA = (
    "events_sha256", "targets_sha256", "store_events", "store_last_event", "events_dropped"
)  # fmt: skip
"""Of lineage.json: equal for versions that were trained on the same events and targets."""

GIVE = "give the split yourself (--test-from TIME, behind all that any of them has seen)"


def trained_by(version: Version) -> Protocol:
    """How the events that a version was trained on were divided.

    Raises:
        InvalidArgumentError: its metrics.json does not say.
    """
    told = _protocol(version)
    try:
        known = {field.name: told[field.name] for field in fields(Protocol)}
        return TypeAdapter(Protocol).validate_python(known)
    except (KeyError, ValidationError):
        raise InvalidArgumentError(
            f"version {version.name}: its metrics.json does not say by which protocol it was "
            "trained",
            reason="NO_PROTOCOL",
            field="version",
        ) from None


def _protocol(version: Version) -> Mapping[str, Any]:
    told = version.reports["metrics.json"].get("protocol")
    return told if isinstance(told, dict) else {}


def division(protocol: Protocol) -> dict[str, Any]:
    """What of a protocol, with its kind of split, decides which events are in the test part."""
    names = ["split"]
    if protocol.split in ("time", "every"):
        names.append("test_share" if protocol.test_from is None else "test_from")
    if protocol.split == "random":
        names += ["test_share", "seed"]
    if protocol.hold_out:
        names += ["hold_out", "seed"]
    return {name: getattr(protocol, name) for name in names}


def check_one_division(versions: Mapping[str, Version]) -> None:
    """For a comparison in which nobody has said how to divide the data.

    Raises:
        InvalidArgumentError: two versions were trained by different divisions.
    """
    (first, own), *others = ((name, division(trained_by(v))) for name, v in versions.items())
    for name, other in others:
        if other != own:
            raise InvalidArgumentError(
                f"{name} was trained with {_told(other)}, but {first} with {_told(own)}: one may "
                f"have learned what the other is tested on; {GIVE}",
                reason="OTHER_SPLIT",
                field="split",
            )


def check_unseen(
    versions: Mapping[str, Version], dataset: Dataset, part: Split, protocol: Protocol
) -> dict[str, str]:
    """That no version has learned from part.test, as far as can be told.

    A version that was trained by the same division of the same data has not. Of any other it is
    checked, where the split is by time, that all its training and validation events lie before the
    first target; with a file of targets, not behind the histories' last event.

    Args:
        versions: by name; items are held out by the places of the first one's.
        dataset: what `part` divides.
        part: its division.
        protocol: by which.

    Returns:
        of each version what was found, for people.

    Raises:
        InvalidArgumentError: one has, or it cannot be told and its division was another.
    """
    own = division(protocol)
    item_ids = next(iter(versions.values())).item_ids
    found = {}
    for name, version in versions.items():
        alike = division(trained_by(version)) == own
        if protocol.hold_out and not (alike and version.item_ids == item_ids):
            raise InvalidArgumentError(
                f"{name} was not trained without the items that are held out here: to it they are "
                "not cold",
                reason="OTHER_SPLIT",
                field="hold_out",
            )
        if alike and _same_data(version, dataset):
            found[name] = "trained by this division of these data"
        elif dataset.events.has_times and (part.kind in ("time", "every") or dataset.targets):
            found[name] = _check_times(name, version, dataset, part)
        elif alike or dataset.targets:
            found[name] = "NOT CHECKED: trained on other data, and there are no times to go by"
        else:
            raise InvalidArgumentError(
                f"{name} was trained with {_told(division(trained_by(version)))}: what it has "
                f"learned cannot be told from the test part of {_told(own)}",
                reason="OTHER_SPLIT",
                field="split",
            )
    return found


def _same_data(version: Version, dataset: Dataset) -> bool:
    lineage = version.reports.get("lineage.json")
    data = lineage.get("data") if isinstance(lineage, dict) else None
    if not isinstance(data, dict) or not any(data.get(key) for key in SAME_DATA):
        return False
    # None dropped is as good as no word of it.
    return all((data.get(key) or 0) == (dataset.lineage.get(key) or 0) for key in SAME_DATA)


def _check_times(name: str, version: Version, dataset: Dataset, part: Split) -> str:
    times = part.test.events.timestamp
    # Targets of a file have no times: they came after the last event.
    first = times.max() + SECOND if dataset.targets else times[part.test.end].min()
    begin, seen = int(first), _seen(version)
    if seen is None:
        raise InvalidArgumentError(
            f"{name}: its metrics.json does not say up to when its training and validation events "
            "reach; train it again, or by the division that the others have",
            reason="NO_PROTOCOL",
            field="version",
        )
    if seen + SECOND > begin:
        raise InvalidArgumentError(
            f"{name} has learned from events up to {iso(seen)}, but the test part begins at "
            f"{iso(begin)}: {GIVE}",
            reason="OTHER_SPLIT",
            field="split",
        )
    return f"has learned from events up to {iso(seen)}, before the test part ({iso(begin)})"


def _seen(version: Version) -> int | None:
    """Microseconds of the last event that a version has learned or chosen from, to the second."""
    told = _protocol(version)
    try:
        times = [
            datetime.fromisoformat(told[name]).timestamp()
            for name in ("last_event", "last_validation_event")
        ]
    except (KeyError, TypeError, ValueError):
        return None
    return round(max(times)) * SECOND


def iso(microseconds: int) -> str:
    """A time since 1970 for people, to the second."""
    return datetime.fromtimestamp(microseconds / SECOND, UTC).isoformat(timespec="seconds")


def _told(division: Mapping[str, Any]) -> str:
    """A division for people."""
    rest = [
        f"{name} {iso(value) if name == 'test_from' else value}"
        for name, value in division.items()
        if name != "split"
    ]
    return f"split {division['split']}" + (f" ({', '.join(rest)})" if rest else "")

"""Looks through data as they were read, and drops what --clean drops."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from foretell.errors import InvalidArgumentError
from foretell.importing import EventColumns, Summary
from foretell.types import Item
from predictor.learning.quality import contents, times
from predictor.learning.quality.findings import Finding, Mask, counted
from predictor.models.history import MICROSECONDS, Ints


@dataclass(frozen=True)
class Inspection:
    """What was found in a set of data, and what became of it."""

    columns: EventColumns
    """As they were read; nothing is dropped from them."""
    catalogue: Sequence[str] | None
    """Ids of the items that can be predicted; None: those of the events."""
    findings: tuple[Finding, ...]
    summaries: Mapping[str, Summary]
    """What importing made of the rows, by file; none where the data are from a store."""
    clean: bool = False
    """Whether what cleaning drops was dropped."""

    @property
    def droppable(self) -> Mask:
        """(events,) those that cleaning drops."""
        some = np.zeros(len(self.columns), np.bool_)
        for finding in self.findings:
            if finding.drops and finding.events is not None:
                some |= finding.events
        return some

    def cleaned(self) -> tuple[Inspection, EventColumns]:
        """The same, cleaned, and the events that are left.

        Raises:
            InvalidArgumentError: none is left.
        """
        dropped = self.droppable
        if dropped.all():
            names = ", ".join(finding.name for finding in self.findings if finding.drops)
            raise InvalidArgumentError(
                f"--clean would drop all {len(dropped):,} events ({names})",
                reason="NO_EVENTS",
                field="clean",
            )
        return replace(self, clean=True), without(self.columns, dropped)

    def done(self, finding: Finding) -> str:
        """What became of a finding."""
        if finding.drops and finding.events is not None and self.clean:
            return f"dropped: {int(finding.events.sum()):,} events"
        return finding.kept

    def __str__(self) -> str:
        """For people: a line a finding."""
        lines = [
            f"data: {finding.name}: {finding.found}; {self.done(finding)}"
            for finding in self.findings
        ]
        if self.clean:
            dropped = counted(int(self.droppable.sum()), len(self.columns), "events")
            lines.append(f"data: cleaning dropped {dropped}")
        return "\n".join(lines or ["data: nothing odd was found"])


def inspect(
    columns: EventColumns,
    items: Sequence[Item] | None,
    summaries: Mapping[str, Summary],
    now: int | None = None,
) -> Inspection:
    """Looks for all that is odd.

    Args:
        columns: events in the order of the source, at least one.
        items: the catalogue; None: there is none.
        summaries: by file, see Inspection.
        now: microseconds since 1970; None: the clock's.
    """
    now = time.time_ns() // 1_000 if now is None else now
    findings = [
        *_refused(summaries),
        contents.duplicates(columns),
        *contents.missing(columns),
        times.one_time(columns),
        times.impossible_times(columns, now),
        times.out_of_order(columns),
        times.bursts(columns),
        times.bots(columns),
        contents.single_events(columns),
        contents.large_users(columns),
        *contents.constants(columns),
        contents.rare_types(columns),
        contents.spelling_variants(columns),
        *contents.of_items(columns, items),
    ]
    catalogue = None if items is None else [item.id for item in items]
    found = tuple(finding for finding in findings if finding is not None)
    return Inspection(columns, catalogue, found, summaries)


def _refused(summaries: Mapping[str, Summary]) -> list[Finding]:
    """Rows that importing refused, those with a repeated event_id among them."""
    found = []
    for name, summary in summaries.items():
        refused = summary.refused.total()
        if refused:
            reasons = "; ".join(f"{why}: {n:,}" for why, n in summary.refused.most_common())
            found.append(
                Finding(
                    "refused_rows",
                    f"{counted(refused, summary.rows, 'rows')} of {name} cannot stand ({reasons})",
                    "refused: nothing below counts them",
                )
            )
    return found


def without(columns: EventColumns, dropped: Mask) -> EventColumns:
    """The events as if the file had never had the dropped ones."""
    keep = ~dropped

    def compact(codes: Ints, names: list[str]) -> tuple[Ints, list[str]]:
        kept = codes[keep]
        used, first = np.unique(kept[kept >= 0], return_index=True)
        used = used[np.argsort(first)]  # in order of appearance
        # The last element is what the code of "none" points to.
        table = np.full(len(names) + 1, -1, np.int64)
        table[used] = np.arange(len(used))
        return table[kept], [names[at] for at in used.tolist()]

    user, user_ids = compact(columns.user, columns.user_ids)
    kind, behavior_types = compact(columns.behavior_type, columns.behavior_types)
    item, item_ids = compact(columns.item, columns.item_ids)
    text, texts = compact(columns.text, columns.texts)
    timestamp = None if columns.timestamp is None else columns.timestamp[keep]
    return EventColumns(
        user_ids, behavior_types, item_ids, texts, user, kind, item, text, timestamp
    )


def outline(columns: EventColumns) -> str:
    """For people: the size of a set, and how fine its times are."""
    size = (
        f"events: {len(columns):,}, users: {len(columns.user_ids):,}, "
        f"items: {len(columns.item_ids):,}, behavior types: {len(columns.behavior_types):,}, "
        f"texts: {len(columns.texts):,}"
    )
    if columns.timestamp is None:
        return f"{size}; no times, the order of the rows stands for them"
    unit = times.resolution(columns.timestamp)
    units = {times.DAY: "days", times.HOUR: "hours", times.MINUTE: "minutes",
             MICROSECONDS: "seconds", 1_000: "milliseconds"}  # fmt: skip
    return f"{size}; times in {units.get(unit, 'microseconds')}"
